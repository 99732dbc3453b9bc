"""Factors of a GGUF file: what ``mobe-gguf factorize model.gguf OUT`` writes and ``mobe-gguf export`` reads.

They are a directory of safetensors with an index.  Tensors are named as in a MoBE checkpoint whose MoE block is ``blk.L``.
``factors.json`` has the model's sizes, ``num_B``, ``activation`` and the key ``mobe`` of a MoBE checkpoint's config.json.
Everything else stays in the GGUF file.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.safetensors import INDEX_NAME, read_json
from mobe_gguf.models.config_values import Judgement
from mobe_gguf.models.factors import FactorDirectory
from mobe_gguf.models.gguf_source import FACTORS_NAME, GgufModel, family


class GgufFactors(FactorDirectory):
    """A directory of factors, read like a MoBE checkpoint.  It contains only the factorized projections of each layer.

    Raises MobeError if ``factors.json`` or a shard is missing or damaged.
    """

    kind = "factors"
    under_expert_names = False

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        self.config = read_json(path / FACTORS_NAME)
        arch = self.config.get("architecture")
        if not isinstance(arch, str) or not isinstance(self.config.get("mobe"), dict):
            raise MobeError(
                f"{path / FACTORS_NAME}: no 'architecture' or no 'mobe'; expected what mobe-gguf factorize writes"
            )
        if not (path / INDEX_NAME).is_file():
            raise MobeError(f"{path}: {INDEX_NAME} is missing; factorize the model again")
        self.arch = arch
        super().__init__(path, family(arch))

    def _size(self, key: str) -> int:
        value = self.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MobeError(f"{self.path / FACTORS_NAME}: '{key}' is {value!r}, expected a positive number")
        return value

    @property
    def n_layer(self) -> int:
        return self._size("n_layer")

    @property
    def n_expert(self) -> int:
        return self._size("n_expert")

    @property
    def n_expert_used(self) -> int:
        return self._size("n_expert_used")

    @property
    def n_embd(self) -> int:
        return self._size("n_embd")

    @property
    def n_ff_exp(self) -> int:
        return self._size("n_ff_exp")

    def width(self, layer: int) -> int:
        """p of a layer's experts: ``n_ff_exp``, unless layers differ."""
        widths = self.config.get("n_ff_exp_of")
        if widths is None:
            return self.n_ff_exp
        value = widths.get(str(layer)) if isinstance(widths, dict) else None
        if type(value) is not int or value < 1:
            raise MobeError(
                f"{self.path / FACTORS_NAME}: 'n_ff_exp_of' must have a positive number for layer {layer}"
            )
        return value

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have factors; others may have experts in the GGUF file."""
        found = (re.match(r"blk\.(\d+)\.B_", name) for name in self.names)
        return tuple(sorted({int(match[1]) for match in found if match}))

    def missing(self) -> list[str]:
        """Always empty: everything except the factors is in the GGUF file, see :meth:`open_source`."""
        return []

    def check_whole(self) -> None:
        """MobeError unless the shapes of all factors agree."""
        for index in self.moe_layers:
            layer = self.layer(index)
            for projection in layer.projections:
                layer.rank(projection)

    def check_values(self) -> Judgement:
        """Nothing to check: the GGUF file's keys are those that the runtime reads."""
        return Judgement()

    def expert_sources(self, layer: int, projection: str) -> tuple[str, ...]:
        """Names of the A's if the projection is factorized; else empty, because its matrices are in the GGUF file."""
        names = (self.family.expert_weight(layer, e, projection) for e in range(self.n_expert))
        return tuple(name for name in names if name in self)

    def expert_names(self) -> set[str]:
        units = ((layer, p) for layer in self.moe_layers for p in self.layer(layer).projections)
        return {name for unit in units for name in self.expert_sources(*unit)}

    def expert(self, layer: int, projection: str, index: int) -> torch.Tensor:
        """An expert's matrix, from the GGUF file."""
        return self.open_source().expert(layer, projection, index)

    def expert_stack(self, layer: int, projection: str) -> torch.Tensor:
        """The experts' matrices, from the GGUF file."""
        return self.open_source().expert_stack(layer, projection)

    def original_path(self, given: str | os.PathLike[str] | None) -> Path:
        """The GGUF file.  MobeError if it is missing or another model."""
        return self.open_source(given).path

    def gguf_source(self, path: str | os.PathLike[str] | None) -> GgufModel:
        return self.open_source(path)

    def open_source(self, path: str | os.PathLike[str] | None = None) -> GgufModel:
        """Open the GGUF file from which these factors were made, at ``path`` or at its recorded place.

        MobeError if it is missing or another model.
        """
        mobe = self.config["mobe"]
        recorded = Path(str(mobe.get("source")))
        places = [recorded, self.path.absolute().parent / recorded.name] if path is None else [Path(path)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise MobeError(
                f"{self.path} holds factors of {recorded}, and all else that a model needs is in that file, but "
                f"{places[0]} does not exist. Say where it is:\n  mobe-gguf export {self.path} OUT.gguf --source FILE ..."
            )
        model = GgufModel(found)
        model.check_whole()
        if model.checksum != mobe.get("source_checksum"):
            raise MobeError(
                f"{found} is not the file that {self.path} holds factors of: its checksum is {model.checksum[:12]}..., "
                f"expected {str(mobe.get('source_checksum'))[:12]}... ({recorded}; types, shapes and samples of the tensors "
                "count, metadata do not). Give that file with --source, or factorize this one."
            )
        return model
