"""Sizes of a GGUF file, all its parts together where it is split."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.contents import ListedTensor, original_params
from mobe_gguf.formats.gguf import read_model


@dataclass(frozen=True)
class Facts:
    """``path`` as given (for a split file its first part); ``n_bytes`` on disk, ``tensor_bytes`` of them tensor data.

    ``original_params``: parameters before factorization; ``n_params``: parameters in the file.  ``context``: the
    model's training context in tokens, None if the file does not say.
    """

    path: Path
    arch: str
    n_bytes: int
    tensor_bytes: int
    n_params: int
    original_params: int
    factorized: bool
    context: int | None

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per parameter in the file."""
        return 8 * self.tensor_bytes / self.n_params

    @property
    def bits_per_original_weight(self) -> float:
        """Bits of tensor data per parameter of the original; for plain files equal to :attr:`bits_per_weight`."""
        return 8 * self.tensor_bytes / self.original_params


def facts_of(path: str | os.PathLike[str]) -> Facts:
    """Sizes of the file at ``path``.  MobeError if it is not a GGUF file with tensors, or a part of it is missing."""
    file = read_model(path)
    entries = [ListedTensor(t.name, t.type, t.shape, t.n_bytes) for t in file.tensors.values()]
    if not entries:
        raise MobeError(f"{path}: it holds no tensors, so there is no model to evaluate")
    context = file.arch_key("context_length")
    return Facts(
        path=Path(path),
        arch=file.arch,
        n_bytes=file.size,
        tensor_bytes=sum(entry.n_bytes for entry in entries),
        n_params=sum(entry.n_params for entry in entries),
        original_params=original_params(entries),
        factorized=any("_basis.weight" in entry.name for entry in entries),
        context=context if isinstance(context, int) else None,
    )
