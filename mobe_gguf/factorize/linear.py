"""Fitting the linear form, ``W_i ~ A_i sum_j alpha_ij B_j``, with few bases: L-BFGS, preconditioned by alternating least
squares.

Without an activation each of A, alpha and the bases is a least-squares problem while the others are fixed.  Alternating
between them stalls early, at a third more error than gradient steps reach, because it ignores that A follows.  The curvature
of the projected problem (:mod:`mobe_gguf.core.projected`) without second derivatives (Kaufman 1975) is

    sum_i  alpha_i alpha_i^T (x) A_i^T A_i (x) R_i (1 - P_i) R_i^T,   P_i the projector on the rows of Z_i R_i,

The product of the sums' means, ``M [m r, m r]`` times ``C [d, d]``, can be inverted, and L-BFGS (Nocedal 1980) uses this
inverse as its first guess.  (Without P, a step is one sweep of the alternation.)

If all experts have one metric (no weights, or down), two identities make an evaluation cheap:

- ``Z_i Z_i^T = sum_jk alpha_ij alpha_ik B_j B_k^T``: the bases' products with each other, computed once, give all experts'
  Gram matrices;
- ``sum_i alpha_ij (A_i^T A_i) Z_i`` needs only m^2 products of accumulated matrices with bases, for all experts together.

What remains for each expert is two products of p r d, one of p r r and a Cholesky factor: less than half of the work of a
step of :mod:`mobe_gguf.core.projected`.

Tried and left out: Gauss-Newton with conjugate gradients (docs/factorizer.md); first iterations on random combinations of
each expert's rows, ``Q W_i`` (n 128, 16 of 96 rows: the small problem is fitted to half the error, but the real one must then
be fitted from the beginning).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mobe_gguf.core.formula import combine
from mobe_gguf.core.metric import Metric
from mobe_gguf.core.projected import Projected, SingularError, combine_gradient

#: Largest number of bases of a group for which this solver is used: M has m^2 r^2 elements.
MOST_BASES = 8
#: Number of (step, gradient) pairs that L-BFGS keeps.
MEMORY = 5
#: Maximum number of iterations.
LONGEST = 100
#: The preconditioner is recomputed after these iterations, and then after every tenth.
REFRESH = (1, 2, 4, 6, 9, 12, 16, 20)
#: Added to the diagonal of ``columns``, relative to its mean, for directions that the bases of all experts already span.
COLUMNS = 0.2
#: Added to M's diagonal, relative to its mean.
DAMPING = 1e-5
#: An iteration must reduce the loss by this share, averaged over some iterations; otherwise the stage ends.
PLATEAU, WINDOW = 5e-4, 5
#: A Gram matrix is computed in strips of at least this many columns, each from the diagonal on.
MIN_STRIP = 128
#: Bytes for a block of experts.  The memory of a larger block is needed for L-BFGS's pairs.
BLOCK_BYTES = 128 << 20

Pair = tuple[torch.Tensor, torch.Tensor]


def _dot(a: Pair, b: Pair) -> float:
    return sum(float(x.flatten().dot(y.flatten())) for x, y in zip(a, b, strict=True))


@dataclass
class LinearPoint:
    """Bases and mix with their ``loss`` relative to |W|^2, its gradient, and the data for M."""

    basis: torch.Tensor
    mix: torch.Tensor
    loss: float
    gradient: Pair
    curvature: Curvature | None = None


@dataclass
class Curvature:
    """The data for a preconditioner.  ``bases`` ``[m, r, m, r]``: M.  ``columns`` ``[d, d]``: C, the experts' mean second moment
    of the inputs outside the span of their Z.  ``mixes`` ``[n, m, m]``.
    """

    bases: torch.Tensor
    columns: torch.Tensor
    mixes: torch.Tensor


class _Sums:
    """What an evaluation adds up over the experts.

    ``bases`` ``[m, m, r, r]``: sum of ``alpha_ij alpha_ik (A^T A + ridge)``, k <= j, if anyone asks for it.  ``target``
    ``[m, r, d]``: the bases' gradient; with ``pairs`` ``[m, r, m, r]``, the bases' products with each other, the part that
    ``bases`` does not give.
    """

    def __init__(self, basis: torch.Tensor, mix: torch.Tensor, shared: bool, curved: bool):
        m, r, d = basis.shape
        n = len(mix)
        self.basis, self.mix, self.loss = basis, mix, 0.0
        flat = basis.view(m * r, d)
        self.pairs = (flat @ flat.T).view(m, r, m, r) if shared else None
        self.bases = basis.new_zeros(m, m, r, r) if shared or curved else None
        self.target, self.to_mix = torch.zeros_like(basis), torch.empty_like(mix)
        self.columns = basis.new_zeros(d, d) if curved else None
        self.mixes = mix.new_empty(n, m, m)

    def add_bases(self, mix: torch.Tensor, own: torch.Tensor) -> None:
        """Add a block's ``A^T A`` ``[n, r, r]`` to ``bases``."""
        assert self.bases is not None
        for j in range(len(self.bases)):
            for k in range(j + 1):
                weights = (mix[:, j] * mix[:, k])[None]
                self.bases[j, k].view(1, -1).addmm_(weights, own.flatten(1))

    def point(self, square: float) -> LinearPoint:
        """The sums as a point, with the loss relative to ``square``."""
        m, r, d = self.basis.shape
        bases = self.bases
        if bases is not None:
            for j in range(m):
                for k in range(j + 1, m):
                    bases[j, k] = bases[k, j]
            bases = bases.transpose(1, 2).contiguous()
        if self.pairs is not None:
            assert bases is not None
            self.target.view(m * r, d).addmm_(bases.view(m * r, m * r), self.basis.view(m * r, d))
        curvature = None
        if self.columns is not None and bases is not None:
            seen = -(-len(self.mix) // column_stride(len(self.mix)))
            curvature = Curvature(bases, self.columns.div_(seen), self.mixes)
        return LinearPoint(self.basis, self.mix, self.loss / square, (self.target, self.to_mix), curvature)


@dataclass
class LinearProblem:
    """The projected problem of the linear form.  ``w`` ``[n, p, c]``: in the metric.  ``block``: experts processed at once."""

    w: torch.Tensor
    metric: Metric
    ridge: float
    block: int
    square: float = field(init=False)

    def __post_init__(self) -> None:
        self.square = sum(float(x.square().sum(dtype=torch.float64)) for x in self.w)

    def at(self, basis: torch.Tensor, mix: torch.Tensor, curved: bool = False) -> LinearPoint:
        """Evaluate at one point, with the curvature if ``curved``.  SingularError if a Gram matrix cannot be factorized."""
        m, r, d = basis.shape
        n = len(mix)
        sums = _Sums(basis, mix, self.metric.root is None and m * (m + 1) <= max(n, 6), curved)
        for first in range(0, n, self.block):
            s = slice(first, min(first + self.block, n))
            metric, w = self.metric.slice(s, basis), self.w[s].to(basis.device)
            (self._add_by_pairs if sums.pairs is not None else self._add)(sums, s, w, metric)
        if not math.isfinite(sums.loss):
            raise SingularError("the loss is not finite")
        return sums.point(self.square)

    def _add(self, sums: _Sums, s: slice, w: torch.Tensor, metric: Metric) -> None:
        """A block of experts, from what is left of each: ``E = A Z - W``, ``dloss/dZ = A^T E + lambda Z``."""
        basis, a = sums.basis, sums.mix[s]
        zm = metric.apply(combine(a, basis))
        product = torch.bmm(w, zm.mT)
        transform, trace, factor = _solve(product, _gram(zm), self.ridge)
        rest = torch.baddbmm(w, transform, zm, beta=-1.0)
        squares = transform.square().sum((1, 2))
        sums.loss += _square(rest) + self.ridge * float(trace.double().dot(squares.double()))
        if sums.columns is not None:
            sums.add_bases(a, self._add_ridge(torch.bmm(transform.mT, transform)))
            _add_columns(sums.columns, metric, zm, factor, s.start, column_stride(len(self.w)))
            sums.mixes[s] = _curvature(transform, metric, basis)
        g = torch.bmm(transform.mT, rest)
        g.addcmul_(zm, (squares * (self.ridge / basis.shape[1]))[:, None, None])
        sums.to_mix[s] = combine_gradient(metric.adjoint(g), a, basis, sums.target)

    def _add_by_pairs(self, sums: _Sums, s: slice, w: torch.Tensor, metric: Metric) -> None:
        """A block of experts in one metric, by the bases' products with each other."""
        basis, a, pairs = sums.basis, sums.mix[s], sums.pairs
        assert pairs is not None
        zm = combine(a, basis)
        gram = torch.einsum("njk,jakb->nab", a[:, :, None] * a[:, None, :], pairs)
        product = torch.bmm(w, zm.mT)
        transform, _, factor = _solve(product, gram, self.ridge)
        own = torch.bmm(transform.mT, transform)
        sums.loss += self.square_of(s) - float(
            2 * transform.flatten().double().dot(product.flatten().double())
            - own.flatten().double().dot(gram.flatten().double())
        )
        self._add_ridge(own)
        sums.add_bases(a, own)
        if sums.columns is not None:
            _add_columns(sums.columns, metric, zm, factor, s.start, column_stride(len(self.w)))
        pull = torch.bmm(transform.mT, w)
        sums.target.view(len(basis), -1).addmm_(a.T, pull.flatten(1), alpha=-1.0)
        sums.mixes[s] = torch.einsum("nab,jakb->njk", own, pairs)
        sums.to_mix[s] = torch.einsum("njk,nk->nj", sums.mixes[s], a) - pull.flatten(1) @ basis.flatten(1).T

    def _add_ridge(self, own: torch.Tensor) -> torch.Tensor:
        """``A^T A`` ``[n, r, r]`` with the ridge's share, in place."""
        diagonal = own.diagonal(dim1=1, dim2=2)
        diagonal += self.ridge * diagonal.mean(1, keepdim=True)
        return own

    def square_of(self, experts: slice) -> float:
        return float(self.w[experts].square().sum(dtype=torch.float64))


def column_stride(n: int) -> int:
    """Every how many experts of n count in :attr:`Curvature.columns`: a mean of 32 is as good as one of all."""
    return max(1, n // 32)


def _add_columns(
    columns: torch.Tensor, metric: Metric, zm: torch.Tensor, factor: torch.Tensor, first: int, stride: int
) -> None:
    """Adds ``R (1 - P) R^T`` ``[d, d]`` of every ``stride``-th expert, P the projector on the rows of its Z in the metric;
    ``first``: the number of the block's first expert."""
    d = len(columns)
    for i in range(-first % stride, len(zm), stride):
        own = zm[i]
        at = metric.slice(slice(i, i + 1), zm) if metric.per_expert else metric
        if at.root is None:
            columns.diagonal().add_(1)
        else:
            _add_moment(columns, at.root[0] if metric.per_expert else at.root, at.rest)
        span = at.adjoint(torch.linalg.solve_triangular(factor[i], own, upper=False)[None])[0]
        columns.addmm_(span.view(-1, d).T, span, alpha=-1.0)


def _add_moment(total: torch.Tensor, root: torch.Tensor, rest: torch.Tensor | None) -> None:
    """Adds ``R R^T``."""
    if root.dim() == 1:
        total.diagonal().add_(root.square())
    else:
        total.addmm_(root, root.T)
    if rest is not None:
        total.diagonal().add_(rest[0].square())


def _gram(z: torch.Tensor) -> torch.Tensor:
    """``Z Z^T`` ``[n, r, r]``, on and below the diagonal; what is above it is not defined."""
    n, r, _ = z.shape
    step = max(MIN_STRIP, -(-r // 4))
    if step >= r:
        return torch.bmm(z, z.mT)
    out = z.new_empty(n, r, r)
    for i in range(0, r, step):
        out[:, i:, i : i + step] = torch.bmm(z[:, i:], z[:, i : i + step].mT)
    return out


def _square(x: torch.Tensor) -> float:
    return float(sum(part.square().sum(dtype=torch.float64) for part in x))


def _solve(product: torch.Tensor, gram: torch.Tensor, ridge: float) -> tuple[torch.Tensor, ...]:
    """``(A, mean of the diagonal, Cholesky factor of gram + ridge)``; adds the ridge to ``gram`` in place."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)
    diagonal += ridge * mean[:, None]
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.any():
        raise SingularError("a Gram matrix is singular")
    return torch.cholesky_solve(product.mT, factor).mT.contiguous(), mean, factor


def _curvature(transform: torch.Tensor, metric: Metric, basis: torch.Tensor) -> torch.Tensor:
    """<A B_j, A B_k> in the experts' metrics, ``[n, m, m]``, one expert at a time."""
    out = transform.new_empty(len(transform), len(basis), len(basis))
    for i, a in enumerate(transform):
        at = metric.slice(slice(i, i + 1), basis) if metric.per_expert else metric
        pulled = torch.stack([at.apply((a @ b)[None])[0].flatten() for b in basis])
        out[i] = pulled @ pulled.T
    return out


class _Preconditioner:
    """The inverse of M (x) columns for bases, and of each expert's own curvature for mixes."""

    def __init__(self, curvature: Curvature):
        m, r, _, _ = curvature.bases.shape
        self.left = _factor(curvature.bases.view(m * r, m * r))
        self.right = _factor(curvature.columns, COLUMNS)
        self.own = torch.stack([_factor(c, 1e-3) for c in curvature.mixes])

    def __call__(self, gradient: Pair) -> Pair:
        basis, mix = gradient
        x = torch.cholesky_solve(basis.flatten(0, 1), self.left)
        x = torch.cholesky_solve(x.mT.contiguous(), self.right).mT
        return x.reshape(basis.shape), torch.cholesky_solve(mix[:, :, None], self.own)[:, :, 0]


def _factor(matrix: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Cholesky factor of a positive semidefinite matrix, more damped until it has one; changes ``matrix``.

    Where the bases span everything, ``columns`` is zero up to rounding, of either sign: hence the magnitude.
    """
    diagonal = matrix.diagonal()
    mean = float(diagonal.abs().mean())
    for _ in range(6):
        diagonal += damping * mean + 1e-30
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not info:
            return factor
        damping *= 10
    raise SingularError("the bases' least-squares problem is singular")


def suits(activation: str, mix: str, n_basis: int, mix_terms: int | None) -> bool:
    """Whether this solver fits a group with this form and number of bases."""
    return activation == "none" and mix == "scalar" and n_basis <= MOST_BASES and mix_terms is None


def linear_block(block: int, p: int, c: int, r: int) -> int:
    """Number of experts of ``p x c`` (in the metric) to process at once, at most ``block``."""
    return max(1, min(block, BLOCK_BYTES // expert_bytes(p, c, r)))


def expert_bytes(p: int, c: int, r: int) -> int:
    """Bytes of an evaluation for one expert of ``p x c`` in the metric: Z, Z in the metric, the gradient; what is left of W; A and
    W Z^T; Gram matrix, its factor, A^T A and one to spare."""
    return 4 * (4 * r * c + p * c + 3 * p * r + 4 * r * r)


def fit_bytes(m: int, r: int, d: int) -> int:
    """Bytes of the fit besides a block: B at the start, at the point and after it, with their gradients; the pairs; the
    direction and its intermediate results; M, its factor, and the bases' products; C and its factor."""
    return 4 * ((2 * MEMORY + 9) * m * r * d + 5 * m * m * r * r + 3 * d * d)


def fit_linear(
    problem: Projected,
    basis: torch.Tensor,
    mix: torch.Tensor,
    steps: int,
    report: Callable[[float, float], None],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Minimise from ``basis`` ``[m, r, d]`` and ``mix`` ``[n, m]``; returns both and the iterations taken.

    ``steps``: maximum number of iterations, itself limited to LONGEST.  ``report(share done, relative loss)`` is called after
    each.
    """
    iterations = min(steps, LONGEST)
    block = linear_block(problem.block, problem.w.shape[1], problem.w.shape[2], basis.shape[1])
    whole = LinearProblem(problem.w, problem.metric, problem.ridge, block)
    last = math.nan

    def seen(step: int, loss: float) -> None:
        nonlocal last
        last = loss
        report(step / iterations, loss)

    found = _minimise(whole, basis, mix, iterations, seen)
    report(1.0, last)
    return found


def _whitened(basis: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """The bases in the gauge in which M's diagonal blocks sum to the identity.  A takes the inverse; errors do not change."""
    factor = _factor(curvature.bases.diagonal(dim1=0, dim2=2).mean(-1))
    out = torch.matmul(factor.T, basis)
    return out.mul_(1 / out.std())


def _minimise(
    problem: LinearProblem,
    basis: torch.Tensor,
    mix: torch.Tensor,
    iterations: int,
    report: Callable[[int, float], None],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """L-BFGS with the preconditioner of a recent point as first guess; stops when there is no more progress."""
    point = problem.at(basis, mix, True)
    assert point.curvature is not None
    point = problem.at(_whitened(basis, point.curvature), mix, True)
    memory: deque[tuple[Pair, Pair, float]] = deque(maxlen=MEMORY)
    losses = [point.loss]
    for step in range(1, iterations + 1):
        if point.curvature is not None:
            precondition, point.curvature = _Preconditioner(point.curvature), None
        direction = _direction(point, memory, precondition)
        slope = _dot(point.gradient, direction)
        new = _search(problem, point, direction, slope, step in REFRESH or step % 10 == 0)
        if new is None:
            if not memory:
                break
            memory.clear()
            continue
        moved = new.basis - point.basis, new.mix - point.mix
        change = new.gradient[0] - point.gradient[0], new.gradient[1] - point.gradient[1]
        if (product := _dot(moved, change)) > 0:
            memory.append((moved, change, product))
        point = new
        losses.append(point.loss)
        report(step, point.loss)
        if len(losses) > WINDOW and losses[-1 - WINDOW] - point.loss < WINDOW * PLATEAU * point.loss:
            break
    return point.basis, point.mix, len(losses) - 1


def _direction(
    point: LinearPoint, memory: deque[tuple[Pair, Pair, float]], precondition: _Preconditioner
) -> Pair:
    """The direction of L-BFGS, by its two-loop recursion."""
    q = point.gradient[0].clone(), point.gradient[1].clone()
    shares = []
    for moved, change, product in reversed(memory):
        share = _dot(moved, q) / product
        shares.append(share)
        for x, y in zip(q, change, strict=True):
            x.add_(y, alpha=-share)
    q = precondition(q)
    if memory:
        _, change, product = memory[-1]
        scale = product / _dot(change, precondition(change))
        for x in q:
            x.mul_(scale)
    for (moved, change, product), share in zip(memory, reversed(shares), strict=True):
        correction = share - _dot(change, q) / product
        for x, y in zip(q, moved, strict=True):
            x.add_(y, alpha=correction)
    return q[0].neg_(), q[1].neg_()


def _search(
    problem: LinearProblem, point: LinearPoint, direction: Pair, slope: float, curved: bool
) -> LinearPoint | None:
    """The first point along ``direction`` that reduces the loss enough, with repeatedly halved steps; None if none does."""
    step = 1.0
    for _ in range(6):
        try:
            new = problem.at(point.basis + step * direction[0], point.mix + step * direction[1], curved)
        except SingularError:
            new = None
        if new is not None and new.loss <= point.loss + 1e-4 * step * slope / problem.square:
            return new
        step *= 0.4
    return None
