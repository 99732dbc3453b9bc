"""Reading MoBE checkpoints: ours and the authors' published ones (docs/format.md, "MoBE checkpoint").

    W_i ~ A_i . f( sum_{j in group(i)} alpha_ij B_j )

Tensors, with ``block`` = the family's MoE block (``model.layers.L.mlp``):
``block.B_gate [m, r, d]``, ``block.W_gate [n, m]`` or ``[n, m, r]``; in groups ``block.B_gate_0 [m/g, r, d]``,
``block.W_gate_0 [n/g, m/g]``, ...; A_e ``[p, r]`` under the expert's original name.  Down, which only our own files
factorize, has its bases on the output side, ``W_i ~ f(sum_j alpha_ij B_j) . A_i``: ``block.B_down [m, d, r]``, A_e ``[r, p]``,
and ``[n, m, d]`` for a mix row by row.  config.json holds ``num_B`` and ``activation``.  Shapes come from the tensors; the
``mobe`` key that our own files have is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.names import ACTIVATIONS, ALL_PROJECTIONS
from mobe_gguf.core.sides import side
from mobe_gguf.models.checkpoint import Checkpoint, all_finite


def recorded(config: Mapping[str, Any], *path: str) -> Any:
    """What ``factorize`` noted under the key ``mobe`` of config.json or factors.json, ``path`` further down; None if nothing."""
    value: Any = config
    for key in ("mobe", *path):
        value = value.get(key) if isinstance(value, dict) else None
    return value


class MobeLayer:
    """One MoE layer of a MoBE checkpoint.  All tensors come out as float32."""

    def __init__(self, checkpoint: MobeCheckpoint, index: int):
        self.checkpoint = checkpoint
        self.index = index

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """The factorized projections, of ``gate``, ``up`` and ``down``; empty for an ordinary layer."""
        return tuple(p for p in ALL_PROJECTIONS if self._names(p))

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

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that are a basis or a mix of this layer."""
        return tuple(name for p in self.projections for pair in self._names(p) for name in pair)

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
        first, on = c.shape(pairs[0][0]), side(projection)
        if len(first) != 3 or first[on.d_axis] != d:
            form = on.basis_form.format(d=d)
            raise MobeError(f"{c.path}: tensor {pairs[0][0]} has shape {list(first)}, expected {form}")
        m_group, rows, _ = first
        r = first[on.r_axis]
        for basis, mix in pairs:
            c.expect_shape(basis, first, f"as {pairs[0][0]}")
            shape = c.shape(mix)
            if shape not in ((n // g, m_group), (n // g, m_group, rows)):
                raise MobeError(
                    f"{c.path}: tensor {mix} has shape {list(shape)}, expected {[n // g, m_group]}, or "
                    f"{[n // g, m_group, rows]} when mixed row by row, from the shape of {basis}"
                )
            c.expect_shape(mix, c.shape(pairs[0][1]), f"as {pairs[0][1]}")
        for e in range(n):
            c.expect_shape(
                c.family.expert_weight(self.index, e, projection),
                on.transform(p, r),
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

    def basis_shape(self, projection: str) -> tuple[int, int]:
        """Shape of one basis: ``(r, d)``, of down ``(d, r)``."""
        return side(projection).basis(self.rank(projection), self.checkpoint.n_embd)

    def transform_shape(self, projection: str) -> tuple[int, int]:
        """Shape of one expert's A: ``(p, r)``, of down ``(r, p)``."""
        return side(projection).transform(self.checkpoint.n_ff_exp, self.rank(projection))

    def is_row_mixed(self, projection: str) -> bool:
        """True if every row of the basis has mixing weights of its own."""
        self._checked[projection]
        return len(self.checkpoint.shape(self._names(projection)[0][1])) == 3

    def basis(self, projection: str) -> torch.Tensor:
        """B ``[m, r, d]`` (of down ``[m, d, r]``), groups one after the other."""
        self._checked[projection]
        return torch.cat([self._read(basis) for basis, _ in self._names(projection)])

    def basis_matrix(self, projection: str, index: int) -> torch.Tensor:
        """B_j ``[r, d]`` (of down ``[d, r]``) in its stored type, read without the others; ``index`` counts through the groups."""
        g, m, _ = self._checked[projection]
        name = self._names(projection)[index // (m // g)][0]
        return self._finite(name, self.checkpoint.get_row(name, index % (m // g)))

    def group_basis(self, projection: str, group: int) -> torch.Tensor:
        """B of one group ``[m/g, r, d]`` (of down ``[m/g, d, r]``), read without the others and not held twice."""
        m = self.n_basis(projection) // self.group_count(projection)
        out = torch.empty(m, *self.basis_shape(projection))
        for j in range(m):
            out[j] = self.basis_matrix(projection, group * m + j)
        return out

    def mix(self, projection: str) -> torch.Tensor:
        """alpha ``[n, m/g]``, or ``[n, m/g, r]`` (of down ``[n, m/g, d]``): expert e mixes the bases of group ``e // (n/g)``."""
        self._checked[projection]
        return torch.cat([self._read(mix) for _, mix in self._names(projection)])

    def transform(self, projection: str, expert: int) -> torch.Tensor:
        """A_e ``[p, r]``, of down ``[r, p]``."""
        self._checked[projection]
        return self._read(self.checkpoint.family.expert_weight(self.index, expert, projection))

    def _read(self, name: str) -> torch.Tensor:
        return self._finite(name, self.checkpoint.get(name)).float()

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not all_finite(tensor):
            raise MobeError(
                f"{self.checkpoint.path}: tensor {name} holds NaN or Inf; factorize the model again"
            )
        return tensor


class MobeCheckpoint(Checkpoint):
    """A directory of MoBE factors.  Raises MobeError if it is an ordinary model."""

    #: What :meth:`layer` gives.
    layer_class: type[MobeLayer] = MobeLayer

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        if not self.is_mobe:
            mend = f"Factorize it first:\n  mobe-gguf factorize {self.path} {str(self.path).rstrip('/')}-mobe"
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
        return self._layers.setdefault(index, self.layer_class(self, index))

    def ordinary(self, layer: int) -> tuple[str, ...]:
        """Projections of a MoE layer that are not factorized."""
        return tuple(p for p in ALL_PROJECTIONS if p not in self.layer(layer).projections)

    @cached_property
    def _layers(self) -> dict[int, MobeLayer]:
        return {}


#: Bytes of combined bases that :class:`Reconstruction` holds at a time, if they are of more than one expert; twice that
#: while f is applied.
BATCH_BYTES = 128 << 20


class Reconstruction:
    """The matrices that a projection's factors stand for, float32 ``[p, d]`` each: ``A_i f(sum_j alpha_ij B_j)``.

    ``Reconstruction(layer, "gate")(i)`` is that of expert i.  Memory: one group's bases and some combinations of them,
    until the last expert was asked for; so ask in order.
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
        """``f(sum_j alpha_ij B_j)`` of ``expert`` and as many of its group after it as BATCH_BYTES allow."""
        layer, projection = self.layer, self.projection
        n_group = layer.checkpoint.n_expert // layer.group_count(projection)
        group, index = divmod(expert, n_group)
        self._combined = ()
        if group != self._group:
            self._basis = None  # not two groups' at a time
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
