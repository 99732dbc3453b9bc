"""Reads and checks the head of a GGUF file: keys and tensor table, no tensor data.

gguf-py's reader trusts its input: a truncated file ends in a numpy error about shapes, a huge count in a long loop.
This reader checks every length against the file first, and its errors name the key or tensor.
Format: ggml/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats import types

MAGIC = b"GGUF"
VERSIONS = (2, 3)

#: Default alignment of tensor data.
ALIGNMENT = 32
#: ggml's own limits (GGML_MAX_DIMS, GGML_MAX_NAME less its final zero).
MAX_DIMS = 4
MAX_NAME = 63

#: How many values of an array are kept; more for integers, of which there may be one for each layer.  Of longer arrays
#: (vocabularies) only the first values and the length are kept.
KEPT, KEPT_NUMBERS = 8, 1024

#: MoE architectures whose last norm has another name, or that have none (llama.cpp's ``src/models``).
NO_OUTPUT_NORM = ("lfm2moe", "nomic-bert-moe", "qwen4exp")

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


_INTEGERS = frozenset((0, 1, 2, 3, 4, 5, 10, 11))


def padded(n_bytes: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of ``alignment``."""
    return -(-n_bytes // alignment) * alignment


@dataclass(frozen=True)
class Array:
    """An array value: its length and first elements."""

    length: int
    head: tuple[Any, ...]


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table.  ``shape`` in torch's order: ggml's ne0 last; ``offset`` in ``file``."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int
    file: Path


@dataclass(frozen=True)
class GgufFile:
    """Keys and tensors of one file, in its order.  :func:`read_gguf` makes it.

    ``key_spans``: the bytes of each key with its type and value, as (first byte, byte after the last).
    """

    path: Path
    version: int
    size: int
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]
    key_spans: dict[str, tuple[int, int]]

    @property
    def alignment(self) -> int:
        """Alignment of every tensor's data, in bytes."""
        return self.keys.get("general.alignment", ALIGNMENT)

    @property
    def arch(self) -> str:
        """``general.architecture``; MobeError if it is missing."""
        arch = self.keys.get("general.architecture")
        if not isinstance(arch, str):
            raise MobeError(
                f"{self.path}: key general.architecture is missing, so llama.cpp cannot load this file"
            )
        return arch

    def arch_key(self, name: str) -> Any:
        """Value of ``{arch}.name``, None if there is none; of an array (one value for each layer) the first element."""
        return first_value(self.keys.get(f"{self.arch}.{name}"))

    def arch_number(self, name: str) -> int:
        """Like :meth:`arch_key`, but 0 if there is none; MobeError unless it is a non-negative integer."""
        try:
            return number_of(self.keys, f"{self.arch}.{name}", 0)
        except MobeError as e:
            raise MobeError(f"{self.path}: {e.message}") from e

    def arch_most(self, name: str) -> int:
        """Like :meth:`arch_number`; of an array with one value for each layer the largest."""
        value = self.keys.get(f"{self.arch}.{name}")
        counts = [v for v in value.head if is_count(v)] if isinstance(value, Array) else []
        return max(counts) if counts else self.arch_number(name)

    def text(self, key: str) -> str | None:
        """Value of ``key``, None if there is none; MobeError unless it is a string."""
        value = self.keys.get(key)
        if not isinstance(value, str | None):
            raise MobeError(f"{self.path}: key {key} is {shown(value)}, expected a string")
        return value


def first_value(value: Any) -> Any:
    """Of an array or list with one value for each layer, the first.  llama.cpp uses that one where it asks for no
    particular layer."""
    values = value.head if isinstance(value, Array) else value
    return values[0] if isinstance(values, (list, tuple)) and values else value


def number_of(keys: Mapping[str, Any], key: str, default: int) -> int:
    """The first value of ``key``, ``default`` if there is none; MobeError unless it is a non-negative integer."""
    value = first_value(keys.get(key, default))
    if not is_count(value):
        raise MobeError(f"key {key} is {shown(keys[key])}, expected a whole number that is not negative")
    return value


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a key's value is a non-negative integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def shown(value: Any) -> str:
    """A key's value as text for a message."""
    return f"an array of {value.length}" if isinstance(value, Array) else repr(value)


def missing_tensors(file: GgufFile) -> list[str]:
    """Tensors that llama.cpp requires of any MoE model and that ``file`` (all parts, see :func:`join`) lacks: embeddings,
    the last norm, router and down of each layer with experts."""
    found = (
        re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|gate_up|down)_exps\.weight", name) for name in file.tensors
    )
    layers = sorted({int(match[1]) for match in found if match})
    if not layers:
        return []
    needed = ["token_embd.weight"]
    needed += [] if file.arch in NO_OUTPUT_NORM else ["output_norm.weight"]
    for layer in layers:
        needed += [f"blk.{layer}.ffn_gate_inp.weight", f"blk.{layer}.ffn_down_exps.weight"]
    return [name for name in needed if name not in file.tensors]


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read the head of a GGUF file.

    MobeError, which names the key or tensor, if the file is not GGUF, is truncated or contradicts itself.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise MobeError(
                    f"{path}: {size} bytes are too few for a GGUF file; download or export it again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except OSError as e:
        raise MobeError(f"{path}: cannot be read: {e.strerror or e}") from e


def read_model(path: str | os.PathLike[str]) -> GgufFile:
    """Like :func:`read_gguf`.  If ``path`` is the first file of a split model, the result has the tensors and sizes of all
    its files; each tensor's ``offset`` is that in its own ``file``.

    MobeError also if ``path`` is not the first file, or another file is missing or belongs to another model.
    """
    return join(read_parts(path))


def read_parts(path: str | os.PathLike[str]) -> list[GgufFile]:
    """All files, in order, of the model whose first or only file is ``path``.  MobeError as :func:`read_model`."""
    first = read_gguf(path)
    count = first.keys.get("split.count", 1)
    if not is_count(count):
        raise MobeError(f"{first.path}: key split.count is {shown(count)}, expected the number of files")
    if count <= 1:
        return [first]
    name = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", first.path.name)
    if name is None or int(name[2]) != count or first.keys.get("split.no") != 0:
        raise MobeError(
            f"{first.path}: it is one of {count} files of a split model; name the first part, as "
            f"*-00001-of-{count:05d}.gguf, or join them: llama-gguf-split --merge"
        )
    files = [first]
    for i in range(2, count + 1):
        other = read_gguf(first.path.with_name(f"{name[1]}-{i:05d}-of-{count:05d}.gguf"))
        if (other.keys.get("split.no"), other.keys.get("split.count")) != (i - 1, count):
            raise MobeError(
                f"{other.path}: its keys split.no and split.count are not those of file {i} of {count}"
            )
        files.append(other)
    return files


def join(files: Sequence[GgufFile]) -> GgufFile:
    """The files from :func:`read_parts` as one.  MobeError if they belong to different models."""
    first, count = files[0], len(files)
    if count == 1:
        return first
    tensors = {name: info for file in files for name, info in file.tensors.items()}
    expected = first.keys.get("split.tensors.count")
    if len(tensors) != expected:
        raise MobeError(
            f"{first.path}: the {count} files hold {len(tensors)} tensors, split.tensors.count is {expected}; they are of "
            "different models. Download or export them again."
        )
    return replace(first, size=sum(file.size for file in files), tensors=tensors)


class _Reader:
    """A cursor over the mapped file; ``where`` tells errors what was being read."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0
        self.where = "the header"
        self.key_spans: dict[str, tuple[int, int]] = {}

    def read(self) -> GgufFile:
        if self.take(4) != MAGIC:
            part = self.path.suffix in (".json", ".safetensors")
            mend = (
                f". A model of the Hugging Face form is named by its directory: {self.path.parent}"
                if part
                else ""
            )
            raise MobeError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF'){mend}")
        version = self.number("<I")
        if version not in VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0]
            kind = "it is big-endian" if swapped in VERSIONS else f"its version is {version}"
            raise MobeError(f"{self.path}: GGUF of versions 2 and 3, little-endian, can be read; {kind}")
        n_tensors, n_keys = self.number("<Q"), self.number("<Q")
        keys = self.keys(n_keys)
        alignment = keys.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.broken(f"general.alignment is {alignment!r}, expected a power of two")
        table = self.table(n_tensors)
        self.where = "the tensor table"
        start = padded(self.at, alignment)
        tensors = {name: self.place(entry, start, alignment) for name, entry in table.items()}
        return GgufFile(self.path, version, self.size, keys, tensors, self.key_spans)

    def keys(self, count: int) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for i in range(count):
            self.where = f"key {i} of {count}"
            begin = self.at
            name = self.string()
            self.where = f"key {name}"
            if name in keys:
                raise self.broken("it occurs twice")
            keys[name] = self.value(self.number("<I"))
            self.key_spans[name] = (begin, self.at)
        return keys

    def value(self, kind: int) -> Any:
        if kind == _ARRAY:
            return self.array(self.number("<I"), self.number("<Q"))
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise self.broken(f"value type {kind} is not known")
        return self.number(_SCALARS[kind])

    def array(self, kind: int, count: int) -> Array:
        if kind != _STRING and kind not in _SCALARS:
            raise self.broken(f"an array of value type {kind} is not known")
        read: Callable[[], Any] = self.string if kind == _STRING else lambda: self.number(_SCALARS[kind])
        kept = KEPT_NUMBERS if kind in _INTEGERS else KEPT
        head = tuple(read() for _ in range(min(count, kept)))
        if kind == _STRING:
            for _ in range(count - len(head)):
                self.skip(self.number("<Q"))
        else:
            self.skip((count - len(head)) * struct.calcsize(_SCALARS[kind]))
        return Array(count, head)

    def table(self, count: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Name -> (name, shape, type number, offset in the data)."""
        table = {}
        for i in range(count):
            self.where = f"tensor {i} of {count}"
            name = self.string()
            self.where = f"tensor {name!r}"
            if not 0 < len(name.encode()) <= MAX_NAME or name in table:
                raise self.broken("its name is empty, too long, or occurs twice")
            n_dims = self.number("<I")
            if not 1 <= n_dims <= MAX_DIMS:
                raise self.broken(f"it has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
            shape = tuple(self.number("<Q") for _ in range(n_dims))
            if math.prod(shape) == 0 or math.prod(shape) >= 1 << 63:
                raise self.broken(f"its shape {list(shape)} is impossible")
            table[name] = (name, shape[::-1], self.number("<I"), self.number("<Q"))
        return table

    def place(self, entry: tuple[str, tuple[int, ...], int, int], start: int, alignment: int) -> GgufTensor:
        name, shape, number, offset = entry
        self.where = f"tensor {name!r}"
        kind = types.BY_ID.get(number)
        if kind is None:
            raise self.broken(
                f"ggml type {number} is not known; the file is damaged, or newer than this program"
            )
        if shape[-1] % kind.block:
            raise self.broken(
                f"rows of {shape[-1]} values cannot have type {kind.name} (blocks of {kind.block})"
            )
        n_bytes = math.prod(shape) // kind.block * kind.bytes
        if offset % alignment or start + offset + n_bytes > self.size:
            raise self.broken(
                f"its data ({n_bytes} bytes from {start + offset}) lie outside the file ({self.size} bytes) or off the "
                "alignment; the file is cut off or damaged"
            )
        return GgufTensor(name, shape, kind.name, start + offset, n_bytes, self.path)

    def take(self, n: int) -> bytes:
        begin = self.at
        self.skip(n)
        return self.data[begin : self.at]

    def skip(self, n: int) -> None:
        if n > self.size - self.at:
            raise self.broken(
                f"{n} bytes are needed from byte {self.at} on, but the file ends at {self.size}"
            )
        self.at += n

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.broken(f"its text is not UTF-8 ({e.reason})") from e

    def broken(self, why: str) -> MobeError:
        return MobeError(f"{self.path}: {self.where}: {why}. Download or export the file again.")
