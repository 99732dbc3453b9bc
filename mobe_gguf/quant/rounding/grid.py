"""The values of codes under fixed scales, on any device.  This is all that ``engine`` knows of a type.

    batch E matrices of p rows and n columns; ``width`` w columns share a code, n / w codes a row

The engine visits a row's codes ``j`` in some order.  For each it has a target t ``[E, p, w]`` and the metric M ``[E, w, w]`` for
errors of these columns, and asks the grid for the code with the least ``(t - v) M (t - v)^T``.  With w = 1 this is the nearest
level for every M.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Grid(ABC):
    """Codes of a batch of matrices under fixed scales.

    ``scale``, ``offset`` ``[E, p, n / group]`` float32 (``offset`` may be None): value = scale * unit + offset.
    """

    width: int
    group: int
    scale: torch.Tensor
    offset: torch.Tensor | None

    @abstractmethod
    def choose(
        self, j: int, target: torch.Tensor, metric: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[E, p]`` and their units ``[E, p, width]`` for columns ``j * width`` to ``(j + 1) * width``.

        ``target`` ``[E, p, width]`` in values, not units; ``metric`` ``[E, width, width]``, symmetric and positive definite, None where
        the width is 1.  Ties go to the lower code.  A scale of zero takes any code, the same each time.
        """

    @abstractmethod
    def units(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes ``[E, p, n / width]`` stand for before scale and offset: float32 ``[E, p, n]``."""

    @abstractmethod
    def with_scales(self, scale: torch.Tensor, offset: torch.Tensor | None) -> Grid:
        """The same codes under other scales."""

    def units_at(self, codes: torch.Tensor, g: int) -> torch.Tensor:
        """The units of group ``g`` alone, ``[E, p, group]``, of codes ``[E, p, n / width]``."""
        n = self.group // self.width
        return self.units(codes[..., g * n : (g + 1) * n])

    def set_group(self, g: int, scale: torch.Tensor, offset: torch.Tensor | None) -> Grid:
        """Scale and offset ``[E, p]`` of one group, in place."""
        self.scale[..., g] = scale
        if self.offset is not None and offset is not None:
            self.offset[..., g] = offset
        return self

    def values(self, codes: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """float32 ``[E, p, n]``: what is decoded, of some ``rows``."""
        x = self.units(codes[:, rows]).unflatten(-1, (-1, self.group)) * self.scale[:, rows, :, None]
        return (x if self.offset is None else x.add_(self.offset[:, rows, :, None])).flatten(-2)


class Levels(Grid):
    """One code a column, out of ``levels`` ``[N]``: evenly spaced or not."""

    width = 1

    def __init__(self, levels: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, group: int):
        self.levels = levels.to(scale)
        self.scale, self.offset, self.group = scale, offset, group
        order = torch.argsort(self.levels, stable=True)
        ladder = self.levels[order]
        first = torch.ones_like(ladder, dtype=torch.bool)
        first[1:] = ladder[1:] != ladder[:-1]  # fp4 has two zeros: the lower code is taken
        self.order, self.ladder = order[first], ladder[first]
        steps = self.levels.diff()
        #: levels[c] == levels[0] + c step, exactly
        self.counted = bool(
            (self.levels == self.levels[0] + steps[0] * torch.arange(len(self.levels)).to(scale)).all()
        )
        steps = self.ladder.diff()
        self.even = bool((steps == steps[0]).all())
        self.middles = (self.ladder[1:] + self.ladder[:-1]) / 2
        self.inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)

    def nearest(self, unit: torch.Tensor) -> torch.Tensor:
        """Places in the ladder of the levels nearest to ``unit`` (any shape)."""
        if self.even:
            low, step = self.ladder[0], self.ladder[1] - self.ladder[0]
            return ((unit - low) / step).round_().clamp_(0, len(self.ladder) - 1).long()
        return torch.bucketize(unit, self.middles)

    def choose(
        self, j: int, target: torch.Tensor, metric: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = j // self.group
        t = target[..., 0] if self.offset is None else target[..., 0] - self.offset[..., g]
        place = self.nearest(t * self.inverse[..., g])
        return self.order[place], self.ladder[place][..., None]

    def units(self, codes: torch.Tensor) -> torch.Tensor:
        if self.counted:
            return codes.to(self.levels.dtype).mul_(self.levels[1] - self.levels[0]).add_(self.levels[0])
        return self.levels[codes.long()]

    def set_group(self, g: int, scale: torch.Tensor, offset: torch.Tensor | None) -> Grid:
        self.inverse[..., g] = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
        return super().set_group(g, scale, offset)

    def with_scales(self, scale: torch.Tensor, offset: torch.Tensor | None) -> Levels:
        return Levels(self.levels, scale, offset, self.group)


def levels_grid(levels: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, group: int) -> Levels:
    """The grid of a type with levels."""
    return Levels(levels, scale, offset, group)
