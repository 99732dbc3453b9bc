"""The interface between export and directories with a model or factors, and the factors themselves.

Four classes are a :class:`ModelDirectory`: ``Checkpoint``, an ordinary model, and three of the kind :class:`FactorDirectory`:
``MobeCheckpoint``, ``GgufFactors`` and ``WabCheckpoint``.  All differences between them are methods or attributes here.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.names import ACTIVATIONS, ALL_PROJECTIONS
from mobe_gguf.core.sides import side
from mobe_gguf.models.config_values import Judgement
from mobe_gguf.models.gguf_source import GgufModel
from mobe_gguf.models.tensors import Tensors, all_finite


def recorded(config: Mapping[str, Any], *path: str) -> Any:
    """The value that ``factorize`` recorded at ``path`` below the key ``mobe`` of config.json or factors.json; None if none."""
    value: Any = config
    for key in ("mobe", *path):
        value = value.get(key) if isinstance(value, dict) else None
    return value


class ModelDirectory(Tensors, ABC):
    """A directory of safetensors with a model's experts or their factors.  Sizes as in the formula."""

    #: What ``inspect`` calls it.
    kind: str

    #: Its config.json, or the equivalent.
    config: dict[str, Any]

    @property
    def factors(self) -> FactorDirectory | None:
        """The directory, if it has factors; None for an ordinary model."""
        return None

    @property
    @abstractmethod
    def original_checksum(self) -> str | None:
        """Checksum of the original model; for factors the recorded one, which may be missing."""

    @property
    @abstractmethod
    def n_layer(self) -> int: ...
    @property
    @abstractmethod
    def n_expert(self) -> int: ...
    @property
    @abstractmethod
    def n_expert_used(self) -> int: ...
    @property
    @abstractmethod
    def n_embd(self) -> int: ...
    @property
    @abstractmethod
    def n_ff_exp(self) -> int: ...

    @property
    @abstractmethod
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts, or with their factors."""

    @abstractmethod
    def missing(self) -> list[str]:
        """Required tensors that the directory lacks, other than the experts' own."""

    @abstractmethod
    def check_whole(self) -> None:
        """MobeError unless the directory is complete and all shapes are right.  Reads headers only."""

    @abstractmethod
    def check_values(self) -> Judgement:
        """How to carry the values of its config that a GGUF file would not compute by default.  MobeError if one cannot be
        carried."""

    @abstractmethod
    def expert_sources(self, layer: int, projection: str) -> tuple[str, ...]:
        """Names of the tensors that hold the experts' matrices or their A's, scales included."""

    @abstractmethod
    def expert_names(self) -> set[str]:
        """All tensors that hold experts or A's."""

    @abstractmethod
    def expert(self, layer: int, projection: str, index: int) -> torch.Tensor:
        """One routed expert's original matrix, float32 ``[p, d]`` (``[d, p]`` for down)."""

    @abstractmethod
    def expert_stack(self, layer: int, projection: str) -> torch.Tensor:
        """All routed experts' original matrices of one layer, float32 ``[n, p, d]`` (``[n, d, p]`` for down)."""

    def gguf_source(self, path: str | os.PathLike[str] | None) -> GgufModel | None:
        """The GGUF file with everything except the factors.  None if everything is in this directory; then a ``path`` raises
        UsageError."""
        if path is not None:
            raise UsageError(
                f"--source is for factors of a GGUF file, and {self.path} is a Hugging Face directory"
            )
        return None

    def width(self, layer: int) -> int:
        """p of a layer's experts."""
        return self.n_ff_exp

    def expert_shape(self, layer: int, projection: str) -> tuple[int, int]:
        """``[p, d]`` of gate and up, ``[d, p]`` of down, from config.json."""
        return side(projection).matrix(self.width(layer), self.n_embd)

    def is_fused(self, layer: int, projection: str) -> bool:
        """True if the layer's experts are stored in one tensor, :meth:`fused_name`."""
        return self.family.expert_weight(layer, 0, projection) not in self and any(
            name in self for name in self.family.fused_weights(layer, projection)
        )

    def fused_name(self, layer: int, projection: str) -> str:
        """The tensor with all experts of a layer; one of :meth:`Family.fused_weights`."""
        found = self.family.fused_weights(layer, projection)
        return next((name for name in found if name in self), found[0])


class MobeLayer:
    """One MoE layer of a :class:`FactorDirectory`.  All tensors are returned as float32."""

    def __init__(self, checkpoint: FactorDirectory, index: int):
        self.checkpoint = checkpoint
        self.index = index

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """The factorized projections among ``gate``, ``up`` and ``down``; empty for an ordinary layer."""
        left_out = self.checkpoint.left_out
        return tuple(p for p in ALL_PROJECTIONS if self._names(p) and (self.index, p) not in left_out)

    def _names(self, projection: str) -> list[tuple[str, str]]:
        """``(basis, mix)`` tensor names, one pair for each group."""
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
        """``(g, m, r)`` of a projection.  MobeError names the tensor if the shapes do not agree."""
        c = self.checkpoint
        pairs = self._names(projection)
        n, d, p, g = c.n_expert, c.n_embd, c.width(self.index), len(pairs)
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
        return side(projection).transform(self.checkpoint.width(self.index), self.rank(projection))

    def is_row_mixed(self, projection: str) -> bool:
        """True if every row of the basis has its own mixing weights."""
        self._checked[projection]
        return len(self.checkpoint.shape(self._names(projection)[0][1])) == 3

    def basis(self, projection: str) -> torch.Tensor:
        """B ``[m, r, d]`` (of down ``[m, d, r]``), groups one after the other."""
        self._checked[projection]
        return torch.cat([self._read(basis) for basis, _ in self._names(projection)])

    def basis_matrix(self, projection: str, index: int) -> torch.Tensor:
        """B_j ``[r, d]`` (of down ``[d, r]``) in its stored type, read alone; ``index`` counts over all groups."""
        g, m, _ = self._checked[projection]
        name = self._names(projection)[index // (m // g)][0]
        return self._finite(name, self.checkpoint.get_row(name, index % (m // g)))

    def group_basis(self, projection: str, group: int) -> torch.Tensor:
        """B of one group ``[m/g, r, d]`` (of down ``[m/g, d, r]``), read alone and without a second copy in memory."""
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


class FactorDirectory(ModelDirectory):
    """A directory whose experts are factors, in the directory or beside it."""

    #: The class that :meth:`layer` returns.
    layer_class: type[MobeLayer] = MobeLayer

    #: Whether A's have the names of the experts that they replace, so that the model's converter stacks them.
    under_expert_names = True

    @property
    def factors(self) -> FactorDirectory:
        return self

    @property
    def original_checksum(self) -> str | None:
        return recorded(self.config, "source_checksum")

    def original_path(self, given: str | os.PathLike[str] | None) -> Path | None:
        """Path of the model from which the factors were made: the user's, or the one that ``factorize`` recorded; None if neither
        is known."""
        source = recorded(self.config, "source") if given is None else given
        return Path(source) if isinstance(source, str | os.PathLike) else None

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
        """The MoE layer ``index``.  An ordinary layer has no bases, and its ``projections`` are empty."""
        if index not in self.moe_layers:
            raise MobeError(
                f"{self.path}: layer {index} has no routed experts; MoE layers are {list(self.moe_layers)}"
            )
        return self._layers.setdefault(index, self.layer_class(self, index))

    @cached_property
    def _layers(self) -> dict[int, MobeLayer]:
        return {}

    @cached_property
    def left_out(self) -> frozenset[tuple[int, str]]:
        """Layers and projections whose factors are not used, see :meth:`leave_out`."""
        return frozenset()

    def leave_out(self, units: Iterable[tuple[int, str]]) -> None:
        """Treat these layers and projections as ordinary ones from now on."""
        self.left_out = self.left_out | frozenset(units)
        self._layers.clear()

    @property
    def any_left(self) -> bool:
        """Whether any layer has factors that are used."""
        return any(self.layer(index).projections for index in self.moe_layers)
