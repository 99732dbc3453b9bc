"""On which side of A the bases of a projection lie, and the shapes that follow from it.

    gate, up:  W [p, d] ~ A [p, r] . f(sum_j alpha_ij B_j [r, d])      bases on the input side
    down:      W [d, p] ~ f(sum_j alpha_ij B_j [d, r]) . A [r, p]      bases on the output side

In both cases d is the model's width and p the experts' inner size.  No other module derives a shape from a
projection's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mobe_gguf.core.names import ALL_PROJECTIONS, MOBE_VERSION, MOBE_VERSION_DOWN


@dataclass(frozen=True)
class Side:
    """``output``: the bases lie on the output side; the fit then solves the transposed problem.  ``version``: the version
    of the GGUF layout with such bases."""

    output: bool
    version: int

    def _turned(self, rows: int, columns: int) -> tuple[int, int]:
        return (columns, rows) if self.output else (rows, columns)

    def matrix(self, p: int, d: int) -> tuple[int, int]:
        """Shape of an expert's matrix."""
        return self._turned(p, d)

    def basis(self, r: int, d: int) -> tuple[int, int]:
        """Shape of a basis."""
        return self._turned(r, d)

    def transform(self, p: int, r: int) -> tuple[int, int]:
        """Shape of A."""
        return self._turned(p, r)

    @property
    def d_axis(self) -> int:
        """Axis of d in a matrix or basis ``[.., rows, columns]``."""
        return -2 if self.output else -1

    @property
    def r_axis(self) -> int:
        """Axis of r in a basis; in A it is :attr:`d_axis`."""
        return -1 if self.output else -2

    @property
    def basis_form(self) -> str:
        """Shape of a basis for messages, a template to be filled with d."""
        return "[m, {d}, r]" if self.output else "[m, r, {d}]"

    def multiply(self, transform: torch.Tensor, combined: torch.Tensor) -> torch.Tensor:
        """W, the product of A and ``f(sum_j alpha_ij B_j)`` in this side's order."""
        return combined @ transform if self.output else transform @ combined


INPUT, OUTPUT = Side(False, MOBE_VERSION), Side(True, MOBE_VERSION_DOWN)

#: Where the bases of each projection lie.
SIDES = dict.fromkeys(ALL_PROJECTIONS, INPUT) | {"down": OUTPUT}


def side(projection: str) -> Side:
    """The side of ``gate``, ``up`` or ``down``."""
    return SIDES[projection]


def by_side(projections: Iterable[str]) -> list[tuple[str, ...]]:
    """The projections grouped by side, input first; an empty side is left out."""
    there = tuple(projections)
    return [found for of in (INPUT, OUTPUT) if (found := tuple(p for p in there if side(p) == of))]
