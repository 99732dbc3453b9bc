"""Open a path: a model in any supported format, or a directory with a model or factors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.safetensors import Entry
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.config_values import Judgement
from mobe_gguf.models.factors import ModelDirectory
from mobe_gguf.models.families import Family
from mobe_gguf.models.gguf_factors import GgufFactors
from mobe_gguf.models.gguf_source import FACTORS_NAME, GgufModel
from mobe_gguf.models.layout import ExpertLayout
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint


class SourceModel(Protocol):
    """What every user of a model's weights asks of it.  Sizes as in the formula."""

    path: Path
    family: Family

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def is_mobe(self) -> bool: ...
    @property
    def moe_layers(self) -> tuple[int, ...]: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_expert(self) -> int: ...
    @property
    def n_expert_used(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_ff_exp(self) -> int:
        """p, of the layer with the widest experts."""

    def width(self, layer: int) -> int:
        """p of a layer's experts."""

    @property
    def checksum(self) -> str: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def matrix(self, name: str) -> torch.Tensor: ...


class Original(SourceModel, Protocol):
    """The interface that factorizing needs; ``Checkpoint`` and ``GgufModel`` implement it."""

    @property
    def directory(self) -> Checkpoint | None:
        """The model itself if it is a Hugging Face directory; everything not factorized is then copied to the output."""

    @property
    def config_name(self) -> str:
        """Name of the file that describes the output: the model's ``config`` plus the factors' entries."""

    @property
    def config_file(self) -> dict[str, Any]:
        """The content of that file for the model itself."""

    @property
    def n_params(self) -> int: ...

    def kept_bytes(self, units: list[tuple[int, str]]) -> int:
        """Bytes of the model that are copied to the output when ``(layer, projection)`` ``units`` are factorized."""

    def copies(self, units: Iterable[tuple[int, str]]) -> list[Entry]:
        """The tensors that are copied: all except the matrices of the ``units``."""

    def small_files(self) -> list[Path]:
        """Files other than weights that are copied, too."""

    def layout(self, layer: int) -> ExpertLayout: ...
    def expert_shape(self, layer: int, projection: str) -> tuple[int, int]: ...
    def expert_sources(self, layer: int, projection: str) -> tuple[str, ...]: ...
    def routed_scale(self) -> Any: ...
    def stream_writers(self, layer: int) -> list[tuple[str, str]]: ...
    def embedding_rows(self, count: int) -> torch.Tensor | None: ...
    def check_whole(self) -> None: ...
    def check_values(self) -> Judgement: ...
    def check_experts(self, layer: int, projection: str) -> None: ...
    def expert(self, layer: int, projection: str, index: int) -> torch.Tensor: ...
    def expert_stack(self, layer: int, projection: str) -> torch.Tensor: ...


def open_original(path: str | os.PathLike[str]) -> Original:
    """Open a file as GGUF, a directory as a Hugging Face model.  MobeError if it is something else."""
    path = Path(path)
    if path.is_file():
        return GgufModel(path)
    if (path / FACTORS_NAME).is_file():
        raise MobeError(
            f"{path} holds factors of a GGUF file already. Export them:\n  mobe-gguf export {path} model.gguf --quant q4_k"
        )
    return Checkpoint(path)


def open_directory(path: Path) -> ModelDirectory:
    """Open factors of a GGUF file, a MoBE checkpoint or an ordinary model.  MobeError if it is none of these, or damaged."""
    if (path / FACTORS_NAME).is_file():
        return GgufFactors(path)
    checkpoint = Checkpoint(path)
    return MobeCheckpoint(path) if checkpoint.is_mobe else checkpoint
