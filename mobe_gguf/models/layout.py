"""How the routed experts of a layer are stored: one object for each layer, made by the class that reads the model.

Readers and writers ask it where an expert's matrix is, and do not compare names of projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.core.sides import side

#: Fused tensors as transformers 5 and llama.cpp write them: gate's rows, then up's, in one tensor; down in another.
GATE_UP = (("gate", "up"), ("down",))


#: The projection that some experts lack (nemotron_h_moe).
OPTIONAL = ("gate",)


@dataclass(frozen=True)
class ExpertLayout:
    """``n`` experts of inner size ``p`` in a model of width ``d``.

    ``projections``: the matrices of an expert.  ``fused``: the tensors that hold all experts, each given as its projections
    in the order of their rows.  A projection in none of them has one tensor for each expert.  ``transposed``: a fused
    tensor's matrices are stored ``[columns, rows]``.  ``interleaved``: rows of its projections alternate.  ``block``: rows
    and columns that share a scale, where matrices are FP8.
    """

    n: int
    p: int
    d: int
    projections: tuple[str, ...] = ALL_PROJECTIONS
    fused: tuple[tuple[str, ...], ...] = ()
    block: tuple[int, int] | None = None
    transposed: bool = False
    interleaved: bool = False

    @property
    def gated(self) -> bool:
        """Whether experts have a gate besides up."""
        return all(p in self.projections for p in OPTIONAL)

    def shape(self, projection: str) -> tuple[int, int]:
        """Rows and columns of one expert's matrix."""
        return side(projection).matrix(self.p, self.d)

    def together(self, projection: str) -> tuple[str, ...] | None:
        """All projections of the fused tensor with ``projection``; None if there is none."""
        return next((found for found in self.fused if projection in found), None)

    def place(self, projection: str) -> tuple[int, int]:
        """``(index, count)``: which part of its tensor's rows the projection has, of how many; ``(0, 1)`` if it is alone."""
        together = self.together(projection) or (projection,)
        return together.index(projection), len(together)

    def stored_shape(self, projection: str) -> tuple[int, ...]:
        """Shape of the tensor with the projection: ``[n, parts * rows, columns]`` if fused, else that of a matrix."""
        rows, columns = self.shape(projection)
        if self.together(projection) is None:
            return (rows, columns)
        rows *= self.place(projection)[1]
        return (self.n, columns, rows) if self.transposed else (self.n, rows, columns)

    def part(self, matrix: torch.Tensor, projection: str) -> torch.Tensor:
        """One expert's matrix of ``projection``, a view ``[rows, columns]`` of its share ``matrix`` of a fused tensor."""
        index, count = self.place(projection)
        matrix = matrix.T if self.transposed else matrix
        if self.interleaved:
            return matrix[index::count]
        return matrix.chunk(count)[index]

    def join(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """The opposite of :meth:`part`: one expert's share of a fused tensor, of all its projections' matrices in order."""
        joined = (
            torch.stack(list(matrices), 1).flatten(0, 1) if self.interleaved else torch.cat(list(matrices))
        )
        return (joined.T if self.transposed else joined).contiguous()

    def scale_shapes(self, projection: str) -> tuple[tuple[int, ...], ...]:
        """Allowed shapes of the tensor's scales: one scale for each block, with blocks over all rows or over each part's."""
        rows, columns = self.shape(projection)
        down, across = self.block or (rows, columns)
        if self.together(projection) is None:
            return ((-(-rows // down), -(-columns // across)),)
        _, parts = self.place(projection)
        return tuple(
            (self.n, n, -(-columns // across)) for n in (-(-parts * rows // down), parts * -(-rows // down))
        )
