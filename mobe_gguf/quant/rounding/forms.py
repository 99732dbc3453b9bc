"""What ggml's quantized types store, in one form for all of them.

A row of n values is stored as codes and scales:

    value[j] = scale[j / group] * point(code[j / width])[j % width] + offset[j / group]
    scale    = d[j / block] * multipliers[k[j / group]]        (without d: 1; without k: 1)
    offset   = dmin[j / block] * minima[m[j / group]]          (without m: dmin alone; without dmin: none)

``width`` columns share a code: 1 in types with levels, 8 or 4 in those with a codebook.  ``points`` ``[N, width]`` are the
values of codes 0 to N-1; where a code also holds signs or a shift, a type has its own :class:`~.grid.Grid`.

Source: the layouts and decoders of ggml (``ggml/src/ggml-common.h``, ``ggml-quants.c`` of the pinned tree), against which
``tests/quant/test_rounding_forms.py`` holds every type here, byte for byte.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch

from mobe_gguf.quant.rounding.grid import Grid, levels_grid
from mobe_gguf.runtime import ggml


@dataclass(frozen=True)
class Stored:
    """Rows of one type, taken apart.  All arrays have the rows first: ``[rows, ...]``.

    ``codes`` ``[rows, n / width]``: any integer type.  ``d``, ``dmin`` ``[rows, n / block]`` float16, None where the type has none.
    ``k``, ``m`` ``[rows, n / group]`` uint8: places in the type's ``multipliers`` and ``minima``, None where it has none.
    """

    codes: np.ndarray
    d: np.ndarray | None = None
    k: np.ndarray | None = None
    dmin: np.ndarray | None = None
    m: np.ndarray | None = None

    def replace(self, **changes: np.ndarray) -> Stored:
        return replace(self, **changes)


class Type(ABC):
    """One of ggml's types.  A family sets the class attributes or passes them to its constructor.

    ``multipliers`` float32 ``[K]``, ``minima`` float32 ``[M]``: what ``k`` and ``m`` stand for, None where the type has no such
    field.  ``points`` float32 ``[N, width]``.  ``group`` and ``block``: columns per scale and per ``d``.
    """

    name: str
    width: int = 1
    group: int
    block: int
    points: np.ndarray
    multipliers: np.ndarray | None = None
    minima: np.ndarray | None = None

    @abstractmethod
    def unpack(self, data: np.ndarray) -> Stored:
        """uint8 ``[rows, bytes]``, as libggml writes rows."""

    @abstractmethod
    def pack(self, stored: Stored) -> np.ndarray:
        """The bytes again: ``pack(unpack(data)) == data`` for everything that libggml's encoder writes."""

    def scales(self, stored: Stored) -> np.ndarray:
        """float32 ``[rows, n / group]``, computed as libggml does: one float32 product."""
        return _scaled(stored.d, stored.k, self.multipliers, self.block // self.group)

    def offsets(self, stored: Stored) -> np.ndarray | None:
        """float32 ``[rows, n / group]``, or None where the type has none."""
        if stored.dmin is None:
            return None
        return _scaled(stored.dmin, stored.m, self.minima, self.block // self.group)

    def grid(self, stored: Stored, batch: int = 1, device: torch.device | str = "cpu") -> Grid:
        """What codes stand for under the scales of ``stored``, whose rows are those of ``batch`` matrices of equal shape."""

        def shaped(x: np.ndarray | None) -> torch.Tensor | None:
            return None if x is None else torch.from_numpy(x).view(batch, -1, x.shape[-1]).to(device)

        scale = shaped(self.scales(stored))
        assert scale is not None
        return self.make_grid(scale, shaped(self.offsets(stored)))

    def make_grid(self, scale: torch.Tensor, offset: torch.Tensor | None) -> Grid:
        """A grid for given scales and offsets ``[batch, rows, n / group]``; codebooks whose codes hold more have their own."""
        if self.width != 1:
            raise NotImplementedError(f"{self.name} needs a make_grid of its own")
        return levels_grid(torch.from_numpy(self.points[:, 0]), scale, offset, self.group)

    def decode(self, stored: Stored, n: int) -> np.ndarray:
        """float32 ``[rows, n]``: what libggml makes of the packed rows."""
        return ggml.dequantize(self.pack(stored), self.name, n)


#: Types whose codes can be chosen, by their names in ggml.
TYPES: dict[str, Type] = {}


def register(*types: Type) -> None:
    """Make types known under their names."""
    TYPES.update((one.name, one) for one in types)


def _scaled(d: np.ndarray | None, k: np.ndarray | None, table: np.ndarray | None, groups: int) -> np.ndarray:
    """``d * table[k]`` in float32, d repeated for the ``groups`` of its block; either may be missing."""
    with np.errstate(over="ignore", invalid="ignore"):
        if k is None:
            assert d is not None
            return np.repeat(d.astype(np.float32), groups, axis=-1)
        assert table is not None
        scale = table[k]
        return scale if d is None else np.repeat(d.astype(np.float32), groups, axis=-1) * scale
