"""Codes chosen by second moments: error feedback in columns, then coordinate descent over codes and scales.

    minimise tr((W - Q) S (W - Q)^T),  W [E, p, n], S [E, n, n],  Q the values of the codes

:func:`feedback` is GPTQ (Frantar et al. 2022) with fixed scales.  With ``S = R^T R``, R upper triangular, codes are chosen from
the last column to the first; each column corrects the errors of those after it.  This needs no inverse of S.

:func:`sweep` is cyclic coordinate descent: each code is set to the best value while all others stay, and scales are solved for
in between.

Both process columns in blocks.  A change updates the block's own columns at once, and all others in one matrix product at
the end of the block.  Time is ``O(p n^2)`` per pass, and ``O(n^3 / 3)`` for R.  ``reference`` has the same without blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.quant.rounding.grid import Grid
from mobe_gguf.quant.rounding.native import Kernels
from mobe_gguf.quant.rounding.scales import Scales

#: Columns of a block, between two products with all other columns.
OUTER = 256
#: Columns between two products with the rest of the block.
INNER = 32
#: Added to S's diagonal, relative to its mean; tried in order until S has a Cholesky factor.
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass
class Problem:
    """W ``[E, p, n]``, and S ``[E, n, n]`` including the damping."""

    w: torch.Tensor
    s: torch.Tensor
    damping: float

    @classmethod
    def of(cls, s: torch.Tensor, dampings: tuple[float, ...] = DAMPINGS) -> tuple[Problem, torch.Tensor]:
        """The problem without rows, and R.  MobeError if S has no Cholesky factor at any damping."""
        diagonal = s.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        if not (torch.isfinite(mean).all() and (mean > 0).all()):
            raise MobeError("second moments must be finite and not all zero")
        for damping in dampings:
            damped = s.clone()
            damped.diagonal(dim1=-2, dim2=-1).add_(damping * mean)
            r, failed = torch.linalg.cholesky_ex(damped, upper=True)
            if not failed.any() and torch.isfinite(r.sum()):
                return cls(s[..., :0, :], damped, damping), r
        raise MobeError(
            f"the moments are not positive definite, not even with {dampings[-1]:g} of their mean added to the diagonal"
        )

    def of_rows(self, w: torch.Tensor) -> Problem:
        """The same metric for W ``[E, p, n]``."""
        return Problem(w, self.s, self.damping)

    def gradient(self, q: torch.Tensor) -> torch.Tensor:
        """``(W - Q) S``."""
        return (self.w - q) @ self.s

    def cost(self, q: torch.Tensor) -> torch.Tensor:
        """``tr((W - Q) S (W - Q)^T)`` of each matrix, ``[E]``."""
        r = self.w - q
        return ((r @ self.s) * r).sum((1, 2), dtype=torch.float64)

    def sizes(self, r: torch.Tensor) -> torch.Tensor:
        """``w S w^T`` of each row, ``[E, p]``, by S's factor R: half the operations."""
        total = torch.zeros_like(self.w[..., 0])
        for start in range(0, self.w.shape[-1], OUTER):
            part = self.w[..., start:] @ r[:, start : start + OUTER, start:].mT
            total += part.square_().sum(-1)
        return total


def code_type(grid: Grid) -> torch.dtype:
    """Integer type for codes: a byte where a code is a level."""
    return torch.uint8 if grid.width == 1 else torch.int64


def feedback(problem: Problem, r: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes ``[E, p, n / width]`` under the grid's scales, from the last columns to the first; ``r`` is R of the module."""
    w, width = problem.w, grid.width
    _, p, n = w.shape
    codes = torch.empty(*w.shape[:2], n // width, dtype=code_type(grid), device=w.device)
    error = torch.zeros_like(w)
    scale, offset = grid.scale, grid.offset
    if kernels := Kernels.of(grid, w):
        return _feedback_native(w, r, grid, kernels)
    for stop in range(n, 0, -OUTER):
        start = max(0, stop - OUTER)
        outer = slice(start, stop)
        # what the columns behind the block leave over, in the coordinates of R
        left = error[..., stop:] @ r[:, outer, stop:].mT if stop < n else torch.zeros_like(w[..., outer])
        for high in range(stop, start, -INNER):
            low = max(start, high - INNER)
            part = left[..., low - start : high - start]
            if high < stop:
                part = part + error[..., high:stop] @ r[:, low:high, high:stop].mT
            for j in range(high // width - 1, low // width - 1, -1):
                here = slice(j * width, (j + 1) * width)
                g = here.start // grid.group
                local = part[..., here.start - low : here.stop - low]
                if width == 1:
                    target = w[..., here] + local / r[:, here, here]
                    metric = None
                else:
                    corner = r[:, here, here]
                    target = w[..., here] + local @ torch.linalg.inv(corner).mT
                    metric = corner.mT @ corner
                code, unit = grid.choose(j, target, metric)
                value = unit * scale[..., g, None]
                if offset is not None:
                    value = value + offset[..., g, None]
                codes[..., j] = code
                error[..., here] = w[..., here] - value
                if here.start > low:
                    part = part + _spread(error[..., here], r[:, low:high, here])
    return codes


def _feedback_native(w: torch.Tensor, r: torch.Tensor, grid: Grid, kernels: Kernels) -> torch.Tensor:
    """:func:`feedback` with the blocks in C."""
    w, lower = w.contiguous(), r.mT.contiguous()
    n = w.shape[-1]
    codes = torch.empty(w.shape, dtype=torch.uint8)
    error = torch.zeros_like(w)
    step = _outer(grid.group)
    for start in reversed(range(0, n, step)):
        outer = slice(start, min(start + step, n))
        left = error[..., outer.stop :] @ lower[:, outer.stop :, outer]
        for e in range(len(w)):
            kernels.feedback(e, outer, lower, w, error, left[e], codes)
    return codes


def _outer(block: int) -> int:
    """Columns of a block of the outer loop: whole blocks of the type."""
    return OUTER - OUTER % block or block


def _spread(change: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``change [E, p, w]`` times ``columns [E, b, w]`` transposed."""
    return change @ columns.mT


def sweep(
    problem: Problem,
    codes: torch.Tensor,
    scales: Scales,
    grid: Grid,
    solve: bool = True,
    gradient: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> tuple[Grid, int]:
    """One pass of coordinate descent, in place; the grid with the new scales, and how many codes changed.

    ``solve``: also solve for the scales.  The cost never rises.  ``gradient``: ``(W - Q) S``, contiguous, updated in place.
    Without it, it is computed, which takes as many operations as the pass itself.  ``values``: Q, which is used up.
    """
    w, s, width, group = problem.w, problem.s, grid.width, grid.group
    n, one = w.shape[-1], scales.type
    if kernels := Kernels.of(grid, w):
        return _sweep_native(problem, codes, scales, grid, solve, gradient, values, kernels)
    outer_size = _outer(one.block)
    inner_size = min(group, INNER)
    values = grid.values(codes) if values is None else values
    if gradient is None:
        gradient = (w - values) @ s
    changed = 0
    diagonal = s.diagonal(dim1=-2, dim2=-1)
    for start in range(0, n, outer_size):
        outer = slice(start, min(start + outer_size, n))
        before = values[..., outer].clone()
        g_outer = gradient[..., outer].clone()
        s_outer = s[:, outer, outer]
        for low in range(outer.start, outer.stop, inner_size):
            if solve and low % group == 0:
                g = low // group
                span = slice(low, low + group)
                inside = slice(low - start, low - start + group)
                units = grid.units_at(codes, g)
                change = scales.improve_group(g, units, g_outer[..., inside], s_outer[:, inside, inside])
                if change is not None:
                    values[..., span] += change
                    g_outer -= change @ s_outer[:, inside, :]
                    grid = grid.set_group(g, scales.scale(g), scales.offset(g))
            inner = slice(low, min(low + inner_size, outer.stop))
            inside = slice(inner.start - start, inner.stop - start)
            had = values[..., inner].clone()
            g_inner = g_outer[..., inside].clone()
            s_inner = s_outer[:, inside, inside]
            for j in range(inner.start // width, inner.stop // width):
                here = slice(j * width, (j + 1) * width)
                at = slice(here.start - low, here.stop - low)
                now = values[..., here]
                if width == 1:
                    target, metric = now + g_inner[..., at] / diagonal[:, here, None], None
                else:
                    metric = s[:, here, here]
                    target = now + torch.linalg.solve(metric, g_inner[..., at].mT).mT
                code, unit = grid.choose(j, target, metric)
                place = here.start // group
                new = unit * grid.scale[..., place, None]
                if grid.offset is not None:
                    new = new + grid.offset[..., place, None]
                codes[..., j] = code
                g_inner = g_inner - (new - now) @ s_inner[:, at, :]
                values[..., here] = new
            moved = values[..., inner] - had
            changed += int((moved != 0).sum())
            g_outer -= moved @ s_outer[:, inside, :]
        if solve and scales.k is not None and scales.d is not None:
            for b in range(outer.start // one.block, outer.stop // one.block):
                span = slice(b * one.block, (b + 1) * one.block)
                inside = slice(span.start - start, span.stop - start)
                units = grid.units(codes[..., span.start // width : span.stop // width])
                change = scales.improve_block(b, units, g_outer[..., inside], s_outer[:, inside, inside])
                if change is not None:
                    values[..., span] += change
                    g_outer -= change @ s_outer[:, inside, :]
                    for g in range(span.start // group, span.stop // group):
                        grid = grid.set_group(g, scales.scale(g), scales.offset(g))
        gradient -= (values[..., outer] - before) @ s[:, outer, :]
    return grid.with_scales(scales.scale(), scales.offset()), changed


def _sweep_native(
    problem: Problem,
    codes: torch.Tensor,
    scales: Scales,
    grid: Grid,
    solve: bool,
    gradient: torch.Tensor | None,
    values: torch.Tensor | None,
    kernels: Kernels,
) -> tuple[Grid, int]:
    """:func:`sweep` with the blocks in C."""
    w, s = problem.w, problem.s
    values = grid.values(codes) if values is None else values
    changed, step = 0, _outer(scales.type.block)
    if gradient is None:
        gradient = (w - values) @ s
    for start in range(0, w.shape[-1], step):
        outer = slice(start, min(start + step, w.shape[-1]))
        before = values[..., outer].clone()
        for e in range(len(w)):
            changed += kernels.sweep(e, outer, s, gradient[e, :, outer], values, codes, scales, solve)
        # the kernel has updated the block's own columns
        moved = values[..., outer] - before
        for rest in (slice(0, start), slice(outer.stop, None)):
            for e in range(len(w)):
                gradient[e, :, rest].addmm_(moved[e], s[e, outer, rest], alpha=-1)
    return grid.with_scales(scales.scale(), scales.offset()), changed
