"""Fitting the factors of one stack of experts: Adam on basis and mix of the projected problem.

What was tried and measured, relative error after 300 steps on (a) slices of a real FFN (SmolLM2-135M-Instruct layer 10
gate as 12 experts of 128 x 576, m 4, r 128) and (b) a layer of a trained MoE (24 experts of 96 x 256, m 6, r 96):

- Adam's usual betas: (a) 0.157, 0.148 and 0.159 at rates 0.03, 0.1 and 0.3; betas (0.9, 0.95) 0.144; (0.8, 0.95) 0.139; (0.5,
  0.95) 0.141, all at rate 0.1; at rate 0.2 0.137.  (b) 0.0479, 0.0451, 0.0433 and 0.0433 at rates 0.05, 0.1, 0.2 and 0.3.
- Bases that start at a standard deviation of 0.1 / 0.25 / 0.5: much the same.  tanh / silu / none: (b) 0.0451 / 0.0472 / 0.0505.
- Muon on the bases: (a) 0.143 at nearly twice the time a step; L-BFGS: 0.159 at best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mobe_gguf.errors import MobeError, UsageError
from mobe_gguf.factorize.metric import Metric
from mobe_gguf.factorize.projected import Projected, SingularError
from mobe_gguf.factorize.start import initial_basis, initial_mix
from mobe_gguf.formula import activate, combine
from mobe_gguf.names import ACTIVATIONS

#: Standard deviation that the bases start with; W has 1.
START_SCALE = 0.25
BETAS = (0.8, 0.95)
WARMUP = 10
#: Steps are cut short when the best loss falls by less than this share in a tenth of the run.
PLATEAU = 1e-3
#: Loss per element (W has variance 1) that float32 cannot tell from zero.
EXACT = 1e-9
#: A diverging fit is tried again at a quarter of the rate, this often in all.
ATTEMPTS = 3

MIXES = ("scalar", "row")


@dataclass(frozen=True)
class Settings:
    """What to fit, and how.  ``n_basis`` and ``n_group`` count over the whole layer; ``rank`` <= p, d.

    ``mix``: ``scalar`` is one weight for each expert and basis, ``row`` one for each row of the basis.
    ``ridge``: relative to the mean of the Gram matrix's diagonal.  ``dtype``: type that A and B are stored in; B is
    rounded to it before A is solved for the last time.
    """

    n_basis: int
    rank: int
    n_group: int = 1
    activation: str = "tanh"
    mix: str = "scalar"
    steps: int = 500
    seed: int = 0
    rate: float = 0.2
    ridge: float = 1e-6
    dtype: torch.dtype = torch.float32

    def check(self, n: int, p: int, d: int) -> None:
        """UsageError if the settings do not fit experts ``[n, p, d]``."""
        m, g, r = self.n_basis, self.n_group, self.rank
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"activation '{self.activation}' is unknown; known: {', '.join(sorted(ACTIVATIONS))}"
            )
        if self.mix not in MIXES:
            raise UsageError(f"mix '{self.mix}' is unknown; known: {', '.join(MIXES)}")
        if min(m, g, r, self.steps) < 1:
            raise UsageError(
                f"bases, rank, groups and steps must be at least 1, got {m}, {r}, {g} and {self.steps}"
            )
        if n % g:
            raise UsageError(f"{n} experts cannot be split in {g} equal groups; --groups must divide {n}")
        if m % g:
            raise UsageError(
                f"--bases {m} does not divide by --groups {g}; each group needs as many bases. "
                f"Nearest: --bases {m - m % g or g} or --bases {m + g - m % g}"
            )
        if m > n:
            raise UsageError(
                f"--bases {m} is more than the {n} experts of a layer; the factors would only grow"
            )
        if r > p:
            raise UsageError(
                f"--rank {r} is more than the {p} rows of an expert's matrix; expected 1 to {min(p, d)}"
            )
        if r > d:
            raise UsageError(f"--rank {r} is more than the hidden size {d}; expected 1 to {min(p, d)}")


@dataclass
class Factors:
    """Result of a fit: basis ``[m, r, d]``, mix ``[n, m/g]`` or ``[n, m/g, r]``, transform (A) ``[n, p, r]``, on the CPU.

    ``error`` is |W - W'|^2 / |W|^2 of the factors as they are stored (the experts' mean is next to zero, so this is
    also the error relative to their variance); ``objective`` the same in the metric that was minimised.
    """

    basis: torch.Tensor
    mix: torch.Tensor
    transform: torch.Tensor
    error: float
    objective: float
    steps: int
    seconds: float


def fit(
    w: torch.Tensor,
    settings: Settings,
    *,
    weight: torch.Tensor | None = None,
    device: str | torch.device = "cpu",
    block: int | None = None,
    label: str = "experts",
    on_step: Callable[[float, float], None] | None = None,
    overwrite_w: bool = False,
) -> Factors:
    """Factorize experts w, float32 ``[n, p, d]``.

    ``weight``: second moments of the inputs, see :meth:`Metric.of`.  ``block``: experts taken at once (default: as
    memory allows); it bounds memory and changes nothing else.  ``on_step(share done, error)`` after each step.
    ``overwrite_w`` saves a copy: w then holds W / sigma afterwards.

    Raises UsageError if the settings do not fit the shape, MobeError naming ``label`` if the fit diverges.
    """
    n, p, d = w.shape
    settings.check(n, p, d)
    start = time.monotonic()
    sigma = float(w.std())
    if not sigma > 0:
        raise MobeError(f"{label}: all weights are the same; there is nothing to factorize")
    w = w.div_(sigma) if overwrite_w else w / sigma
    metric = Metric.of(weight, n, d)
    parts = []
    groups = list(w.chunk(settings.n_group))
    for g, group in enumerate(groups):
        group_metric = metric.slice(slice(g * n // len(groups), (g + 1) * n // len(groups)), w)

        def report(share: float, error: float, g: int = g) -> None:
            if on_step:
                on_step((g + share) / settings.n_group, error)

        parts.append(_fit_group(group, settings, group_metric, torch.device(device), block, label, report))
    bases, mixes, transforms, sums, steps = zip(*parts, strict=True)
    error, norm, objective, objective_norm = (sum(s[i] for s in sums) for i in range(4))
    return Factors(
        torch.cat(bases),
        torch.cat(mixes),
        torch.cat(transforms).mul_(sigma).to(settings.dtype),
        error / norm,
        objective / objective_norm,
        max(steps),
        time.monotonic() - start,
    )


def _fit_group(
    w: torch.Tensor,
    settings: Settings,
    metric: Metric,
    device: torch.device,
    block: int | None,
    label: str,
    report: Callable[[float, float], None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[float, float, float, float], int]:
    """One group: ``(B, alpha, A without sigma, sums of squares, steps)``."""
    n, _, d = w.shape
    m = settings.n_basis // settings.n_group
    weighted = (
        torch.cat([metric.slice(slice(i, i + 1), w).apply(w[i : i + 1]) for i in range(n)])
        if metric.root is not None
        else w
    )
    problem = _place(weighted, settings, metric, device, block)
    mix0 = initial_mix(n, m, settings.rank if settings.mix == "row" else None, settings.seed)
    basis0 = initial_basis(w, m, settings.rank, START_SCALE, settings.seed, device)
    for attempt in range(ATTEMPTS):
        try:
            basis, mix, steps = _descend(
                problem,
                basis0,
                mix0.to(device),
                settings.rate / 4**attempt,
                settings.steps,
                report,
            )
            basis = basis.to(settings.dtype).float()
            transform = problem.transform(basis, mix)
            break
        except SingularError as e:
            reason = e
    else:
        raise MobeError(
            f"{label}: the fit diverged {ATTEMPTS} times, at last with learning rate {settings.rate / 4**attempt:g} "
            f"({reason}). Try another --seed, fewer --bases or a smaller --rank."
        )
    sums = _residuals(
        w, weighted, basis, mix, transform.to(settings.dtype).float(), metric, settings.activation
    )
    return basis.to(settings.dtype).cpu(), mix.cpu(), transform.cpu(), sums, steps


def _descend(
    problem: Projected,
    basis: torch.Tensor,
    mix: torch.Tensor,
    rate: float,
    steps: int,
    report: Callable[[float, float], None],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Adam with warm-up and cosine decay; returns the best basis and mix seen, and the steps taken.

    ``phase`` runs from 0 to 1 through the schedule; a plateau makes it run faster, so that the rate still decays,
    which is where much of the gain is.
    """
    basis, mix = basis.clone(), mix.clone()
    basis.grad, mix.grad = torch.empty_like(basis), torch.empty_like(mix)
    adam = torch.optim.Adam([basis, mix], lr=rate, betas=BETAS)
    best, best_basis, best_mix = math.inf, basis.clone(), mix.clone()
    patience = max(steps // 10, 2 * WARMUP)
    mark, mark_step = math.inf, 0
    phase, pace, step = 0.0, 1.0 / steps, 0
    while True:
        loss = problem.loss_and_gradient(basis, mix, basis.grad, mix.grad)
        if loss < best:
            best = loss
            best_basis.copy_(basis)
            best_mix.copy_(mix)
        report(min(phase, 1.0), best / problem.mean_square)
        if phase >= 1.0 - 1e-9 or best < EXACT:
            return best_basis, best_mix, step
        if step >= mark_step + patience:
            if best > mark * (1 - PLATEAU):
                pace = max(pace, (1.0 - phase) / patience)
            mark, mark_step = best, step
        warm = min(1.0, (step + 1) / WARMUP)
        adam.param_groups[0]["lr"] = rate * warm * 0.5 * (1.0 + math.cos(math.pi * phase))
        adam.step()
        step += 1
        phase += pace


def _place(
    w: torch.Tensor, settings: Settings, metric: Metric, device: torch.device, block: int | None
) -> Projected:
    """The problem with W on ``device`` if it fits there, and the block size that memory allows."""
    n, p, d = w.shape
    r = settings.rank
    budget = 512 << 20
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        parameters = (
            6 * 4 * (settings.n_basis // settings.n_group) * r * d
        )  # B, its gradient, Adam's two, best, a spare
        if w.numel() * 4 + parameters < 0.7 * free:
            w = w.to(device)
            free -= w.numel() * 4
        budget = max(budget, int(0.6 * (free - parameters)))
    per_expert = 4 * (6 * r * d + 3 * p * r + 4 * r * r + (0 if w.device == device else p * d))
    return Projected(
        w, settings.activation, metric, settings.ridge, block or max(1, min(n, budget // per_expert))
    )


def _residuals(
    w: torch.Tensor,
    weighted: torch.Tensor,
    basis: torch.Tensor,
    mix: torch.Tensor,
    transform: torch.Tensor,
    metric: Metric,
    activation: str,
) -> tuple[float, float, float, float]:
    """|W - W'|^2, |W|^2, and both in the metric, an expert at a time, in float64 sums of float32 products."""
    total = torch.zeros(4, dtype=torch.float64)
    for i in range(w.shape[0]):
        s = slice(i, i + 1)
        wi, wm = w[s].to(basis.device), weighted[s].to(basis.device)
        rest = wi - transform[s].to(basis.device) @ activate(combine(mix[s], basis), activation)
        scaled = metric.slice(s, basis).apply(rest)
        total += torch.stack([x.square().sum(dtype=torch.float64) for x in (rest, wi, scaled, wm)]).cpu()
    a, b, c, e = total.tolist()
    return a, b, c, e
