"""The model as the stages of an export see it, independent of its source.

There are two kinds of :class:`Conversion`: ``converter.HfConversion`` is a Hugging Face directory that llama.cpp's
converter reads; ``gguf_target.GgufConversion`` is a GGUF file that factors are put back into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mobe_gguf.export.origin import Origin
from mobe_gguf.export.source import Source, Tensor
from mobe_gguf.export.tokenizer import Recognized
from mobe_gguf.export.write import Encoded, Head
from mobe_gguf.quant.recipe import Choice, Recipe


class KeyWriter(Protocol):
    """Takes keys of the file (``gguf.GGUFWriter`` is one)."""

    def add_uint32(self, key: str, val: int) -> None: ...

    def add_bool(self, key: str, val: bool) -> None: ...

    def add_float32(self, key: str, val: float) -> None: ...

    def add_string(self, key: str, val: str) -> None: ...


class Conversion(Protocol):
    """A model before a byte of the file is written."""

    arch: str
    tensors: dict[str, Tensor]
    pre: Recognized | None
    notes: list[str]

    @property
    def writer(self) -> KeyWriter: ...

    @property
    def keys(self) -> dict[str, Any]:
        """Keys and values set so far."""

    @property
    def alignment(self) -> int:
        """Alignment of each tensor's data, in bytes."""

    def files(self) -> list[Path]:
        """Files that it reads besides the checkpoint's own."""

    def replace(self, name: str, source: Source) -> None:
        """Give the existing tensor ``name`` other values; their shape may differ."""

    def without_keys(self, names: Iterable[str]) -> None:
        """Take back keys that were set."""

    def finish(self, file_type: str, out: Path, origin: Origin | None = None) -> None:
        """Set the remaining keys; ``file_type`` as in ``gguf.LlamaFileType``."""

    def choose(self, recipe: Recipe) -> dict[str, Choice]:
        """The type of every tensor.  UsageError as ``recipe.plan``."""

    def is_copied(self, name: str, choice: Choice) -> bool:
        """Whether the tensor passes through as it is stored."""

    def header(self, shards: list[list[Encoded]], index: int) -> Head:
        """The head of file ``index`` of ``shards``; the first has the keys."""


def add_keys(writer: KeyWriter, values: Mapping[str, str | int | float]) -> None:
    """Set keys: texts, truth values, whole numbers as u32, others as f32."""
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
