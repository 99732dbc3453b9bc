"""Fitting the factors of one stack of experts: Adam on basis and mix of the projected problem.

What was tried and measured, relative error after 300 steps on (a) slices of a real FFN (SmolLM2-135M-Instruct layer 10
gate as 12 experts of 128 x 576, m 4, r 128) and (b) a layer of a trained MoE (24 experts of 96 x 256, m 6, r 96):

- Adam's usual betas: (a) 0.157, 0.148 and 0.159 at rates 0.03, 0.1 and 0.3; betas (0.9, 0.95) 0.144; (0.8, 0.95) 0.139; (0.5,
  0.95) 0.141, all at rate 0.1; at rate 0.2 0.137.  (b) 0.0479, 0.0451, 0.0433 and 0.0433 at rates 0.05, 0.1, 0.2 and 0.3.
- Bases that start at a standard deviation of 0.1 / 0.25 / 0.5: much the same.  tanh / silu / none: (b) 0.0451 / 0.0472 / 0.0505.
- Muon on the bases: (a) 0.143 at nearly twice the time a step; L-BFGS: 0.159 at best.

Rounded factors, (b), 100 steps, error of the rounded factors for q4_k (A: q5_0) / q3_k (A: q4_0); unrounded 0.054:

- rounded as they are 0.122 / 0.345; A solved again for the rounded bases 0.091 / 0.164;
- bases rounded in the steps from 0, 15, 30, 50, 70 % on: 0.0776, 0.0759, 0.0750, 0.0743, 0.0763 / 0.1106, 0.1054, 0.1045,
  0.1055, 0.1109;
- A is not rounded in them but solved with a ridge of its rounding's size (see ``_rounding_ridge``): doing both
  0.0751 / 0.1044, rounding A without the ridge 0.0754 / 0.1065.  A last stretch of steps with the bases fixed: worse;
- A rounded column by column, the others making up for it (GPTQ with the scales of the first rounding): 0.0736 for 0.0745 / 0.1034
  for 0.1051, and only for the legacy types: not done.  The bases' rounding is most of the loss, 0.0713 of 0.0745.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mobe_gguf.errors import MobeError, UsageError
from mobe_gguf.factorize.metric import Metric
from mobe_gguf.factorize.projected import Projected, SingularError
from mobe_gguf.factorize.rounding import noise, resolve, rounded, settled
from mobe_gguf.factorize.start import initial_basis, initial_mix
from mobe_gguf.formula import activate, combine
from mobe_gguf.names import ACTIVATIONS

#: Standard deviation that the bases start with; W has 1.
START_SCALE = 0.25
BETAS = (0.8, 0.95)
WARMUP = 10
#: Steps are cut short when the best loss falls by less than this share in a tenth of the run.
PLATEAU = 1e-3
#: Share of the run after which what is asked of the result holds in every step: rounded bases, few terms.
STRICT_FROM = 0.4
#: Loss per element (W has variance 1) that float32 cannot tell from zero.
EXACT = 1e-9
#: A diverging fit is tried again at a quarter of the rate, this often in all.
ATTEMPTS = 3

#: On the CPU, what a block of experts may take at most, and what it should take.
BLOCK_BYTES = 512 << 20
CACHE_BYTES = 8 << 20

MIXES = ("scalar", "row")


@dataclass(frozen=True)
class Settings:
    """What to fit, and how.  ``n_basis`` and ``n_group`` count over the whole layer; ``rank`` <= p, d.

    ``mix``: ``scalar`` is one weight for each expert and basis, ``row`` one for each row of the basis.
    ``ridge``: relative to the mean of the Gram matrix's diagonal.  ``dtype``: type that A and B are stored in; B is
    rounded to it before A is solved for the last time.  ``basis_type``, ``transform_type``: ggml types that they will be
    exported in, None if that is not known; see :meth:`resolved`.  ``mix_terms``: bases that an expert may mix at most.
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
    basis_type: str | None = None
    transform_type: str | None = None
    mix_terms: int | None = None

    def resolved(self, d: int) -> Settings:
        """The same with the types that rows of d values (basis) and of rank values (A) can have, by export's rule.

        UsageError if there is none, or the stored type cannot hold their values.
        """
        basis = self.basis_type and resolve("--for-basis", self.basis_type, d)
        transform = self.transform_type and resolve("--for-transform", self.transform_type, self.rank)
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
        if self.mix_terms is not None and not 1 <= self.mix_terms <= m // g:
            raise UsageError(
                f"--mix-terms {self.mix_terms}: an expert has {m // g} bases to mix; expected 1 to {m // g}"
            )
        self.resolved(d)


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
    settings = settings.resolved(d)
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

        parts.append(
            _fit_group(group, sigma, settings, group_metric, torch.device(device), block, label, report)
        )
    bases, mixes, transforms, sums, steps = zip(*parts, strict=True)
    error, norm, objective, objective_norm = (sum(s[i] for s in sums) for i in range(4))
    return Factors(
        torch.cat(bases),
        torch.cat(mixes),
        torch.cat(transforms),
        error / norm,
        objective / objective_norm,
        max(steps),
        time.monotonic() - start,
    )


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
    """One group of experts w, divided by ``sigma``: ``(B, alpha, A, sums of squares, steps)``, as they are stored."""
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
        rate = settings.rate / 4**attempt
        try:
            basis, mix, steps = _descend(
                problem, basis0, mix0.to(device), replace(settings, rate=rate), report
            )
            basis, transform = _finish(problem, basis, mix, sigma, settings)
            break
        except SingularError as e:
            reason = e
    else:
        raise MobeError(
            f"{label}: the fit diverged {ATTEMPTS} times, at last with learning rate {rate:g} "
            f"({reason}). Try another --seed, fewer --bases or a smaller --rank."
        )
    sums = _residuals(w, weighted, basis.float(), mix, transform.float() / sigma, metric, settings.activation)
    return basis.cpu(), mix.cpu(), transform.cpu(), sums, steps


def _finish(
    problem: Projected, basis: torch.Tensor, mix: torch.Tensor, sigma: float, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A as they are stored: B first, A solved for what became of B."""
    basis = settled(basis, settings.basis_type) if settings.basis_type else basis.to(settings.dtype)
    problem = replace(problem, ridge=_rounding_ridge(settings))
    transform = problem.transform(basis.float(), mix).mul_(sigma)
    if settings.transform_type:
        return basis, settled(transform, settings.transform_type)
    return basis, transform.to(settings.dtype)


def _rounding_ridge(settings: Settings) -> float:
    """The ridge with which A is solved for when it will be rounded: the type's relative error.

    Independent noise of that size on A costs ridge |A|^2 trace(Z Z^T) / r on average, and that is just the term that
    the ridge adds to the loss: the steps then minimise the error expected after rounding, and stay differentiable.
    """
    return max(settings.ridge, noise(settings.transform_type)) if settings.transform_type else settings.ridge


def _descend(
    problem: Projected,
    basis: torch.Tensor,
    mix: torch.Tensor,
    settings: Settings,
    report: Callable[[float, float], None],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Adam with warm-up and cosine decay; returns the best basis and mix seen, and the steps taken.

    ``phase`` runs from 0 to 1 through the schedule; a plateau makes it run faster, so that the rate still decays,
    which is where much of the gain is.  From STRICT_FROM on the problem is that of rounded factors and few terms, and
    "best" begins anew: what was better without these does not count.
    """
    basis, mix, steps = basis.clone(), mix.clone(), settings.steps
    basis.grad, mix.grad = torch.empty_like(basis), torch.empty_like(mix)
    adam = torch.optim.Adam([basis, mix], lr=settings.rate, betas=BETAS)
    best, best_basis, best_mix = math.inf, basis.clone(), mix.clone()
    patience = max(steps // 10, 2 * WARMUP)
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
        seen = rounded(basis, basis_type) if basis_type else basis
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
                pace = max(pace, (1.0 - phase) / patience)
            mark, mark_step = best, step
        warm = min(1.0, (step + 1) / WARMUP)
        adam.param_groups[0]["lr"] = settings.rate * warm * 0.5 * (1.0 + math.cos(math.pi * phase))
        adam.step()
        if kept is not None:
            mix.mul_(kept)
        step += 1
        phase += pace


def _strongest(mix: torch.Tensor, basis: torch.Tensor, terms: int) -> torch.Tensor:
    """1 for the ``terms`` bases that add most to each expert, by the norm of ``alpha_ij B_j``, 0 for the others: as mix."""
    rows = basis.square().sum(-1)  # [m, r]
    size = mix.square() * (rows if mix.dim() == 3 else rows.sum(-1))
    size = size.sum(-1) if mix.dim() == 3 else size  # [n, m]
    kept = torch.zeros_like(size).scatter_(1, size.topk(terms, dim=1).indices, 1.0)
    return kept[:, :, None] if mix.dim() == 3 else kept


def _place(
    w: torch.Tensor, settings: Settings, metric: Metric, device: torch.device, block: int | None
) -> Projected:
    """The problem with W on ``device`` if it fits there, and the block size that memory allows."""
    n, p, d = w.shape
    r = settings.rank
    per_expert = 4 * (6 * r * d + 3 * p * r + 4 * r * r)
    if device.type == "cuda":
        # B, its gradient, Adam's two moments, the best so far, and one to spare
        parameters = 6 * 4 * (settings.n_basis // settings.n_group) * r * d
        free = torch.cuda.mem_get_info(device)[0] - parameters
        if 4 * w.numel() < 0.7 * free:
            w = w.to(device)
            free -= 4 * w.numel()
        else:
            per_expert += 4 * p * d
        size = int(0.6 * free) // per_expert
    else:
        # What stays in the cache is quickest (4 ms of 22 saved a step of the tiny model), but each block reads all
        # bases and their gradient once more, so no less than eight experts unless they are huge.
        size = min(BLOCK_BYTES // per_expert, max(8, CACHE_BYTES // per_expert))
    return Projected(w, settings.activation, metric, settings.ridge, block or max(1, min(n, size)))


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
