"""Fitting down: its bases are on the output side, ``W_i ~ f(sum_j alpha_ij B_j) . A_i``, which is the problem of gate and up
transposed.

    W_i^T  ~  A_i^T . f( sum_j alpha_ij B_j^T )          [p, d] ~ [p, r] [r, d]

So the solver does it, told that rows and columns have changed places (``Settings.transposed``): what weighs the inputs of
down weighs rows of W_i^T, each of which has a row of A_i^T to itself; the file's rows, along which factors are rounded, are
columns; and a mix row by row, a weight for each of down's d outputs, is one column by column.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mobe_gguf.factorize.solver import Factors, Settings, fit


def fit_down(w: torch.Tensor, settings: Settings, *, overwrite_w: bool = False, **options: Any) -> Factors:
    """:func:`solver.fit` for experts w ``[n, d, p]``: basis ``[m, d, r]``, mix ``[n, m/g]`` or ``[n, m/g, d]``, transform
    ``[n, r, p]``.  ``weight`` among the ``options``: second moments of the p inputs.  ``overwrite_w`` saves a copy, as
    there: w is transposed in its place meanwhile.
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
    """The matrices of x ``[n, a, b]`` transposed, ``[n, b, a]``, one at a time in the memory that x has (if it is contiguous)."""
    n, a, b = x.shape
    out = x.contiguous().view(n, b, a)
    for i in range(n):
        out[i] = x[i].clone().T
    return out
