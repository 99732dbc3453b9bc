"""Reading MoBE checkpoints: ours and the authors' published ones (docs: DESIGN "MoBE checkpoint").

    W_i ~ A_i . f( sum_{j in group(i)} alpha_ij B_j )

Tensors, with ``block`` = the family's MoE block (``model.layers.L.mlp``):
``block.B_gate [m, r, d]``, ``block.W_gate [n, m]`` or ``[n, m, r]``; in groups ``block.B_gate_0 [m/g, r, d]``,
``block.W_gate_0 [n/g, m/g]``, ...; A_e ``[p, r]`` under the expert's original name.  config.json holds ``num_B`` and
``activation``.  Shapes come from the tensors; the ``mobe`` key that our own files have is not needed.
"""

from __future__ import annotations

import os
from functools import cached_property

import torch

from mobe_gguf.checkpoint import Checkpoint
from mobe_gguf.errors import MobeError
from mobe_gguf.formula import activate, combine_groups
from mobe_gguf.names import ACTIVATIONS, PROJECTIONS


class MobeLayer:
    """One MoE layer of a MoBE checkpoint.  All tensors come out as float32."""

    def __init__(self, checkpoint: MobeCheckpoint, index: int):
        self.checkpoint = checkpoint
        self.index = index

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """The factorized projections, of ``gate`` and ``up``; empty for an ordinary layer."""
        return tuple(p for p in PROJECTIONS if self._names(p))

    def _names(self, projection: str) -> list[tuple[str, str]]:
        """``(basis, mix)`` tensor names, one pair a group."""
        family, checkpoint = self.checkpoint.family, self.checkpoint
        groups: list[int | None] = [None]
        if family.basis(self.index, projection) not in checkpoint:
            groups = []
            while family.basis(self.index, projection, len(groups)) in checkpoint:
                groups.append(len(groups))
        return [
            (family.basis(self.index, projection, g), family.mix(self.index, projection, g)) for g in groups
        ]

    @cached_property
    def _checked(self) -> dict[str, tuple[int, int, int]]:
        return {p: self._check(p) for p in self.projections}

    def _check(self, projection: str) -> tuple[int, int, int]:
        """``(g, m, r)`` of a projection after all shapes were found to agree; MobeError names the tensor."""
        c = self.checkpoint
        pairs = self._names(projection)
        n, d, p, g = c.n_expert, c.n_embd, c.n_ff_exp, len(pairs)
        if n % g:
            raise MobeError(f"{c.path}: {pairs[0][0]}: {g} groups do not divide {n} experts")
        first = c.shape(pairs[0][0])
        if len(first) != 3 or first[2] != d:
            raise MobeError(f"{c.path}: tensor {pairs[0][0]} has shape {list(first)}, expected [m, r, {d}]")
        m_group, r, _ = first
        for basis, mix in pairs:
            c.expect_shape(basis, first, f"as {pairs[0][0]}")
            shape = c.shape(mix)
            if shape not in ((n // g, m_group), (n // g, m_group, r)) or len(shape) != len(
                c.shape(pairs[0][1])
            ):
                raise MobeError(
                    f"{c.path}: tensor {mix} has shape {list(shape)}, expected {[n // g, m_group]}, or "
                    f"{[n // g, m_group, r]} when mixed row by row, from the shape of {basis}"
                )
        for e in range(n):
            c.expect_shape(
                c.family.expert_weight(self.index, e, projection),
                (p, r),
                f"p from config.json, r from {pairs[0][0]}",
            )
        return g, m_group * g, r

    def group_count(self, projection: str) -> int:
        """g."""
        return self._checked[projection][0]

    def n_basis(self, projection: str) -> int:
        """m, over all groups."""
        return self._checked[projection][1]

    def rank(self, projection: str) -> int:
        """r."""
        return self._checked[projection][2]

    def is_row_mixed(self, projection: str) -> bool:
        """True if every row of the basis has mixing weights of its own."""
        self._checked[projection]
        return len(self.checkpoint.shape(self._names(projection)[0][1])) == 3

    def basis(self, projection: str) -> torch.Tensor:
        """B ``[m, r, d]``, groups one after the other."""
        self._checked[projection]
        return torch.cat([self._read(basis) for basis, _ in self._names(projection)])

    def basis_matrix(self, projection: str, index: int) -> torch.Tensor:
        """B_j ``[r, d]``, read without the others; ``index`` counts through the groups."""
        g, m, _ = self._checked[projection]
        name = self._names(projection)[index // (m // g)][0]
        return self._finite(name, self.checkpoint.get_row(name, index % (m // g)))

    def mix(self, projection: str) -> torch.Tensor:
        """alpha ``[n, m/g]``, or ``[n, m/g, r]``: expert e mixes the bases of group ``e // (n/g)``."""
        self._checked[projection]
        return torch.cat([self._read(mix) for _, mix in self._names(projection)])

    def transform(self, projection: str, expert: int) -> torch.Tensor:
        """A_e ``[p, r]``."""
        self._checked[projection]
        return self._read(self.checkpoint.family.expert_weight(self.index, expert, projection))

    def _read(self, name: str) -> torch.Tensor:
        return self._finite(name, self.checkpoint.get(name))

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise MobeError(
                f"{self.checkpoint.path}: tensor {name} holds NaN or Inf; factorize the model again"
            )
        return tensor


class MobeCheckpoint(Checkpoint):
    """A directory of MoBE factors.  Raises MobeError if it is an ordinary model."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        if not self.is_mobe:
            raise MobeError(
                f"{self.path} is not a MoBE checkpoint: config.json has no num_B and there are no B_gate tensors. "
                f"Factorize it first:\n  mobe-gguf factorize {self.path} {str(self.path).rstrip('/')}-mobe"
            )
        self._layers: dict[int, MobeLayer] = {}

    @cached_property
    def activation(self) -> str:
        """f: one of ``names.ACTIVATIONS``."""
        activation = self.config.get("activation")
        if activation not in ACTIVATIONS:
            raise MobeError(
                f"{self.path}/config.json: 'activation' is {activation!r}; known: {', '.join(sorted(ACTIVATIONS))}"
            )
        return activation

    def layer(self, index: int) -> MobeLayer:
        """The MoE layer ``index``; one without bases is an ordinary layer, its ``projections`` are empty."""
        if index not in self.moe_layers:
            raise MobeError(
                f"{self.path}: layer {index} has no routed experts; MoE layers are {list(self.moe_layers)}"
            )
        return self._layers.setdefault(index, MobeLayer(self, index))


def reconstruct(layer: MobeLayer, projection: str) -> torch.Tensor:
    """The experts' matrices that the factors stand for, float32 ``[n, p, d]``: ``A_i f(sum_j alpha_ij B_j)``.

    For a projection that is not factorized, the original matrices.
    """
    checkpoint = layer.checkpoint
    if projection not in layer.projections:
        return checkpoint.expert_stack(layer.index, projection)
    u = combine_groups(layer.mix(projection), layer.basis(projection), layer.group_count(projection))
    z = activate(u, checkpoint.activation)
    return torch.stack([layer.transform(projection, e) @ z[e] for e in range(checkpoint.n_expert)])
