"""Fitting the factors of one stack of experts: Adam on basis and mix of the projected problem.

docs/experiments.md has measurements of what was tried, including what did not help.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.metric import Metric, Roots
from mobe_gguf.core.names import ACTIVATIONS
from mobe_gguf.core.projected import Projected, SingularError, fast_products
from mobe_gguf.factorize.adam import Adam
from mobe_gguf.factorize.gauge import flat_gauge
from mobe_gguf.factorize.linear import fit_linear, suits
from mobe_gguf.factorize.scale import balance
from mobe_gguf.factorize.start import initial_basis, initial_mix
from mobe_gguf.quant.roundtrip import noise, resolve, rounded, settled

#: Initial standard deviation of the bases; that of W is 1.
START_SCALE = 0.25
BETAS = (0.8, 0.95)
#: The learning rate rises over this first share of the run and falls to zero over this last one.
RAMP, DECAY = 0.5, 0.25
#: In runs longer than this the rate is divided by the root of (length / this).
FULL_RATE_STEPS = 300
#: The run is shortened when the best loss falls by less than this share in a tenth of the run, or in this many steps.
PATIENCE = 20
PLATEAU = 1e-3
#: After this share of the run every step obeys the constraints on the result: rounded bases, few terms.
STRICT_FROM = 0.4
#: For the linear form with few bases: noise on the initial mixes; number of last steps, with rounded bases.
LINEAR_NOISE, LAST_STEPS, LAST_RATE = 1.0, 100, 0.1
#: Loss per element (W has variance 1) that float32 cannot tell from zero.
EXACT = 1e-9
#: A diverging fit is repeated at a quarter of the rate; this is the total number of attempts.
ATTEMPTS = 3

#: Bytes of a block of experts on the CPU: at most, and preferably.
BLOCK_BYTES = 512 << 20
CACHE_BYTES = 8 << 20

MIXES = ("scalar", "row")


@dataclass(frozen=True)
class Settings:
    """What to fit, and how.  ``n_basis`` and ``n_group``: for the whole layer.  ``rank``: 1 to d; it may exceed p, see
    docs/forms.md, "Wide and few".

    ``mix``: ``scalar`` has one weight for each expert and basis, ``row`` one for each row of the basis.
    ``ridge``: relative to the mean of the Gram matrix's diagonal.  ``dtype``: type in which A and B are stored; B is rounded
    to it before A is solved for the last time.  ``basis_type``, ``transform_type``: ggml types for the export of B and A,
    None if unknown; see :meth:`resolved`.  ``mix_terms``: the most bases that an expert may mix.
    ``transposed``: the matrices to fit are the file's, transposed (``down``).  The file's rows are then the columns of B and
    A here, and a ``row`` mix has a weight for each column of B.
    """

    n_basis: int
    rank: int
    n_group: int = 1
    activation: str = "tanh"
    mix: str = "scalar"
    steps: int = 500
    seed: int = 0
    rate: float = 0.3
    ridge: float = 1e-6
    dtype: torch.dtype = torch.float32
    basis_type: str | None = None
    transform_type: str | None = None
    mix_terms: int | None = None
    transposed: bool = False

    def rows(self, p: int, d: int) -> tuple[int, int]:
        """Row lengths of B and of A in the file, for experts ``[n, p, d]``."""
        return (self.rank, p) if self.transposed else (d, self.rank)

    def resolved(self, p: int, d: int) -> Settings:
        """These settings with the types that export will choose for the file's rows of B and A.

        UsageError if there is no such type, or the stored type cannot hold its values.
        """
        basis_row, transform_row = self.rows(p, d)
        basis = self.basis_type and resolve("--for-basis", self.basis_type, basis_row)
        transform = self.transform_type and resolve("--for-transform", self.transform_type, transform_row)
        if (basis or transform) and self.dtype != torch.float32:
            raise UsageError(
                "factors that are fitted for a quantized type must be stored as f32: leave out --dtype"
            )
        return replace(self, basis_type=basis, transform_type=transform)

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
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"--seed {self.seed}: expected a whole number from 0 to 2^64 - 1")
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
        if r > d:
            raise UsageError(f"--rank {r} is more than the hidden size {d}; expected 1 to {d}")
        if self.mix_terms is not None and not 1 <= self.mix_terms <= m // g:
            raise UsageError(
                f"--mix-terms {self.mix_terms}: an expert has {m // g} bases to mix; expected 1 to {m // g}"
            )
        self.resolved(p, d)


@dataclass
class Factors:
    """Result of a fit: basis ``[m, r, d]``, mix ``[n, m/g]`` or ``[n, m/g, r]``, transform (A) ``[n, p, r]``, on the CPU.

    ``error``: |W - W'|^2 / |W|^2 of the stored factors.  The experts' mean is almost zero, so this is also the error relative
    to their variance.  ``objective``: the same in the metric that was minimised.
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
    weight: torch.Tensor | Roots | None = None,
    device: str | torch.device = "cpu",
    block: int | None = None,
    label: str = "experts",
    on_step: Callable[[float, float], None] | None = None,
    overwrite_w: bool = False,
) -> Factors:
    """Factorize experts w, float32 ``[n, p, d]``.

    ``weight``: second moments of the inputs, see :meth:`Metric.of`: of the d columns, or of the p rows if ``settings`` are
    ``transposed``.  ``block``: experts processed at once (default: as memory allows); it limits memory and changes nothing
    else.  ``on_step(share done, error)`` is called after each step.  ``overwrite_w`` saves a copy; w then holds W / sigma
    afterwards.

    Raises UsageError if the settings do not fit the shape, and MobeError, which names ``label``, if the fit diverges.
    """
    n, p, d = w.shape
    settings.check(n, p, d)
    settings = settings.resolved(p, d)
    start = time.monotonic()
    sigma = float(w.std())
    if not sigma > 0:
        raise MobeError(f"{label}: all weights are the same; there is nothing to factorize")
    w = w.div_(sigma) if overwrite_w else w / sigma
    metric = Metric.of(weight, n, p if settings.transposed else d)
    parts = []
    groups = list(w.chunk(settings.n_group))
    for g, group in enumerate(groups):
        group_metric = metric.slice(slice(g * n // len(groups), (g + 1) * n // len(groups)), w)

        def report(share: float, error: float, g: int = g) -> None:
            if on_step:
                on_step((g + share) / settings.n_group, error)

        # For the whole group, not only its steps: a thread's result must not depend on another thread's steps.
        with fast_products():
            parts.append(
                _fit_group(group, sigma, settings, group_metric, torch.device(device), block, label, report)
            )
    bases, mixes, transforms, sums, steps = zip(*parts, strict=True)
    error, norm, objective, objective_norm = (sum(s[i] for s in sums) for i in range(4))
    return Factors(
        _joined(bases),
        _joined(mixes),
        _joined(transforms),
        error / norm,
        objective / objective_norm,
        max(steps),
        time.monotonic() - start,
    )


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Concatenate the groups' parts; that of a single group is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fit_group(
    w: torch.Tensor,
    sigma: float,
    settings: Settings,
    metric: Metric,
    device: torch.device,
    block: int | None,
    label: str,
    report: Callable[[float, float], None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[float, float, float, float], int]:
    """Fit one group of experts w, divided by ``sigma``: ``(B, alpha, A, sums of squares, steps)``, as stored."""
    n, _, d = w.shape
    m = settings.n_basis // settings.n_group
    weighted = w if metric.root is None else _weighed(w, metric, settings)
    problem = _place(weighted, settings, Metric() if settings.transposed else metric, device, block)
    width = None if settings.mix == "scalar" else d if settings.transposed else settings.rank
    mix0 = initial_mix(n, m, width, settings.seed)
    if settings.transposed and width is not None:
        mix0 = mix0[:, :, None]
    basis0 = initial_basis(
        weighted if settings.transposed else w, m, settings.rank, START_SCALE, settings.seed, device
    )
    for attempt in range(ATTEMPTS):
        rate = settings.rate / 4**attempt
        try:
            if suits(settings.activation, settings.mix, m, settings.mix_terms):
                basis, mix, steps = _fit_linear(problem, basis0, mix0.to(device), settings, report)
            else:
                basis, mix, steps = _descend(
                    problem, basis0, mix0.to(device), replace(settings, rate=rate), report
                )
            basis, mix, transform = _finish(problem, basis, mix, sigma, settings, metric)
            break
        except SingularError as e:
            reason = e
    else:
        raise MobeError(
            f"{label}: the fit diverged {ATTEMPTS} times, at last with learning rate {rate:g} "
            f"({reason}). Try another --seed, fewer --bases or a smaller --rank."
        )
    sums = _residuals(w, weighted, basis.float(), mix, transform, sigma, metric, settings)
    return basis.cpu(), mix.cpu(), transform.cpu(), sums, steps


def _fit_linear(
    problem: Projected,
    basis: torch.Tensor,
    mix: torch.Tensor,
    settings: Settings,
    report: Callable[[float, float], None],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Fit the linear form with few bases, see :mod:`linear`.

    The mixes start with noise; otherwise every expert stays with its run's basis for a long time (slices, m 2 r 320, 40
    iterations: 0.043 without it, 0.026 with 0.3; synthetic experts, 30 iterations: 0.0724 with 0.3, 0.0719 with 1).  The result is put in the gauge in which rounding costs least, :mod:`gauge`.

    Bases that will be rounded are rounded during some last steps of Adam, as in :func:`_descend`, unless export rounds them.
    """
    noise = torch.randn(mix.shape, generator=torch.Generator().manual_seed(settings.seed + 1))
    ridged = replace(problem, ridge=_rounding_ridge(settings))
    start = mix + LINEAR_NOISE * noise.to(mix)
    basis, mix, steps = fit_linear(ridged, basis, start, settings.steps, report)
    basis = flat_gauge(ridged.transform(basis, mix), basis, mix, problem.metric, settings.seed)
    if settings.basis_type is None or _rounded_by_export(settings, problem.metric):
        return basis, mix, steps
    basis = basis * (START_SCALE / basis.std())
    last = replace(settings, steps=min(settings.steps, LAST_STEPS), rate=LAST_RATE)
    basis, mix, more = _descend(problem, basis, mix, last, lambda _, error: report(1.0, error))
    return basis, mix, steps + more


def _rounded_by_export(settings: Settings, metric: Metric) -> bool:
    """Whether to leave the rounding of factors to export.

    With full second moments, export rounds the factors of a linear form by these (``export/basis_rounding.py``) and solves
    for A again.  That loses less than rounding here to values that its encoder keeps.  (Shipped model, m 2 r 128, B q4_k and
    A q5_0, gate and up alone: KL divergence 0.0043, unrounded 0.0040, rounded to nearest 0.0092.)
    """
    full = metric.per_expert and metric.root is not None and metric.root.dim() == 3
    return full and settings.activation == "none" and settings.mix == "scalar" and not settings.transposed


def _weigh(x: torch.Tensor, metric: Metric, settings: Settings) -> torch.Tensor:
    """``x`` ``[n, p, d]`` in the metric of its inputs: applied to columns, or to rows if the problem is transposed."""
    return metric.apply_rows(x) if settings.transposed else metric.apply(x)


def _weighed(w: torch.Tensor, metric: Metric, settings: Settings) -> torch.Tensor:
    """All of w in the metric, one expert at a time: besides w and the result, memory holds one expert."""
    out = None
    for i in range(len(w)):
        s = slice(i, i + 1)
        x = _weigh(w[s], metric.slice(s, w), settings)
        if out is None:
            out = x.new_empty(len(w), *x.shape[1:])
        out[s] = x
    assert out is not None
    return out


def _finish(
    problem: Projected,
    basis: torch.Tensor,
    mix: torch.Tensor,
    sigma: float,
    settings: Settings,
    metric: Metric,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B, alpha and A as stored: B is rounded first, then A is solved for the rounded B.

    If the error of outputs is minimised, A is scaled up so that outputs keep their size.  Least squares makes each expert's
    output smaller by the error, and this adds up over the experts.  (KL divergence 0.0076 without, 0.0070 with; row by row
    0.0069.)
    """
    settles = not _rounded_by_export(settings, metric)
    if settings.basis_type and settles:
        basis = settled(basis, settings.basis_type, settings.transposed)
    basis = basis.to(settings.dtype)
    problem = replace(problem, ridge=_rounding_ridge(settings))
    full_size = metric.root is not None
    transform = problem.transform(basis.float(), mix, full_size).mul_(sigma)
    if settings.activation == "none":
        mix = balance(transform, mix)
    # one block at a time, in place where the type allows it: A may be as large as W
    stored = transform
    if settings.dtype != transform.dtype:
        stored = torch.empty_like(transform, dtype=settings.dtype)
    for s in problem.blocks():
        a = transform[s]
        if settings.transposed:
            a = metric.slice(s, a).solve_rows(a)
        if settings.transform_type and settles:
            a = settled(a, settings.transform_type, settings.transposed)
        stored[s] = a
    return basis, mix, stored


def _rounding_ridge(settings: Settings) -> float:
    """The ridge for an A that will be rounded: the relative error of its type.

    Independent noise of that size on A costs ridge |A|^2 trace(Z Z^T) / r on average.  The ridge adds exactly this term to
    the loss.  So the steps minimise the error expected after rounding and stay differentiable.
    """
    return max(settings.ridge, noise(settings.transform_type)) if settings.transform_type else settings.ridge


def _descend(
    problem: Projected,
    basis: torch.Tensor,
    mix: torch.Tensor,
    settings: Settings,
    report: Callable[[float, float], None],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Adam with a rate that rises, then falls; returns the best basis and mix seen, and the steps taken.

    ``phase`` runs from 0 to 1 through the schedule.  At a plateau it jumps to the decay, where much of the gain is; the decay
    then takes as many steps as it took to detect the plateau.  From STRICT_FROM on, factors are rounded and terms are few, and
    the search for the best restarts: better results without these constraints do not count.
    """
    basis, mix, steps = basis.clone(), mix.clone(), settings.steps
    basis.grad, mix.grad = torch.empty_like(basis), torch.empty_like(mix)
    adam = Adam([basis, mix], BETAS)
    best, best_basis, best_mix = math.inf, basis.clone(), mix.clone()
    patience = max(steps // 10, PATIENCE)
    rate = settings.rate * min(1.0, (FULL_RATE_STEPS / steps) ** 0.5)
    mark, mark_step = math.inf, 0
    phase, pace, step = 0.0, 1.0 / steps, 0
    waiting = bool(settings.basis_type or settings.transform_type or settings.mix_terms)
    basis_type = kept = None
    while True:
        if waiting and phase >= STRICT_FROM:
            waiting, basis_type = False, settings.basis_type
            if settings.mix_terms:
                kept = _strongest(mix, basis, settings.mix_terms)
                mix.mul_(kept)
            problem = replace(problem, ridge=_rounding_ridge(settings))
            best, mark, mark_step, pace = math.inf, math.inf, step, 1.0 / steps
        seen = rounded(basis, basis_type, settings.transposed) if basis_type else basis
        loss = problem.loss_and_gradient(seen, mix, basis.grad, mix.grad)
        if loss < best:
            best = loss
            best_basis.copy_(basis)
            best_mix.copy_(mix)
        report(min(phase, 1.0), best / problem.mean_square)
        if not waiting and (phase >= 1.0 - 1e-9 or best < EXACT):
            return best_basis, best_mix, step
        if step >= mark_step + patience:
            if best > mark * (1 - PLATEAU):
                if not waiting:
                    phase = max(phase, 1.0 - DECAY)
                pace = max(pace, (1.0 - phase) / patience)
            mark, mark_step = best, step
        share = min((phase + 1.0 / steps) / RAMP, 1.0, max(0.0, 1.0 - phase) / DECAY)
        adam.step(rate * share)
        if kept is not None:
            mix.mul_(kept)
        step += 1
        phase += pace


def _strongest(mix: torch.Tensor, basis: torch.Tensor, terms: int) -> torch.Tensor:
    """A mask in the shape of mix: 1 for the ``terms`` bases that add most to each expert, by the norm of ``alpha_ij B_j``,
    0 for the others."""
    squares = basis.square().sum(1 if mix.dim() == 4 else 2)  # [m, r], or [m, d] for a column-wise mix
    size = (
        mix.square().flatten(2) * squares
        if mix.dim() > 2
        else mix.square()[:, :, None] * squares.sum(-1)[:, None]
    )
    size = size.sum(-1)  # [n, m]
    kept = torch.zeros_like(size).scatter_(1, size.topk(terms, dim=1).indices, 1.0)
    return kept.view(*kept.shape, *[1] * (mix.dim() - 2))


def _place(
    w: torch.Tensor, settings: Settings, metric: Metric, device: torch.device, block: int | None
) -> Projected:
    """The problem, with W on ``device`` if it fits there and a block size that fits in memory."""
    n, p, d = w.shape
    r = settings.rank
    per_expert = block_bytes(1, p, d, r)
    if device.type == "cuda":
        # B, its gradient, Adam's two moments, the best so far, and one to spare
        parameters = 6 * 4 * (settings.n_basis // settings.n_group) * r * d
        torch.cuda.empty_cache()  # memory that torch caches from the last unit would count as used
        free = torch.cuda.mem_get_info(device)[0] - parameters
        if 4 * w.numel() < 0.7 * free:
            w = w.to(device)
            free -= 4 * w.numel()
        else:
            per_expert += 4 * p * d
        size = int(0.6 * free) // per_expert
    else:
        size = cpu_block(n, p, d, r)
    return Projected(w, settings.activation, metric, settings.ridge, block or max(1, min(n, size)))


def block_bytes(experts: int, p: int, d: int, r: int) -> int:
    """Bytes of a step for this many experts of ``p x d`` in the metric."""
    return 4 * experts * (6 * r * d + 3 * p * r + 4 * r * r)


def cpu_block(n: int, p: int, d: int, r: int) -> int:
    """Experts in a block on the CPU.

    Blocks that fit in the cache are fastest (4 ms of 22 saved per step on the tiny model).  But each block reads all bases and
    their gradient again, so blocks have at least eight experts unless these are huge.
    """
    one = block_bytes(1, p, d, r)
    return max(1, min(n, BLOCK_BYTES // one, max(8, CACHE_BYTES // one)))


def _residuals(
    w: torch.Tensor,
    weighted: torch.Tensor,
    basis: torch.Tensor,
    mix: torch.Tensor,
    transform: torch.Tensor,
    sigma: float,
    metric: Metric,
    settings: Settings,
) -> tuple[float, float, float, float]:
    """|W - W'|^2, |W|^2, and both in the metric, one expert at a time, as float64 sums of float32 products.

    ``transform``: as stored, for the matrices before division by ``sigma``.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for i in range(w.shape[0]):
        s = slice(i, i + 1)
        wi, wm = w[s].to(basis.device), weighted[s].to(basis.device)
        a = transform[s].float() / sigma
        rest = wi - a.to(basis.device) @ activate(combine(mix[s], basis), settings.activation)
        scaled = _weigh(rest, metric.slice(s, basis), settings)
        total += torch.stack([x.square().sum(dtype=torch.float64) for x in (rest, wi, scaled, wm)]).cpu()
    a, b, c, e = total.tolist()
    return a, b, c, e
