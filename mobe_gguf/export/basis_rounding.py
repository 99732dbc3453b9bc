"""Rounding of the bases of a linear form, by the output error of all their experts.

A is solved for again after the bases are rounded, so errors of the bases within the span of an expert's Z cost
nothing.  With A unchanged, the rest of an error D of basis j costs

    sum_i alpha_ij^2 tr( A_i D K_i D^T A_i^T ),   K_i = S_i - S_i Z_i^T (Z_i S_i Z_i^T)^-1 Z_i S_i

(Kaufman 1975).  In the gauge that the fit leaves (``factorize/gauge.py``) the rows of the bases count alike.  So rows
are rounded in the mean of K_i, weighted by ``|alpha_i|^2 |A_i|^2``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mobe_gguf.core.formula import combine
from mobe_gguf.core.metric import Metric

#: The mean is taken over at most this many experts: they share their inputs.
EXPERTS = 32
#: Ridge of the inverse, relative to the mean of the diagonal: A is rounded, too, and cannot correct everything.
RIDGE = 1e-3


def basis_metric(
    transform: Callable[[int], torch.Tensor],
    experts: slice,
    mix: torch.Tensor,
    bases: torch.Tensor,
    whole: Metric,
) -> torch.Tensor:
    """The mean of K_i ``[d, d]`` over ``experts``, which have ``mix`` ``[n, m]`` of ``bases`` ``[m, r, d]``.

    ``transform(i)`` is A_i ``[p, r]``; ``whole``: the metric of all experts of the layer.

    O(n' (r d^2 + d^2 k)) for n' = EXPERTS and k directions.
    """
    d = bases.shape[-1]
    total, weights = torch.zeros(d, d), 0.0
    step = max(1, -(-len(mix) // EXPERTS))
    for e in range(experts.start, experts.stop, step):
        s, alpha = slice(e, e + 1), mix[e - experts.start :][:1]
        metric = whole.slice(s, bases)
        weight = float(transform(e).double().square().sum() * alpha.double().square().sum())
        root = metric.apply(torch.eye(d)[None])[0]
        z = metric.apply(combine(alpha, bases))[0]
        gram = z @ z.T
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed or not weight > 0:
            continue
        span = torch.linalg.solve_triangular(factor, z @ root.T, upper=False)
        total.addmm_(root, root.T, alpha=weight).addmm_(span.T, span, alpha=-weight)
        weights += weight
    return total / weights if weights else torch.eye(d)
