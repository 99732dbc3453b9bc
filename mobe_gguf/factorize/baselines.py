"""The methods with which MoBE's paper compares, at the same number of parameters: ``--method svd|molae|d2moe``.

- ``svd``: each expert alone, W_i = A_i B_i, by truncated SVD.
- ``molae`` (arXiv 2503.23100): one latent B for all experts of a layer, W_i = A_i B, from the SVD of the stacked experts.
- ``d2moe`` (arXiv 2502.17298): W_i = a shared base + U_i V_i.  The base is a weighted mean of the experts; the differences
  are truncated.  The paper weighs by Fisher information, which needs gradients of the model.  Here the weight is the second
  moment of the expert's inputs and how often it is used; without an imatrix it is the plain mean.  The paper's pruning of
  the base is left out.

With an imatrix all methods minimise the error of the outputs (activation-aware SVD), like MoBE itself.  ``svd`` and
``molae`` are stored as MoBE without activation: m = n with an identity for alpha, and m = 1.  ``d2moe`` writes the resulting
matrices as an ordinary checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.metric import FLOOR, Metric, Roots
from mobe_gguf.core.projected import Projected
from mobe_gguf.factorize.methods import D2MOE, MOLAE, SVD, Method, method_named
from mobe_gguf.factorize.solver import Factors

#: Relative ridge of the last solve for A.  B is orthogonal except for rounding, so only a basis of zeros needs it.
RIDGE = 1e-9


@dataclass(frozen=True)
class Baseline:
    """One method at one size.  ``kept``: parameters that represent a unit's experts.  ``stored``: how many numbers of the unit
    are written to the output.  ``memory``: bytes while a unit is computed.
    """

    method: Method
    rank: int
    kept: int
    stored: int
    memory: int

    @classmethod
    def within(cls, name: str, allowance: int, n: int, p: int, d: int) -> Baseline:
        """The largest rank at which experts ``[n, p, d]`` keep at most ``allowance`` parameters; UsageError if it is below 1."""
        method = method_named(name)
        fixed, each = method.fixed(n, p, d), method.each(n, p, d)
        rank = min((allowance - fixed) // each, method.most(p, d))
        if rank < 1:
            least = (fixed + each) / (n * p * d)
            raise UsageError(
                f"--method {name}: {allowance / (n * p * d):.3f} of the parameters are too few for experts of {p} x {d}; "
                f"it takes --target {least:.3f} at least"
            )
        kept = fixed + rank * each
        # the experts, the same in the metric, one decomposition in double precision; the result
        memory = 4 * 2 * n * p * d + 8 * 4 * p * d + method.memory(p, d) + 4 * kept
        return cls(method, int(rank), int(kept), int(kept) if method.is_factors else n * p * d, int(memory))

    def compress(
        self,
        w: torch.Tensor,
        *,
        weight: torch.Tensor | Roots | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Factors | Matrices:
        """Compress experts w, float32 ``[n, p, d]``; ``weight``: second moments of the inputs, see :meth:`Metric.of`."""
        n, _, d = w.shape
        start = time.monotonic()
        metric = Metric.of(weight, n, d)
        if not self.method.is_factors:
            matrices = DENSE[self.method](w, metric, self.rank, device).to(dtype)
            return Matrices(matrices, *_errors(w, matrices, metric), time.monotonic() - start)
        basis, mix = BASES[self.method](w, metric, self.rank, device)
        basis = basis.to(dtype)
        transform = _solve(w, basis.float(), metric, device).to(dtype)
        stacked = basis.expand(n, -1, -1)
        errors = _errors(w, (transform[i].float() @ stacked[i].float() for i in range(n)), metric)
        return Factors(basis, mix, transform, *errors, 0, time.monotonic() - start)


@dataclass
class Matrices:
    """The resulting experts ``[n, p, d]``, with the same errors as in :class:`Factors`."""

    matrices: torch.Tensor
    error: float
    objective: float
    seconds: float
    steps: int = 0


def _directions(x: torch.Tensor, metric: Metric, rank: int) -> torch.Tensor:
    """B ``[rank, d]``: ``x B^+ B`` is the best approximation of x ``[p, d]`` of that rank in the metric."""
    v = torch.linalg.svd(metric.apply(x[None])[0], full_matrices=False).Vh[:rank]
    return _unapply(metric, v).float().cpu() * x.shape[1] ** 0.5


def _truncated(x: torch.Tensor, metric: Metric, rank: int) -> torch.Tensor:
    """The best approximation of x ``[p, d]`` of that rank in the metric, float32."""
    u, s, v = torch.linalg.svd(metric.apply(x[None])[0], full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ _unapply(metric, v[:rank])).float()


def _own(metric: Metric, expert: int, like: torch.Tensor) -> Metric:
    """One expert's metric, with an invertible root ``[d]`` or ``[d, d]``, in the type of ``like``."""
    own = metric.slice(slice(expert, expert + 1), like)
    if own.root is None or not own.per_expert:
        return own
    return Metric(own.root[0]) if own.root.dim() == 2 else Metric(_root(_moment(own)))


def _shared(metric: Metric, n: int, like: torch.Tensor) -> Metric:
    """The mean of the experts' metrics, for a shared basis; in the form of :func:`_own`."""
    own = [metric.slice(slice(i, i + 1), like) for i in range(n)] if metric.per_expert else []
    if not own:
        return metric.slice(slice(0, 1), like)
    roots = [m.root for m in own if m.root is not None]
    if roots[0].dim() == 2:
        return Metric((_sum([root[0].square() for root in roots]) / n).sqrt())
    return Metric(_root(_sum([_moment(m) for m in own]) / n))


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    return sum(parts[1:], parts[0])


def _moment(metric: Metric) -> torch.Tensor:
    """S ``[d, d]`` of one expert's full metric."""
    assert metric.root is not None
    root = metric.root[0]
    s = root @ root.T
    return s if metric.rest is None else s + metric.rest[0].square().diag()


def _root(s: torch.Tensor) -> torch.Tensor:
    """R with ``R R^T = S``."""
    values, vectors = torch.linalg.eigh(s)
    return vectors * values.clamp_min(FLOOR).sqrt()


def _unapply(metric: Metric, x: torch.Tensor) -> torch.Tensor:
    """``x R^-1`` for x ``[a, d]`` and a metric of :func:`_own` or :func:`_shared`."""
    if metric.root is None:
        return x
    return x / metric.root if metric.root.dim() == 1 else torch.linalg.solve(metric.root.T, x.T).T


def _latent(w: torch.Tensor, metric: Metric, rank: int, device: str | torch.device) -> torch.Tensor:
    """B ``[rank, d]``: the strongest right singular directions of all experts' stacked rows.

    One B needs one metric: the mean of the experts' metrics.  Uses the d x d Gram matrix, summed one expert at a time.
    """
    n, _, d = w.shape
    gram = torch.zeros(d, d, dtype=torch.float64, device=device)
    shared = _shared(metric, n, gram)
    for i in range(n):
        x = shared.apply(w[i : i + 1].to(gram))[0]
        gram += x.T @ x
    directions = torch.linalg.eigh(gram).eigenvectors[:, -rank:].T.flip(0)
    return _unapply(shared, directions).float().cpu() * d**0.5


def _solve(w: torch.Tensor, basis: torch.Tensor, metric: Metric, device: str | torch.device) -> torch.Tensor:
    """The best A ``[n, p, r]`` for basis ``[n, r, d]`` (each expert's own) or ``[1, r, d]``, in the metric."""
    n = w.shape[0]
    out = torch.empty(n, w.shape[1], basis.shape[1])
    one = torch.ones(1, 1, device=device)
    for i in range(n):
        x = w[i : i + 1].to(device)
        own = _own(metric, i, x)
        b = basis[i : i + 1] if basis.shape[0] == n else basis
        out[i] = Projected(own.apply(x), "none", own, RIDGE, 1).transform(b.to(device), one)[0].cpu()
    return out


def _mean(w: torch.Tensor, metric: Metric) -> torch.Tensor:
    """D2-MoE's base ``[p, d]``, with the least total error for all experts, each in its own metric:
    ``(sum_i W_i S_i) (sum_i S_i)^-1``.
    """
    n, p, d = w.shape
    if metric.root is None or not metric.per_expert:
        return w.mean(0)
    full = metric.root.dim() == 3
    weighted = torch.zeros(p, d, dtype=torch.float64)
    total = torch.zeros((d, d) if full else (d,), dtype=torch.float64)
    for i in range(n):
        own = metric.slice(slice(i, i + 1), total)
        assert own.root is not None
        s = _moment(own) if full else own.root[0].square()
        weighted += w[i].double() @ s if full else w[i] * s
        total += s
    return (torch.linalg.solve(total, weighted.T).T if full else weighted / total).float()


def _errors(w: torch.Tensor, approximations: Iterable[torch.Tensor], metric: Metric) -> tuple[float, float]:
    """``(error, objective)`` of approximations ``[p, d]`` that arrive one after the other."""
    total = torch.zeros(4, dtype=torch.float64)
    for i, near in enumerate(approximations):
        own = metric.slice(slice(i, i + 1), w)
        rest = (w[i] - near.float())[None]
        pieces = (rest, w[i], own.apply(rest), own.apply(w[i : i + 1]))
        total += torch.stack([x.square().sum(dtype=torch.float64) for x in pieces])
    return float(total[0] / total[1]), float(total[2] / total[3])


def _base_and_differences(
    w: torch.Tensor, metric: Metric, rank: int, device: str | torch.device
) -> torch.Tensor:
    """d2moe: ``[n, p, d]``, the mean plus each expert's truncated difference from it."""
    matrices = torch.empty_like(w)
    base = _mean(w, metric)
    for i in range(w.shape[0]):
        x = (w[i] - base).to(device).double()
        matrices[i] = base + _truncated(x, _own(metric, i, x), rank).cpu()
    return matrices


def _own_bases(
    w: torch.Tensor, metric: Metric, rank: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """svd: a basis for each expert, ``[n, rank, d]``, and alpha."""
    n, _, d = w.shape
    basis = torch.empty(n, rank, d)
    for i in range(n):
        x = w[i].to(device).double()
        basis[i] = _directions(x, _own(metric, i, x), rank)
    return basis, torch.eye(n)


def _one_basis(
    w: torch.Tensor, metric: Metric, rank: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """molae: one basis, ``[1, rank, d]``, and alpha."""
    return _latent(w, metric, rank, device)[None], torch.ones(w.shape[0], 1)


#: Functions that compute the bases of methods stored as factors, and the matrices of the others.
BASES = {SVD: _own_bases, MOLAE: _one_basis}
DENSE = {D2MOE: _base_and_differences}
