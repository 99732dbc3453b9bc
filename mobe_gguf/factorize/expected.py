"""How long a job will take: times some steps on random experts with the job's shapes, on its device, and extrapolates.

A dry run reads no weights and probes nothing.  So the estimate does not include the time for reading the source.  A fit of
the linear form with few bases is counted with ITERATIONS, after which most stop; other fits with all their steps.
For GPUs that are not here, the time is computed from multiply-adds.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from mobe_gguf.core.executors import pieces_at_once
from mobe_gguf.core.metric import Roots
from mobe_gguf.factorize.job import Job
from mobe_gguf.factorize.linear import REFRESH, suits
from mobe_gguf.factorize.plan import baseline
from mobe_gguf.factorize.solver import LAST_STEPS, Settings, fit
from mobe_gguf.factorize.target import Size, probe_steps
from mobe_gguf.formats.safetensors import STORED

#: Multiply-adds of the largest product in a trial's step, and the number of steps.
WORK = 4e9
STEPS = 8
#: Iterations of the linear form's method: typical, and of a trial.
ITERATIONS, TRIAL = 60, 6

#: Peak multiply-adds per second of GPUs in TF32 products (the makers' data sheets, without sparsity), and the share of it
#: that a fit is assumed to reach.  No fit has run on these.
GPUS = {"RTX 4090": 41e12, "A100": 78e12, "H100": 247e12}
GPU_SHARE = 0.3


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


def gpu_seconds(job: Job) -> dict[str, float]:
    """Seconds for fitting all units on one GPU, by its name: computed, without probes and without reading.  Empty for a method
    without steps."""
    c, s = job.checkpoint, job.settings
    if not s.how.fitted:
        return {}
    work = 0.0
    for unit in s.units():
        settings = s.solver(job.size(unit) or job.example(), unit[1])
        work += unit_work(settings, (c.n_expert, c.n_ff_exp, c.n_embd), _directions(job, *unit))
    return {name: work / (GPU_SHARE * peak) for name, peak in GPUS.items()}


def unit_work(settings: Settings, shape: tuple[int, int, int], directions: int | None) -> float:
    """Multiply-adds of one unit's fit.  ``directions``: as in :func:`plan.unit_memory`."""
    n, p, d = shape
    m, r = settings.n_basis // settings.n_group, settings.rank
    inputs = p if settings.transposed else d
    k = directions or 0
    more = k if 0 < k < inputs else 0
    rows, c = (p + more, d) if settings.transposed else (p, d + more)
    metric = 0 if settings.transposed else r * d * k  # what one application to Z costs
    linear = suits(settings.activation, settings.mix, m, settings.mix_terms)
    gram = r * r * c * (5 / 8 if linear else 1)
    solve = r**3 / 6 + rows * r * r + (r**3 / 3 if not linear else 0)
    mixing = 3 * m * r * d
    if linear:
        each = 2 * metric + gram + 3 * rows * r * c + solve + mixing
        curved = (
            2 * rows * r * r
            + m * (rows * r * d + rows * d * k)
            + (r * r * c / 2 + metric + d * d * (r + k)) / 4
        )
        whole = (m * r) ** 3 / 6 + d**3 / 6
        step = (m * r) ** 2 * d + m * r * d * d  # of the preconditioner
        return ITERATIONS * (n * each + step) + _refreshes(ITERATIONS) * (n * curved + whole)
    each = 2 * metric + gram + 2 * rows * r * c + r * r * c + rows * r * r + solve + mixing
    return settings.steps * n * each


def _refreshes(iterations: int) -> int:
    """How often the preconditioner is computed in so many iterations."""
    return sum(step in REFRESH or step % 10 == 0 for step in range(1, iterations + 1))


def _directions(job: Job, layer: int, projection: str) -> int | None:
    if job.settings.objective == "mse":
        return None
    return job.moments.directions(layer, projection) if job.moments else 0


def _weight(job: Job, experts: int, d: int) -> torch.Tensor | Roots | None:
    """Second moments of gate's inputs of the same kind as the job's, with random values."""
    k = _directions(job, job.settings.layers[0], "gate")
    if k is None:
        return None
    if not k:
        return torch.ones(experts, 1, d)
    generator = torch.Generator().manual_seed(1)
    rest = None if k >= d else torch.full((experts, d), 0.1)
    return Roots(torch.randn(experts, d, k, generator=generator), rest)


def _first(weight: torch.Tensor | Roots | None, experts: int) -> torch.Tensor | Roots | None:
    if isinstance(weight, Roots):
        return Roots(weight.root[:experts], None if weight.rest is None else weight.rest[:experts])
    return None if weight is None else weight[:experts]


def _unit_seconds(job: Job, device: str) -> float:
    """Seconds for one unit."""
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
        return _linear_seconds(settings, few, (n, p, d), device, job)
    bases = max(1, round(settings.n_basis * few / n))
    settings = replace(
        s.solver(Size(bases, settings.rank)),
        n_group=1,
        mix_terms=min(settings.mix_terms, bases) if settings.mix_terms else None,
    )
    return _step_seconds(w, settings, device, _weight(job, few, d)) * s.steps * n / few


def _step_seconds(
    w: torch.Tensor, settings: Settings, device: str, weight: torch.Tensor | Roots | None
) -> float:
    """Seconds for one step on experts w."""
    stamps: list[float] = []
    settings = replace(settings, steps=STEPS)
    fit(w.clone(), settings, weight=weight, device=device, on_step=lambda *_: stamps.append(time.monotonic()))
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def _linear_seconds(
    settings: Settings, few: int, shape: tuple[int, int, int], device: str, job: Job
) -> float:
    """Seconds for the linear form.  A part of its time does not depend on the number of experts, so two trials with different
    numbers are timed."""
    n, p, d = shape
    groups = settings.n_group
    steps = min(settings.steps, ITERATIONS)
    more_steps = min(settings.steps, LAST_STEPS) if settings.basis_type and job.moments is None else 0
    settings = replace(settings, n_basis=settings.n_basis // groups, n_group=1, basis_type=None)
    n //= groups
    less = min(n, max(few, settings.n_basis, 2))
    more = min(n, 2 * less)
    w = torch.randn(more, p, d, generator=torch.Generator().manual_seed(0)) * 0.02
    weight = _weight(job, more, d)

    def whole(experts: int) -> float:
        return _linear_fit_seconds(
            w[:experts], replace(settings, steps=TRIAL), device, _first(weight, experts), steps, more_steps
        )

    seconds = whole(less)
    if more > less:
        seconds += max(0.0, whole(more) - seconds) / (more - less) * (n - less)
    return seconds * groups


def _linear_fit_seconds(
    w: torch.Tensor,
    settings: Settings,
    device: str,
    weight: torch.Tensor | Roots | None,
    iterations: int,
    more_steps: int,
) -> float:
    """Seconds for a whole fit of experts w with so many iterations, and ``more_steps`` of Adam, by a short one."""
    stamps: list[float] = []
    began = time.monotonic()
    fit(w.clone(), settings, weight=weight, device=device, on_step=lambda *_: stamps.append(time.monotonic()))
    total = time.monotonic() - began
    took = [b - a for a, b in zip(stamps, stamps[1:], strict=False)][: settings.steps - 1]
    curved = sorted(t for step, t in enumerate(took, 2) if step in REFRESH)
    plain = sorted(t for step, t in enumerate(took, 2) if step not in REFRESH)
    each = plain[len(plain) // 2] if plain else total / settings.steps
    refresh = max(0.0, curved[len(curved) // 2] - each) if curved else 0.0
    rest = max(0.0, total - sum(took) - each)
    return rest + iterations * each + _refreshes(iterations) * refresh + more_steps * each
