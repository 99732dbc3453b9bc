"""``engine`` without blocks: the plain formulas, for one matrix, one column at a time.  Tests compare the fast versions with it.

feedback   GPTQ by the inverse of S, the last column first: ``e_j = (w_j - q_j) / [U]_jj``, the remaining columns change by ``-e_j U_j``
descend    cyclic coordinate descent, with every gradient computed from scratch
"""

from __future__ import annotations

import torch

from mobe_gguf.quant.rounding.grid import Grid


def feedback(w: torch.Tensor, s: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes ``[p, n]`` of one matrix ``[p, n]`` by the metric ``[n, n]``; only for types with levels."""
    n = w.shape[1]
    # the order is from the last to the first, so the Cholesky factor is of the inverse in that order
    turned = torch.arange(n - 1, -1, -1)
    upper = torch.linalg.cholesky(torch.linalg.inv(s[turned][:, turned]), upper=True)
    left = w[:, turned].clone()
    codes = torch.empty(w.shape, dtype=torch.int64)
    for i, j in enumerate(turned.tolist()):
        code, unit = grid.choose(j, left[None, :, i : i + 1], None)
        value = _value(grid, unit[0, :, 0], j)
        error = (left[:, i] - value) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
        codes[:, j] = code[0]
    return codes


def descend(w: torch.Tensor, s: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Codes after one pass over all columns with fixed scales; each is set to the best value while all others stay."""
    codes = codes.clone()
    for j in range(w.shape[1]):
        values = grid.values(codes[None])[0]
        gradient = (w - values) @ s[:, j]
        target = values[:, j] + gradient / s[j, j]
        codes[:, j] = grid.choose(j, target[None, :, None], None)[0][0]
    return codes


def _value(grid: Grid, unit: torch.Tensor, j: int) -> torch.Tensor:
    g = j // grid.group
    value = unit * grid.scale[0, :, g]
    return value if grid.offset is None else value + grid.offset[0, :, g]
