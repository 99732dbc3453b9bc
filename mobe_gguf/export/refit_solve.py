"""The arithmetic of ``refit``: A and alpha of a block of experts for bases that stay as they are.

All matrices of a block are in the metric of the experts' inputs: W ``[n, p, d]``, Z = f(sum_j alpha_j B_j) ``[n, r, d]``.  For
each expert, A0 being the A that there is:

    A = A0 + argmin_D |W - (A0 + D) Z|^2 + anchor trace(Z Z^T) / r |D|^2          anchor = 0.03
    rows of A then scaled such that <a Z, w> = <w, w>

*The anchor* holds A near to what was best for the bases before they were rounded: the metric knows the channels' squares, not
how they hang together, and A0 does better there (KL divergence 0.0203 for 0.0221 at q4_k, 0.0528 for 0.0579 at q3_k).

*The scale*: least squares leaves outputs that are too small, by as much as the error, in every expert of every layer alike.
That does not average out as other errors do.  On the shipped model KL divergence goes with ``error + 18 bias^2``, and
the scale takes it from 0.071 to 0.022 at q4_k, from 0.278 to 0.058 at q3_k (A as it was: 0.054, 0.256).  Hence :func:`cost`.
"""

from __future__ import annotations

import torch

from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.metric import Metric
from mobe_gguf.core.projected import SingularError, derivative_, solve_transform

#: Ridge of the change of A, relative to the mean of the Gram matrix's diagonal.
ANCHOR = 0.03

#: The same where full second moments are known: they need no help but for directions that no input has.
ANCHOR_BY_MOMENTS = 1e-3

#: What the square of a bias counts against the square of an error that is as likely of one sign as of the other.
BIAS = 16.0

#: A row is scaled by no more than this, up or down: one that is hardly met at all cannot be mended so.
MOST_SCALE = 2.0

#: Rows of A that the matrix of the Gauss-Newton step is estimated from; the gradient takes all.
SAMPLED_ROWS = 32

#: Added to the diagonal of that step's matrix, relative to its mean.
DAMPING = 1e-3


def squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each matrix of ``[n, a, b]``, float64."""
    return x.square().sum((1, 2), dtype=torch.float64)


def kept(w: torch.Tensor, a: torch.Tensor, zm: torch.Tensor) -> torch.Tensor:
    """``<a Z, w> / <w, w>`` of each row, ``[n, p]``: how much of its size is left; 1 for a row of zeros."""
    size = w.square().sum(-1)
    inner = (torch.bmm(a, zm) * w).sum(-1)
    return torch.where(size > 0, inner / size.clamp_min(torch.finfo(size.dtype).tiny), torch.ones_like(size))


def cost(w: torch.Tensor, a: torch.Tensor, zm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each expert: what A costs, ``|W - A Z|^2 + BIAS sum over rows (1 - kept)^2 |w|^2``, and the first term alone."""
    error = squares(w - torch.bmm(a, zm))
    bias = ((1 - kept(w, a, zm)).square() * w.square().sum(-1)).sum(-1, dtype=torch.float64)
    return error + BIAS * bias, error


def second_moments(zm: torch.Tensor) -> torch.Tensor:
    """diag of ``Z C Z^T`` ``[n, r]``, for ``zm = Z C^(1/2)``: the squares of what A multiplies, on average.

    Encoders refuse weights that are all zero: an expert whose Z is gets ones.
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

    ``z`` is ``zm`` not in the metric; Z is returned in it.  An expert keeps its alpha where the step does not pay, and where
    alpha is given row by row, for then there are too many for one matrix.
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
    """A with its rows scaled such that the outputs keep their size."""
    return a / kept(w, a, zm).clamp(1 / MOST_SCALE, MOST_SCALE)[..., None]


def _change(rest: torch.Tensor, zm: torch.Tensor, anchor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """D ``[n, p, r]`` and the least loss of each expert; zeros where the Gram matrix is that of a Z of zeros."""
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
    """alpha ``[n, m]`` after one Gauss-Newton step with A a function of it (Kaufman 1975); what is zero stays so.

    ``D_j = A (f'(U) * B_j)`` is the change of ``A Z`` with alpha_j, P (with the anchor's ridge) the projection on the rows of Z,
    which A takes care of: ``sum_k <D_j (1-P), D_k (1-P)> delta_k = <D_j, W - A Z>``.  The matrix is estimated from some of A's rows.
    Measured, layer error at q4_k: one step 0.1278, two 0.1277, a long search 0.1277, none 0.1340; KL divergence 5 % lower.

    A single coefficient without an activation is but a scale of A: it stays, so that the mix of an SVD remains an identity.
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
