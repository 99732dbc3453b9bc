"""Fitting down.  Its bases are on the output side, ``W_i ~ f(sum_j alpha_ij B_j) . A_i``: the transposed problem of gate
and up.

    W_i^T  ~  A_i^T . f( sum_j alpha_ij B_j^T )          [p, d] ~ [p, r] [r, d]

So the same solver is used, with rows and columns exchanged (``Settings.transposed``).  Weights of down's inputs then weigh
rows of W_i^T, and each of these has its own row of A_i^T.  The file's rows, along which factors are rounded, are columns.
A row-wise mix, with a weight for each of down's d outputs, becomes a column-wise one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mobe_gguf.factorize.solver import Factors, Settings, fit


def fit_down(w: torch.Tensor, settings: Settings, *, overwrite_w: bool = False, **options: Any) -> Factors:
    """:func:`solver.fit` for experts w ``[n, d, p]``: basis ``[m, d, r]``, mix ``[n, m/g]`` or ``[n, m/g, d]``, transform
    ``[n, r, p]``.  The option ``weight``: second moments of the p inputs.  ``overwrite_w`` saves a copy, as in
    :func:`solver.fit`; w is then transposed in place during the fit.
    """
    turned = _turned(w if overwrite_w else w.clone())
    try:
        factors = fit(turned, replace(settings, transposed=True), overwrite_w=True, **options)
    finally:
        if overwrite_w:
            _turned(turned)
    return replace(
        factors,
        basis=_turned(factors.basis),
        mix=factors.mix[:, :, 0].contiguous() if factors.mix.dim() == 4 else factors.mix,
        transform=_turned(factors.transform),
    )


def _turned(x: torch.Tensor) -> torch.Tensor:
    """The matrices of x ``[n, a, b]`` transposed, ``[n, b, a]``, one at a time; in x's own memory if x is contiguous."""
    n, a, b = x.shape
    out = x.contiguous().view(n, b, a)
    for i in range(n):
        out[i] = x[i].clone().T
    return out
