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
    ``[n, r, p]``.  ``weight`` among the ``options``: second moments of the p inputs.  ``overwrite_w`` is not needed:
    a transposed copy is made in any case.
    """
    turned = w.transpose(1, 2).contiguous()
    factors = fit(turned, replace(settings, transposed=True), overwrite_w=True, **options)
    return replace(
        factors,
        basis=factors.basis.transpose(1, 2).contiguous(),
        mix=factors.mix[:, :, 0].contiguous() if factors.mix.dim() == 4 else factors.mix,
        transform=factors.transform.transpose(1, 2).contiguous(),
    )
