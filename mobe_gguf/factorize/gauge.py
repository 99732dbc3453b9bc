"""The gauge of a linear form: chooses A and the bases so that rounding either costs least.

Without an activation ``A_i T^-1 (sum_j alpha_ij T B_j)`` is the same for every invertible T ``[r, r]``, but the cost of
rounding is not.  Noise of relative size e on the values of A, or of the bases, costs ``e sum_a M_aa G_aa``.  M is the mean of
the experts' ``A^T A``, G that of ``Z S Z^T``: columns of A weigh as much as the rows of Z that they multiply, and vice versa.
Let s_a be the roots of the eigenvalues of M G, which no T changes.  The cost is

    e sum s_a^2            where Z is orthogonal (an SVD), and where A is
    e (sum s_a)^2 / r      where M and G are equal and have a constant diagonal

and the latter is the minimum.  So T makes M and G equal (it is the root of the geometric mean of M and the inverse of G), and
a random rotation flattens their diagonals.
"""

from __future__ import annotations

import torch

from mobe_gguf.core.formula import combine
from mobe_gguf.core.metric import Metric

#: Least eigenvalue that counts as nonzero, relative to the largest.
LEAST = 1e-9


def flat_gauge(
    transform: torch.Tensor, basis: torch.Tensor, mix: torch.Tensor, metric: Metric, seed: int
) -> torch.Tensor:
    """The bases ``[m, r, d]`` in that gauge; solve for A ``[n, p, r]`` again afterwards.  ``mix`` ``[n, m]``; ``metric`` of
    these experts.

    O(n (p r^2 + r d k)) for k directions of the metric, one expert at a time.  The bases are unchanged if there is no such
    gauge (A or Z is zero).
    """
    r = basis.shape[1]
    m, g = (torch.zeros(r, r, dtype=torch.float64, device=basis.device) for _ in range(2))
    for i, a in enumerate(transform):
        s = slice(i, i + 1)
        z = metric.slice(s, basis).apply(combine(mix[s], basis))[0]
        a = a.to(basis)
        m += (a.T @ a).double()
        g += (z @ z.T).double()
    if not (m.diagonal().sum() > 0 and g.diagonal().sum() > 0 and torch.isfinite(m + g).all()):
        return basis
    root, inverse = _power(g, 0.5), _power(g, -0.5)
    turn = _power(inverse @ _power(root @ m @ root, 0.5) @ inverse, 0.5)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
    out = torch.matmul(rotation.to(turn) @ turn, basis.double()).float()
    return out.mul_(basis.std() / out.std())


def _power(x: torch.Tensor, exponent: float) -> torch.Tensor:
    """Power of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((x + x.T) / 2)
    return (vectors * values.clamp_min(float(values[-1]) * LEAST) ** exponent) @ vectors.T
