"""The source of a layer-by-layer run: a Hugging Face directory or a GGUF file of a known architecture."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mobe_gguf.models.original import SourceModel


class Runnable(SourceModel, Protocol):
    """The interface of a model; ``models.Checkpoint`` and ``gguf_model.GgufCheckpoint`` implement it.  Tensor names are
    transformers'."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def get(self, name: str) -> torch.Tensor: ...
    def expert(self, layer: int, projection: str, index: int) -> torch.Tensor: ...
    def expert_names(self) -> set[str]:
        """The tensors of routed experts among ``names``."""

    def check_whole(self) -> None: ...
    def hf_config(self) -> Any:
        """transformers' config of the model."""
