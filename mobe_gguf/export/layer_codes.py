"""The codes of one layer's experts in a run in sequence: what is rounded there, and the factors that are as the file has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch

from mobe_gguf.calibrate.runnable import Runnable
from mobe_gguf.core import names
from mobe_gguf.core.metric import Roots
from mobe_gguf.export.encoder import encode_rows
from mobe_gguf.export.rounding import matrix, shrunk
from mobe_gguf.export.write import Encoded
from mobe_gguf.formats.moments import Moments
from mobe_gguf.formats.safetensors import Entry
from mobe_gguf.models.factors import MobeLayer
from mobe_gguf.models.mobe_checkpoint import Reconstruction
from mobe_gguf.quant.rounding.rounder import ROUNDED, Outcome, Rounder
from mobe_gguf.runtime import ggml


class GivenMatrices(Protocol):
    """Projections of a layer that are as they are."""

    @property
    def projections(self) -> Collection[str]: ...
    def matrix(self, projection: str, expert: int) -> torch.Tensor:
        """An expert's matrix, float32; they are asked for in order."""

    def entries(self) -> list[Entry]:
        """What the layer's file has of them."""


@dataclass(frozen=True)
class CopiedExperts:
    """Projections that are copied."""

    checkpoint: Runnable
    layer: int
    projections: Collection[str]

    def matrix(self, projection: str, expert: int) -> torch.Tensor:
        return self.checkpoint.expert(self.layer, projection, expert).float()

    def entries(self) -> list[Entry]:
        return []


class WrittenFactors:
    """A layer's factors, encoded into files of ``folder``, and the matrices that they stand for, read back from there.

    ``parts``: the file's tensors of the layer's factors, by name.  It stands in for the layer's :class:`MobeLayer` in a
    :class:`Reconstruction`; memory as there.
    """

    def __init__(self, layer: MobeLayer, parts: Mapping[str, Encoded], folder: Path):
        self.layer, self.parts, self.checkpoint = layer, parts, layer.checkpoint
        self.files = {name: folder / f"scratch-{name}" for name in parts}
        for name, part in parts.items():
            with open(self.files[name], "wb") as file:
                part.tofile(file)
        self._read = {x: Reconstruction(cast(MobeLayer, self), x) for x in layer.projections}

    @property
    def projections(self) -> Collection[str]:
        return self._read

    def matrix(self, projection: str, expert: int) -> torch.Tensor:
        return self._read[projection](expert)

    def entries(self) -> list[Entry]:
        return [Entry.whole(n, "U8", (part.nbytes,), self.files[n]) for n, part in self.parts.items()]

    # what a Reconstruction asks of a layer

    def group_count(self, projection: str) -> int:
        return self.layer.group_count(projection)

    def mix(self, projection: str) -> torch.Tensor:
        name = names.mix_name(self.layer.index, projection)
        return self._stack(name, 0, self.parts[name].tensor.source.shape[0])

    def group_basis(self, projection: str, group: int) -> torch.Tensor:
        name = names.basis_name(self.layer.index, projection)
        size = self.parts[name].tensor.source.shape[0] // self.group_count(projection)
        return self._stack(name, group * size, size)

    def transform(self, projection: str, expert: int) -> torch.Tensor:
        return self._stack(names.transform_name(self.layer.index, projection), expert, 1)[0]

    def _stack(self, name: str, first: int, count: int) -> torch.Tensor:
        """``count`` parts of a tensor along its first dimension, from ``first``."""
        part = self.parts[name]
        shape = part.tensor.source.shape
        size = part.nbytes // shape[0]
        data = np.fromfile(self.files[name], np.uint8, count * size, offset=first * size)
        rows = data.reshape(-1, size // int(np.prod(shape[1:-1])))
        values = torch.from_numpy(ggml.dequantize(rows, part.type, shape[-1]))
        return values.view(count, *shape[1:])


class LayerCodes:
    """The codes of one layer's experts, see ``calibrate.pairs.PairedCodes``; ``given``: projections that are not rounded here."""

    def __init__(
        self,
        moments: Moments,
        layer: int,
        types: Mapping[str, str],
        outcomes: dict[str, Outcome],
        device: str,
        given: Sequence[GivenMatrices] = (),
    ):
        self.moments, self.layer, self.types, self.device = moments, layer, types, device
        self.outcomes, self._given = outcomes, given
        self._by_projection = {x: one for one in given for x in one.projections}
        self._roots: dict[str, tuple[Roots, float]] = {}
        self._made: tuple[torch.Tensor, Rounder] | None = None

    def _name(self, projection: str) -> str:
        return names.transform_name(self.layer, projection)

    @property
    def given(self) -> Collection[str]:
        return self._by_projection

    def matrix(self, projection: str, expert: int) -> torch.Tensor:
        return self._by_projection[projection].matrix(projection, expert)

    def entries(self) -> list[Entry]:
        return [entry for one in self._given for entry in one.entries()]

    def prior(self, projection: str, expert: int) -> torch.Tensor:
        name = self._name(projection)
        stem = self.moments.stem(name)
        assert stem is not None
        if stem not in self._roots:
            roots, scale = self.moments.find(name), self.moments.scale(name)
            assert roots is not None and scale is not None
            self._roots[stem] = roots, scale
        roots, scale = self._roots[stem]
        return matrix(roots, expert).mul_(scale)

    def row_bytes(self, projection: str) -> int:
        kind, n = self._type(projection)
        return ggml.type_info(kind).tensor_bytes((1, n))

    def round(
        self, projection: str, expert: int, w: torch.Tensor, s: torch.Tensor, tokens: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        name = self._name(projection)
        kind, said = self.types[name], f"tensor {name}, matrix {expert}"
        if kind in ROUNDED:
            if self._made is None or self._made[0] is not s:
                self._made = s, Rounder(shrunk(s.clone(), tokens), self.device)
            data, outcome = self._made[1].encode(w, kind, said)
            self.outcomes.setdefault(name, Outcome()).add(outcome)
        else:
            data = encode_rows(w.cpu(), kind, None, said)
        found = torch.from_numpy(np.ascontiguousarray(data)).view(len(w), -1)
        return found, self.decoded(projection, found)

    def decoded(self, projection: str, data: torch.Tensor) -> torch.Tensor:
        kind, n = self._type(projection)
        return torch.from_numpy(ggml.dequantize(data.numpy(), kind, n)).view(len(data), n)

    def _type(self, projection: str) -> tuple[str, int]:
        """The type of its rows, and their length."""
        name = self._name(projection)
        shape = self.moments.shape(name)
        assert shape is not None
        return self.types[name], shape[1]
