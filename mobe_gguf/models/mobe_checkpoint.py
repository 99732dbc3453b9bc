"""Reading MoBE checkpoints: ours and the authors' published ones (docs/format.md, "MoBE checkpoint").

    W_i ~ A_i . f( sum_{j in group(i)} alpha_ij B_j )

Tensors, with ``block`` = the family's MoE block (``model.layers.L.mlp``):
``block.B_gate [m, r, d]``, ``block.W_gate [n, m]`` or ``[n, m, r]``; in groups ``block.B_gate_0 [m/g, r, d]``,
``block.W_gate_0 [n/g, m/g]``, ...; A_e ``[p, r]`` under the expert's original name.

Only our own files factorize down.  Its bases are on the output side, ``W_i ~ f(sum_j alpha_ij B_j) . A_i``:
``block.B_down [m, d, r]``, A_e ``[r, p]``, and ``[n, m, d]`` for a row-wise mix.

config.json holds ``num_B`` and ``activation``.  Shapes come from the tensors; the ``mobe`` key of our own files is not
needed.
"""

from __future__ import annotations

import os

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.core.sides import side
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.factors import FactorDirectory, MobeLayer, recorded


class ModelWithFactors(FactorDirectory, Checkpoint):
    """A Hugging Face model directory whose experts are factors, in the directory or beside it."""


class MobeCheckpoint(ModelWithFactors):
    """A directory of MoBE factors.  Raises MobeError if it is an ordinary model."""

    kind = "mobe"

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        if not self.is_mobe:
            mend = f"Factorize it first, or export it as it is (--dense):\n  mobe-gguf factorize {self.path} {str(self.path).rstrip('/')}-mobe"
            if method := recorded(self.config, "method"):
                raise MobeError(
                    f"{self.path} is an ordinary model, the factors of --method {method} are multiplied out in it. As a GGUF file:\n"
                    f"  mobe-gguf export {self.path} model.gguf --quant q4_k --dense"
                )
            if any(self.path.glob("*_WAB.pth")):
                mend = (
                    "The *_WAB.pth files in it are named by --wab, with the activation that they were trained with:\n"
                    f"  --wab {self.path} --activation silu"
                )
            raise MobeError(
                f"{self.path} is not a MoBE checkpoint: config.json has no num_B and there are no B_gate tensors. "
                f"{mend}"
            )

    def ordinary(self, layer: int) -> tuple[str, ...]:
        """Projections of a MoE layer that are not factorized."""
        return tuple(p for p in ALL_PROJECTIONS if p not in self.layer(layer).projections)


#: Bytes of combined bases that :class:`Reconstruction` holds at a time for several experts; twice that while f is applied.
BATCH_BYTES = 128 << 20


class Reconstruction:
    """The matrices that a projection's factors represent, float32 ``[p, d]`` each: ``A_i f(sum_j alpha_ij B_j)``.

    ``Reconstruction(layer, "gate")(i)`` is the matrix of expert i.  Ask for the experts in order.  Until the last one,
    memory holds one group's bases and some of their combinations.
    """

    def __init__(self, layer: MobeLayer, projection: str):
        self.layer = layer
        self.projection = projection
        self._group: int | None = None
        self._first = 0
        self._combined: torch.Tensor | tuple[()] = ()
        self._basis: torch.Tensor | None = None
        self._mix: torch.Tensor | None = None

    def __call__(self, expert: int) -> torch.Tensor:
        if not self._first <= expert < self._first + len(self._combined):
            self._combine(expert)
        combined = self._combined[expert - self._first]
        transform = self.layer.transform(self.projection, expert)
        matrix = side(self.projection).multiply(transform, combined)
        if expert == self.layer.checkpoint.n_expert - 1:
            self._group, self._first, self._combined = None, 0, ()
            self._basis = self._mix = None
        return matrix

    def _combine(self, expert: int) -> None:
        """``f(sum_j alpha_ij B_j)`` of ``expert`` and as many following experts of its group as BATCH_BYTES allow."""
        layer, projection = self.layer, self.projection
        n_group = layer.checkpoint.n_expert // layer.group_count(projection)
        group, index = divmod(expert, n_group)
        self._combined = ()
        if group != self._group:
            self._basis = None  # never two groups' bases at a time
            self._basis = layer.group_basis(projection, group)
            self._mix = layer.mix(projection)[group * n_group : (group + 1) * n_group]
            self._group = group
        assert self._basis is not None and self._mix is not None
        size = max(1, BATCH_BYTES // (4 * self._basis[0].numel()))
        self._combined = activate(
            combine(self._mix[index : index + size], self._basis), layer.checkpoint.activation
        )
        self._first = expert


def reconstruct(layer: MobeLayer, projection: str) -> torch.Tensor:
    """All experts' matrices, float32 ``[n, p, d]``; for a projection that is not factorized, the original ones."""
    if projection not in layer.projections:
        return layer.checkpoint.expert_stack(layer.index, projection)
    read = Reconstruction(layer, projection)
    return torch.stack([read(e) for e in range(layer.checkpoint.n_expert)])
