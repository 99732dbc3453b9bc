"""The arithmetic of ``refit``: A and alpha of a block of experts for bases that stay as they are.

All matrices of a block are in the metric of the experts' inputs: W ``[n, p, d]``, Z = f(sum_j alpha_j B_j) ``[n, r, d]``.  For
each expert, with A0 the present A:

    A = A0 + argmin_D |W - (A0 + D) Z|^2 + anchor trace(Z Z^T) / r |D|^2          anchor = 0.03
    rows of A then scaled such that <a Z, w> = <w, w>

*The anchor* holds A near the best A for the unrounded bases.  The metric knows the channels' squares but not their
correlations, and A0 does better there (KL divergence 0.0203 instead of 0.0221 at q4_k, 0.0528 instead of 0.0579 at
q3_k).

*The scale*: least squares makes outputs too small, by as much as the error, in every expert of every layer.  Unlike
other errors, this does not average out.  On the shipped model KL divergence goes with ``error + 18 bias^2``.  The scale
lowers it from 0.071 to 0.022 at q4_k and from 0.278 to 0.058 at q3_k (unchanged A: 0.054, 0.256).  Hence :func:`cost`.
"""

from __future__ import annotations

import torch

from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.metric import Metric
from mobe_gguf.core.projected import SingularError, derivative_, solve_transform

#: Ridge of the change of A, relative to the mean of the Gram matrix's diagonal.
ANCHOR = 0.03

#: The same if full second moments are known; then it matters only for directions that no input has.
ANCHOR_BY_MOMENTS = 1e-3

#: Weight of a squared bias, relative to a squared error without bias.
BIAS = 16.0

#: Largest factor by which a row is scaled, up or down: scaling does not help a row that is hardly approximated at all.
MOST_SCALE = 2.0

#: Rows of A from which the matrix of the Gauss-Newton step is estimated; the gradient uses all rows.
SAMPLED_ROWS = 32

#: Added to the diagonal of that step's matrix, relative to its mean.
DAMPING = 1e-3


def squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each matrix of ``[n, a, b]``, float64."""
    return x.square().sum((1, 2), dtype=torch.float64)


def kept(w: torch.Tensor, a: torch.Tensor, zm: torch.Tensor) -> torch.Tensor:
    """``<a Z, w> / <w, w>`` of each row, ``[n, p]``: the share of its size that is kept; 1 for a row of zeros."""
    size = w.square().sum(-1)
    inner = (torch.bmm(a, zm) * w).sum(-1)
    return torch.where(size > 0, inner / size.clamp_min(torch.finfo(size.dtype).tiny), torch.ones_like(size))


def cost(w: torch.Tensor, a: torch.Tensor, zm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cost of each expert's A, ``|W - A Z|^2 + BIAS sum over rows (1 - kept)^2 |w|^2``, and its first term
    alone."""
    error = squares(w - torch.bmm(a, zm))
    bias = ((1 - kept(w, a, zm)).square() * w.square().sum(-1)).sum(-1, dtype=torch.float64)
    return error + BIAS * bias, error


def second_moments(zm: torch.Tensor) -> torch.Tensor:
    """diag of ``Z C Z^T`` ``[n, r]``, for ``zm = Z C^(1/2)``: mean squares of the inputs of A.

    Encoders refuse weights that are all zero, so an expert whose Z is zero gets ones.
    """
    moments = zm.square().sum(-1)
    return torch.where(moments.amax(-1, keepdim=True) > 0, moments, torch.ones_like(moments))


# wide: the operands of one equation
def solve(
    w: torch.Tensor,
    a0: torch.Tensor,
    zm: torch.Tensor,
    z: torch.Tensor,
    alpha: torch.Tensor,
    basis: torch.Tensor,
    metric: Metric,
    activation: str,
    anchor: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(A, alpha, Z)`` of a block of experts for fixed bases: A as above, after one step of alpha.

    ``z`` is ``zm`` without the metric; the returned Z is in the metric.  An expert keeps its alpha if the step does not
    help.  It also keeps an alpha with one value for each row: these are too many for one matrix.
    """
    anchor = ANCHOR if anchor is None else anchor
    change, loss = _change(w - torch.bmm(a0, zm), zm, anchor)
    if alpha.dim() == 2:
        new_alpha = step(w, a0 + change, zm, z, alpha, basis, metric, activation)
        new_zm = metric.apply(activate(combine(new_alpha, basis), activation))
        new_change, new_loss = _change(w - torch.bmm(a0, new_zm), new_zm, anchor)
        better = (new_loss < loss)[:, None]
        alpha = torch.where(better, new_alpha, alpha)
        change = torch.where(better[..., None], new_change, change)
        zm = torch.where(better[..., None], new_zm, zm)
    return resized(w, a0 + change, zm), alpha, zm


def resized(w: torch.Tensor, a: torch.Tensor, zm: torch.Tensor) -> torch.Tensor:
    """A with rows scaled so that the outputs keep their size."""
    return a / kept(w, a, zm).clamp(1 / MOST_SCALE, MOST_SCALE)[..., None]


def _change(rest: torch.Tensor, zm: torch.Tensor, anchor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """D ``[n, p, r]`` and the least loss of each expert; zeros if the expert's Z is zero."""
    try:
        change, product = solve_transform(rest, zm, anchor)
    except SingularError:
        if len(rest) == 1:
            return torch.zeros(1, rest.shape[1], zm.shape[1]), squares(rest)
        parts = [_change(r, z, anchor) for r, z in zip(rest.split(1), zm.split(1), strict=True)]
        return torch.cat([d for d, _ in parts]), torch.cat([loss for _, loss in parts])
    return change, squares(rest) - (change.double() * product.double()).sum((1, 2))


def step(
    w: torch.Tensor,
    a: torch.Tensor,
    zm: torch.Tensor,
    z: torch.Tensor,
    alpha: torch.Tensor,
    basis: torch.Tensor,
    metric: Metric,
    activation: str,
) -> torch.Tensor:
    """alpha ``[n, m]`` after one Gauss-Newton step, with A a function of alpha (Kaufman 1975); zeros stay zero.

    ``D_j = A (f'(U) * B_j)`` is the derivative of ``A Z`` by alpha_j.  P (with the anchor's ridge) is the projection on
    the rows of Z, within which A corrects errors: ``sum_k <D_j (1-P), D_k (1-P)> delta_k = <D_j, W - A Z>``.  The
    matrix is estimated from some rows of A.  Measured, layer error at q4_k: one step 0.1278, two 0.1277, a long search
    0.1277, none 0.1340; KL divergence 5 % lower.

    A single coefficient without an activation only scales A.  It is not changed, so the mix of an SVD remains an
    identity.
    """
    u = combine(alpha, basis)
    slope = derivative_(torch.ones_like(u), u, z, activation)
    out = alpha.clone()
    rows = torch.linspace(0, a.shape[1] - 1, min(SAMPLED_ROWS, a.shape[1])).long()
    for i in range(len(alpha)):
        used = alpha[i] != 0
        if activation == "none" and used.sum() == 1:
            continue
        one = metric.slice(slice(i, i + 1), z)
        pull = a[i].T @ (w[i] - a[i] @ zm[i])  # [r, d]
        pull = one.adjoint(pull[None])[0] * slope[i]
        sample = a[i][rows]
        change = torch.stack([sample @ one.apply((slope[i] * b)[None])[0] for b in basis])  # [m, rows, d]
        gram = (zm[i] @ zm[i].T).double()
        gram.diagonal().add_(ANCHOR * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(gram)
        share = float(sample.square().sum() / a[i].square().sum())
        if failed or not share > 0:
            continue
        along = (change @ zm[i].T).double().flatten(0, 1)  # [m * rows, r]
        along = torch.linalg.solve_triangular(factor, along.T, upper=False).T.reshape(len(basis), -1)
        change = change.flatten(1).double()
        matrix = (change @ change.T - along @ along.T) / share
        pull = pull.flatten().double()
        gradient = torch.stack([b.flatten().double() @ pull for b in basis])
        matrix, gradient = matrix[used][:, used], gradient[used]
        matrix.diagonal().add_(DAMPING * matrix.diagonal().mean().abs())
        delta, failed = torch.linalg.solve_ex(matrix, gradient)
        if not failed and torch.isfinite(delta).all():
            out[i, used] += delta.float()
    return out
