"""How the routed experts of a layer are stored: one object for each layer, made by whatever holds the model.

Readers and writers ask it where an expert's matrix lies; they compare no names of projections.
"""

from __future__ import annotations

from dataclasses import dataclass

from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.core.sides import side

#: Fused tensors as transformers 5 and llama.cpp write them: gate's rows, then up's, in one; down by itself.
GATE_UP = (("gate", "up"), ("down",))


#: What some experts lack (nemotron_h_moe).
OPTIONAL = ("gate",)


@dataclass(frozen=True)
class ExpertLayout:
    """``n`` experts of inner size ``p`` in a model of width ``d``.

    ``projections``: the matrices that an expert has.  ``fused``: the tensors that hold all experts, each with the projections whose
    rows follow one another in it; a projection that is in none has one tensor for each expert.  ``block``: rows and columns that
    share a scale, where matrices are FP8.
    """

    n: int
    p: int
    d: int
    projections: tuple[str, ...] = ALL_PROJECTIONS
    fused: tuple[tuple[str, ...], ...] = ()
    block: tuple[int, int] | None = None

    @property
    def gated(self) -> bool:
        """Whether experts have a gate beside up."""
        return all(p in self.projections for p in OPTIONAL)

    def shape(self, projection: str) -> tuple[int, int]:
        """Rows and columns of one expert's matrix."""
        return side(projection).matrix(self.p, self.d)

    def together(self, projection: str) -> tuple[str, ...] | None:
        """The projections of the fused tensor that ``projection`` is in; None if it is in none."""
        return next((found for found in self.fused if projection in found), None)

    def place(self, projection: str) -> tuple[int, int]:
        """Which of how many parts of its tensor's rows are the projection's: ``(0, 1)`` where it is by itself."""
        together = self.together(projection) or (projection,)
        return together.index(projection), len(together)

    def stored_shape(self, projection: str) -> tuple[int, ...]:
        """Of the tensor that holds it: ``[n, parts * rows, columns]`` fused, else a matrix."""
        rows, columns = self.shape(projection)
        return (
            (rows, columns)
            if self.together(projection) is None
            else (self.n, self.place(projection)[1] * rows, columns)
        )

    def scale_shapes(self, projection: str) -> tuple[tuple[int, ...], ...]:
        """What the scales beside that tensor may be shaped like: one for each block of its rows, or of each part's by itself."""
        rows, columns = self.shape(projection)
        down, across = self.block or (rows, columns)
        if self.together(projection) is None:
            return ((-(-rows // down), -(-columns // across)),)
        _, parts = self.place(projection)
        return tuple(
            (self.n, n, -(-columns // across)) for n in (-(-parts * rows // down), parts * -(-rows // down))
        )
