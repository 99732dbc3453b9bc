"""How long a job will take: times some steps on random experts with the job's shapes, on its device, and extrapolates.

A dry run reads no weights and probes nothing.  So the estimate does not include early stops of a fit that makes no more
progress, nor the time for reading the source.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from mobe_gguf.factorize.job import Job
from mobe_gguf.factorize.job.executors import pieces_at_once
from mobe_gguf.factorize.linear import LONGEST, suits
from mobe_gguf.factorize.plan import baseline
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.factorize.target import Size, probe_steps
from mobe_gguf.formats.safetensors import STORED

#: Multiply-adds of the largest product in a trial's step, and the number of steps.
WORK = 4e9
STEPS = 8


def expected_time(job: Job, device: str) -> dict[str, Any]:
    """Seconds: ``fitting`` all units, ``probing`` them first (``--target``), and both together with ``at_once`` units in
    parallel; ``trial``: the time of this estimate.  Finished units count, too.
    """
    began = time.monotonic()
    units = job.settings.units()
    at_once = pieces_at_once(job.plan.memory_bytes, len(units), device)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // at_once))
    try:
        unit = _unit_seconds(job, device.split(",")[0])
    finally:
        torch.set_num_threads(threads)
    rounds = -(-len(units) // at_once)
    fitting, probing = rounds * unit, 0.0
    if job.goal is not None and job.sizes is None:
        share = probe_steps(job.settings.steps) / job.settings.steps
        probes = sum(min(2, len(job.goal.even(u))) + 3 for u in units) / len(units)
        probing = fitting * share * probes
    return {
        "fitting": round(fitting, 3),
        "probing": round(probing, 3),
        "seconds": round(fitting + probing, 3),
        "at_once": at_once,
        "trial": round(time.monotonic() - began, 3),
    }


def _unit_seconds(job: Job, device: str) -> float:
    """Seconds for one unit with all its steps."""
    c, s = job.checkpoint, job.settings
    n, p, d = c.n_expert, c.n_ff_exp, c.n_embd
    size = job.example()
    rank = (size.rank if size else s.rank) or p
    few = max(1, min(n, int(WORK / (p * rank * d))))
    w = torch.randn(few, p, d, generator=torch.Generator().manual_seed(0)) * 0.02
    if not s.how.fitted:
        began = time.monotonic()
        baseline(s, n, p, d).compress(w, dtype=STORED[s.dtype], device=device)
        return (time.monotonic() - began) * n / few
    settings = s.solver(size)
    if suits(settings.activation, settings.mix, settings.n_basis // settings.n_group, settings.mix_terms):
        return _linear_seconds(settings, few, (n, p, d), device)
    bases = max(1, round(settings.n_basis * few / n))
    settings = replace(
        s.solver(Size(bases, settings.rank)),
        n_group=1,
        mix_terms=min(settings.mix_terms, bases) if settings.mix_terms else None,
    )
    return _step_seconds(w, settings, device) * s.steps * n / few


def _step_seconds(w: torch.Tensor, settings: Settings, device: str) -> float:
    """Seconds for one step on experts w."""
    stamps: list[float] = []
    settings = replace(settings, steps=STEPS)
    fit(w.clone(), settings, device=device, on_step=lambda *_: stamps.append(time.monotonic()))
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def _linear_seconds(settings: Settings, few: int, shape: tuple[int, int, int], device: str) -> float:
    """Seconds for the linear form.  A part of its time does not depend on the number of experts, so two trials with different
    numbers are timed."""
    n, p, d = shape
    groups, settings = (
        settings.n_group,
        replace(settings, n_basis=settings.n_basis // settings.n_group, n_group=1),
    )
    n //= groups
    less = min(n, max(few, settings.n_basis, 2))
    more = min(n, 2 * less)
    w = torch.randn(more, p, d, generator=torch.Generator().manual_seed(0)) * 0.02
    seconds = _step_seconds(w[:less], settings, device)
    if more > less:
        each = max(0.0, _step_seconds(w, settings, device) - seconds) / (more - less)
        seconds += each * (n - less)
    return seconds * min(settings.steps, LONGEST) * groups
