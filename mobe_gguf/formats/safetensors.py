"""Reads and writes safetensors files, and reads the JSON beside them in a Hugging Face model directory.

Everything is checked before it is used, because files come from strangers.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mobe_gguf.core.atomic import sync
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import check_name

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: safetensors' own limit for a header; a file with a longer one is not safetensors.
MAX_HEADER = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


#: Names of the types that factors can be stored in.
STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a safetensors header; its bytes are ``begin`` to ``end`` of the file ``shard``.
    ``dtype``: in the format's own spelling ("BF16")."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Header of one safetensors file; MobeError names the file if it cannot be read, is truncated or corrupt."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            prefix = f.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER + 1
            if length > MAX_HEADER or 8 + length > size:
                raise _corrupt(path, f"its {size} bytes hold no whole header")
            raw = f.read(length)
    except OSError as e:
        raise MobeError(f"{path}: cannot be read: {e.strerror}") from e
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor_info(path.name, entry, 8 + length) for name, entry in entries.items()}
        end = max((info.end for info in tensors.values()), default=8 + length)
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise _corrupt(path, f"its header is damaged ({e})") from e
    if end != size:
        raise _corrupt(path, f"its header describes {end} bytes, the file has {size}")
    # the library's own checks: overlaps, sizes against shapes.  "pt" would map all of it for writing: no more than memory holds
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as e:
        raise _corrupt(path, str(e)) from e
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a file whose header is good (:func:`read_header`)."""
    with safe_open(path, framework="numpy") as f:
        return f.metadata() or {}


def read_tensor(path: Path, info: TensorInfo, row: int | None = None) -> torch.Tensor:
    """A tensor of the file, or ``tensor[row]`` along the first axis.  Only these bytes are mapped, privately.

    OSError if they cannot be mapped; MobeError if the type is not in DTYPES, or the file has become shorter.
    """
    if info.dtype not in DTYPES:
        raise MobeError(f"{path}: type {info.dtype} is not supported")
    dtype, shape, begin, size = DTYPES[info.dtype], info.shape, info.begin, info.n_bytes
    if row is not None:
        shape, size = shape[1:], size // shape[0]
        begin += row * size
    if not size:
        return torch.empty(shape, dtype=dtype)
    if path.stat().st_size < info.end:
        raise MobeError(f"{path}: it has become shorter while it was read")
    raw = torch.from_numpy(np.memmap(path, np.uint8, "c", begin, (size,)))
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def _tensor_info(shard: str, entry: dict[str, Any], data: int) -> TensorInfo:
    begin, end = (int(x) for x in entry["data_offsets"])
    if not 0 <= begin <= end:
        raise ValueError(f"offsets {begin}, {end}")
    shape = tuple(int(s) for s in entry["shape"])
    return TensorInfo(shard, str(entry["dtype"]), shape, data + begin, data + end)


def _corrupt(path: Path, why: str) -> MobeError:
    return MobeError(f"{path}: truncated or corrupt safetensors file: {why}. Download this file again.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; MobeError names the file if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise MobeError(f"{path}: no such file") from e
    except (ValueError, OSError, RecursionError) as e:
        raise MobeError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise MobeError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_weight_map(path: Path) -> dict[str, str]:
    """``weight_map`` of an index: tensor -> shard, each a plain file name inside the directory."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MobeError(f"{path}: no 'weight_map' with tensor names and files")
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or shard != os.path.basename(shard)
            or "\\" in shard
            or shard in ("", ".", "..")
        ):
            raise MobeError(
                f"{path}: tensor {name} is said to be in {shard!r}; only plain file names are accepted"
            )
    return weight_map


def check_is_model_directory(path: Path) -> None:
    """MobeError unless ``path`` holds a config.json and safetensors files."""
    check_name(str(path))  # the library would call its files corrupt
    if not path.exists():
        raise MobeError(f"{path}: no such directory")
    if not path.is_dir():
        raise MobeError(
            f"{path} is a file; expected a Hugging Face model directory (config.json, *.safetensors, tokenizer files)"
        )
    if not (path / "config.json").is_file():
        raise MobeError(f"{path}: no config.json; expected a Hugging Face model directory")
    if not (path / INDEX_NAME).exists() and not (path / SINGLE_NAME).exists():
        pickles = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt*"))
        hint = (
            f" It has {pickles[0]}: PyTorch pickles are not read, for they can run code; convert them to safetensors."
            if pickles
            else ""
        )
        raise MobeError(f"{path}: neither {INDEX_NAME} nor {SINGLE_NAME} found.{hint}")


#: Bytes read at once when a file is copied.
CHUNK = 16 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: ``dtype`` in safetensors' spelling, ``data()`` its bytes in chunks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    data: Callable[[], Iterable[Any]]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Entry:
        """A tensor in memory."""
        dtype = next(k for k, v in DTYPES.items() if v == tensor.dtype)
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
        return cls(name, dtype, tuple(tensor.shape), raw.nbytes, lambda: [raw])

    @classmethod
    def made(
        cls, name: str, dtype: torch.dtype, shape: tuple[int, ...], *parts: Callable[[], torch.Tensor]
    ) -> Entry:
        """A tensor that is computed while it is written: of ``parts`` one after the other."""

        def data() -> Iterator[Any]:
            for read in parts:
                yield read().to(dtype).contiguous().flatten().view(torch.uint8).numpy()

        spelled = next(k for k, v in DTYPES.items() if v == dtype)
        return cls(name, spelled, shape, math.prod(shape) * dtype.itemsize, data)

    @classmethod
    def copy(cls, name: str, dtype: str, shape: tuple[int, ...], file: Path, begin: int, end: int) -> Entry:
        """A run of bytes of another file."""
        return cls(name, dtype, shape, end - begin, lambda: _chunks(file, begin, end))

    @classmethod
    def whole(cls, name: str, dtype: str, shape: tuple[int, ...], file: Path) -> Entry:
        """All bytes of another file."""
        return cls.copy(name, dtype, shape, file, 0, file.stat().st_size)


def _chunks(file: Path, begin: int, end: int) -> Iterator[bytes]:
    with open(file, "rb") as f:
        f.seek(begin)
        while begin < end:
            chunk = f.read(min(CHUNK, end - begin))
            if not chunk:
                raise OSError(f"{file} became shorter while it was read")
            begin += len(chunk)
            yield chunk


def write_safetensors(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> None:
    """One safetensors file: 8 bytes of header length, JSON, data.

    The library's ``save_file`` is not used: it needs all tensors in memory, orders metadata differently in each run, and
    makes files that only their owner may read.
    """
    # Widest elements first, as in the library: readers want a tensor's data aligned to its type.
    entries = sorted(entries, key=lambda e: -DTYPES[e.dtype].itemsize if e.dtype in DTYPES else 0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for e in entries:
        header[e.name] = {
            "dtype": e.dtype,
            "shape": list(e.shape),
            "data_offsets": [offset, offset + e.n_bytes],
        }
        offset += e.n_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        for e in entries:
            for chunk in e.data():
                f.write(chunk)
    sync(path)
