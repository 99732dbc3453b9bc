"""Sizes of a GGUF file, all its parts together where it is split."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.errors import MobeError
from mobe_gguf.export.report import Entry, original_params
from mobe_gguf.gguf_file import GgufFile, read_gguf

#: ``model-00001-of-00003.gguf``, llama.cpp's names of the parts of a split file.
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Facts:
    """``path`` as given (of a split file: its first part); ``n_bytes`` on disk, ``tensor_bytes`` of them data.

    ``original_params``: parameters with the experts as they were before factorization, ``n_params`` as they are in the
    file.  ``context``: tokens that the model was trained on at once, None if the file does not say.
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
        """Bits of tensor data for each number in the file."""
        return 8 * self.tensor_bytes / self.n_params

    @property
    def bits_per_original_weight(self) -> float:
        """Bits of tensor data for each parameter of the original: of plain files the same as the other."""
        return 8 * self.tensor_bytes / self.original_params


def facts_of(path: str | os.PathLike[str]) -> Facts:
    """MobeError if it is no GGUF file with tensors, or a part of it is missing."""
    first = read_gguf(path)
    parts = [first, *(read_gguf(part) for part in _other_parts(first))]
    entries = [Entry(t.name, t.type, t.shape, t.n_bytes) for part in parts for t in part.tensors.values()]
    if not entries:
        raise MobeError(f"{path}: it holds no tensors, so there is no model to evaluate")
    context = first.arch_key("context_length")
    return Facts(
        path=Path(path),
        arch=first.arch,
        n_bytes=sum(part.size for part in parts),
        tensor_bytes=sum(entry.n_bytes for entry in entries),
        n_params=sum(entry.n_params for entry in entries),
        original_params=original_params(entries),
        factorized=any("_basis.weight" in entry.name for entry in entries),
        context=context if isinstance(context, int) else None,
    )


def _other_parts(first: GgufFile) -> list[Path]:
    """Paths of parts 2 and on of a split file; MobeError if ``first`` is not its first, or misnamed."""
    count = first.keys.get("split.count", 0)
    if count <= 1:
        return []
    name = SPLIT_NAME.fullmatch(first.path.name)
    if name is None or int(name[2]) != 1 or int(name[3]) != count:
        raise MobeError(
            f"{first.path}: it is one of {count} parts of a split file; name the first part, as "
            f"...-00001-of-{count:05d}.gguf, or join them: llama-gguf-split --merge"
        )
    return [first.path.with_name(f"{name[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)]
