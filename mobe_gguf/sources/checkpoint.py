"""Reading Hugging Face model directories: config.json and safetensors, checked before anything is believed.

Nothing here loads a pickle.  Whatever is wrong with a directory is a :class:`MobeError` that names the file or
the tensor; a directory that opens has all its shards, whole, with the tensors that the index promises.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mobe_gguf.errors import MobeError
from mobe_gguf.names import ALL_PROJECTIONS
from mobe_gguf.sources.families import family_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: safetensors' own limit for a header; a length beyond it is not a safetensors file.
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

#: Types of an expert's matrix that can be factorized as they stand; F8_E4M3 besides, with its scales.
PLAIN_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; its bytes are ``begin`` to ``end`` of the file ``shard``.
    ``dtype`` in the format's own spelling ("BF16")."""

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


class Checkpoint:
    """A Hugging Face model directory, opened lazily: headers now, tensors when asked for.

    Raises MobeError if config.json or a shard is missing or corrupt, if the index contradicts the shards, or if
    ``model_type`` is unknown.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        _check_is_model_directory(self.path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self.family = family_of(self.config)
        self._tensors = self._read_headers()
        self._open: dict[str, Any] = {}

    def _read_headers(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        if not (self.path / INDEX_NAME).exists():
            return {name: info for name, info in read_header(self.path / SINGLE_NAME).items()}
        weight_map = _read_weight_map(self.path / INDEX_NAME)
        for shard in sorted(set(weight_map.values())):
            if not (self.path / shard).is_file():
                promised = [name for name, s in weight_map.items() if s == shard]
                raise MobeError(
                    f"{self.path}: shard {shard} is missing, but {INDEX_NAME} says that it holds {len(promised)} "
                    f"tensors (the first is {promised[0]}). Download the model again; finished files are kept."
                )
            header = read_header(self.path / shard)
            for name in (n for n, s in weight_map.items() if s == shard):
                if name not in header:
                    raise MobeError(
                        f"{self.path}: {INDEX_NAME} says that tensor {name} is in {shard}, but it is not there. "
                        "Index and shards are from different versions of the model; download it again."
                    )
                tensors[name] = header[name]
        return tensors

    # tensors

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in the order of the index."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Header entry of a tensor; MobeError if there is none."""
        if name not in self._tensors:
            raise MobeError(f"{self.path}: tensor {name} is missing. Is the model complete, and of the family "
                            f"'{self.family.name}' as config.json says?")  # fmt: skip
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        info = self.info(name)
        if info.dtype not in DTYPES:
            raise MobeError(f"{self.path}: tensor {name} has type {info.dtype}, which is not supported")
        return DTYPES[info.dtype]

    def get(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, no check of its values."""
        info = self.info(name)
        try:
            return self._shard(info.shard).get_tensor(name)
        except (SafetensorError, OSError, TypeError, KeyError) as e:
            raise MobeError(f"{self.path / info.shard}: cannot read tensor {name}: {e}") from e

    def get_row(self, name: str, row: int) -> torch.Tensor:
        """``tensor[row]`` along the first axis, read without the rest of the tensor."""
        info = self.info(name)
        try:
            return self._shard(info.shard).get_slice(name)[row]
        except (SafetensorError, OSError, TypeError, KeyError) as e:
            raise MobeError(f"{self.path / info.shard}: cannot read tensor {name}: {e}") from e

    def _shard(self, shard: str) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self.path / shard, framework="pt")
        return self._open[shard]

    def expect_shape(self, name: str, expected: tuple[int, ...], because: str) -> None:
        """MobeError unless tensor ``name`` has the ``expected`` shape; ``because`` says where that comes from."""
        got = self.shape(name)
        if got != expected:
            raise MobeError(
                f"{self.path}: tensor {name} has shape {list(got)}, expected {list(expected)} ({because})"
            )

    # the model

    @cached_property
    def n_layer(self) -> int:
        return self.family.n_layer(self.config)

    @cached_property
    def n_expert(self) -> int:
        return self.family.n_expert(self.config)

    @cached_property
    def n_expert_used(self) -> int:
        return self.family.n_expert_used(self.config)

    @cached_property
    def n_embd(self) -> int:
        return self.family.n_embd(self.config)

    @cached_property
    def n_ff_exp(self) -> int:
        return self.family.n_ff_exp(self.config)

    @cached_property
    def is_mobe(self) -> bool:
        """True if the directory holds MoBE factors instead of (all) original experts."""
        return self.config.get("num_B") is not None or any(
            f".B_{projection}" in n for n in self._tensors for projection in ALL_PROJECTIONS
        )

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts: config.json's word, checked against the tensors that exist."""
        declared = self.family.moe_layers(self.config)
        if not declared:
            raise MobeError(
                f"{self.path}: config.json describes no MoE layer at all; there is nothing to factorize"
            )
        for layer in range(self.n_layer):
            first = self.family.expert_weight(layer, 0, "gate")
            fused = self.family.fused_weight(layer, "gate")
            found = first in self or fused in self
            if found and layer not in declared:
                raise MobeError(
                    f"{self.path}: config.json says that layer {layer} is dense, but it has expert tensors"
                )
            if not found and layer in declared:
                raise MobeError(
                    f"{self.path}: config.json says that layer {layer} has experts, but neither {first} nor {fused} "
                    f"exists. Quantized sources (GPTQ, AWQ, int4) must be converted to bf16 first."
                )
        return declared

    # experts

    def expert_shape(self, projection: str) -> tuple[int, int]:
        """``[p, d]`` of gate and up, ``[d, p]`` of down, by config.json."""
        p, d = self.n_ff_exp, self.n_embd
        return (d, p) if projection == "down" else (p, d)

    def is_fused(self, layer: int, projection: str) -> bool:
        """True if the layer's experts are stored in one tensor, :meth:`Family.fused_weight`."""
        return self.family.expert_weight(layer, 0, projection) not in self and (
            self.family.fused_weight(layer, projection) in self
        )

    def expert_sources(self, layer: int, projection: str) -> tuple[str, ...]:
        """Names of the tensors that :meth:`expert_stack` reads, scales included."""
        if self.is_fused(layer, projection):
            names = [self.family.fused_weight(layer, projection)]
        else:
            names = [self.family.expert_weight(layer, e, projection) for e in range(self.n_expert)]
        scales = [s for s in map(_scale_name, names) if s in self]
        return tuple(names + scales)

    def check_experts(self, layer: int, projection: str) -> None:
        """MobeError unless all tensors that :meth:`expert_stack` will read exist, of the right shape; headers only."""
        shape = self.expert_shape(projection)
        if self.is_fused(layer, projection):
            halves = 1 if projection == "down" else 2
            name = self.family.fused_weight(layer, projection)
            self.expect_shape(name, (self.n_expert, halves * shape[0], shape[1]), "from config.json")
            return
        for e in range(self.n_expert):
            self.expect_shape(self.family.expert_weight(layer, e, projection), shape, "from config.json")

    def expert(self, layer: int, projection: str, index: int) -> torch.Tensor:
        """One routed expert's original matrix, float32 ``[p, d]`` (``[d, p]`` for down), checked to be finite.

        FP8 (e4m3 with block scales, as DeepSeek-V3 and Kimi-K2 are published) is dequantized.
        """
        shape = self.expert_shape(projection)
        if self.is_fused(layer, projection):
            name, w, scale = self._fused_expert(layer, projection, index, shape)
        else:
            name = self.family.expert_weight(layer, index, projection)
            self.expect_shape(name, shape, "from config.json")
            w = self.get(name)
            scale = self.get(_scale_name(name)) if _scale_name(name) in self else None
        return self.to_float(name, w, scale)

    def expert_stack(self, layer: int, projection: str) -> torch.Tensor:
        """All routed experts' matrices of one layer, float32 ``[n, p, d]`` (``[n, d, p]`` for down).

        Read one expert at a time, so that the peak is the result and one expert more.
        """
        stack = torch.empty(self.n_expert, *self.expert_shape(projection))
        for e in range(self.n_expert):
            stack[e] = self.expert(layer, projection, e)
        return stack

    def matrix(self, name: str) -> torch.Tensor:
        """Any weight as float32, FP8 dequantized, checked to be finite."""
        scale = self.get(_scale_name(name)) if _scale_name(name) in self else None
        return self.to_float(name, self.get(name), scale)

    def _fused_expert(
        self, layer: int, projection: str, index: int, shape: tuple[int, int]
    ) -> tuple[str, torch.Tensor, torch.Tensor | None]:
        name = self.family.fused_weight(layer, projection)
        halves = 1 if projection == "down" else 2
        self.expect_shape(name, (self.n_expert, halves * shape[0], shape[1]), "from config.json")
        part = 1 if projection == "up" else 0
        w = self.get_row(name, index).chunk(halves)[part]
        scale = (
            self.get_row(_scale_name(name), index).chunk(halves)[part] if _scale_name(name) in self else None
        )
        return name, w, scale

    def to_float(self, name: str, w: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """The stored tensor ``w`` as float32, with ``scale`` of its blocks if it is FP8; MobeError if it is not finite."""
        if w.dtype == torch.float8_e4m3fn:
            if scale is None:
                raise MobeError(f"{self.path}: tensor {name} is FP8 but {_scale_name(name)} is missing")
            w = dequantize_fp8(name, w, scale, self._fp8_block())
        elif w.dtype not in PLAIN_FLOATS:
            raise MobeError(
                f"{self.path}: tensor {name} has type {str(w.dtype).removeprefix('torch.')}; experts can be read from "
                "f32, f16, bf16 and block-scaled f8_e4m3. Convert the model to bf16 first."
            )
        w = w.float()
        if not all_finite(w):
            bad = int((~torch.isfinite(w)).sum())
            raise MobeError(
                f"{self.path}: tensor {name} holds {bad} values that are NaN or Inf. The download is damaged or the "
                "model diverged in training; it cannot be factorized."
            )
        return w

    def _fp8_block(self) -> tuple[int, int]:
        quantization = self.config.get("quantization_config") or {}
        rows, columns = quantization.get("weight_block_size") or (128, 128)
        return int(rows), int(columns)

    @cached_property
    def n_params(self) -> int:
        """Parameters of the whole model; multi-token-prediction layers count as they are stored."""
        return sum(info.numel for name, info in self._tensors.items() if not name.endswith("_scale_inv"))

    def kept_bytes(self, units: list[tuple[int, str]]) -> int:
        """Bytes of the model that come along into the output, when ``(layer, projection)`` units are factorized."""
        kept = sum(info.n_bytes for info in self._tensors.values())
        for layer, projection in units:
            halves = 2 if projection != "down" and self.is_fused(layer, projection) else 1
            kept -= sum(self.info(name).n_bytes for name in self.expert_sources(layer, projection)) // halves
        return kept

    def source_files(self) -> list[Path]:
        """All files that the model is read from."""
        return [path for path in self.path.iterdir() if path.is_file()]

    @cached_property
    def checksum(self) -> str:
        """sha256 that tells one source model from another, cheaply.

        Covers config.json, every shard's name, size and header, and 32 samples of 4 KiB spread over each shard's
        data: enough to tell a fine-tune from its base; not a proof that every byte is the same.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for shard in sorted({info.shard for info in self._tensors.values()}):
            size = (self.path / shard).stat().st_size
            digest.update(f"{shard} {size}".encode())
            with open(self.path / shard, "rb") as f:
                (header_size,) = struct.unpack("<Q", f.read(8))
                digest.update(f.read(header_size))
                start = 8 + header_size
                for i in range(32):
                    f.seek(start + (size - start) * i // 32)
                    digest.update(f.read(4096))
        return digest.hexdigest()


def all_finite(tensor: torch.Tensor) -> bool:
    """No NaN, no Inf: by the extremes, which a CPU finds in a tenth of the time that torch.isfinite takes."""
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def dequantize_fp8(name: str, w: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float32 ``w * scale`` with one scale a block: w ``[a, b]``, scale ``[ceil(a/block0), ceil(b/block1)]``.

    ``weight_scale_inv`` is what the published files call the factor to multiply by (DeepSeek-V3,
    inference/fp8_cast_bf16.py).
    """
    expected = tuple(-(-size // step) for size, step in zip(w.shape, block, strict=True))
    if tuple(scale.shape) != expected:
        raise MobeError(
            f"scales of FP8 tensor {name} have shape {list(scale.shape)}, expected {list(expected)}"
        )
    full = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return w.float() * full[: w.shape[0], : w.shape[1]]


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
    try:  # the library's own checks: overlaps, sizes against shapes
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as e:
        raise _corrupt(path, str(e)) from e
    return tensors


def _tensor_info(shard: str, entry: dict[str, Any], data: int) -> TensorInfo:
    begin, end = (int(x) for x in entry["data_offsets"])
    if not 0 <= begin <= end:
        raise ValueError(f"offsets {begin}, {end}")
    shape = tuple(int(s) for s in entry["shape"])
    return TensorInfo(shard, str(entry["dtype"]), shape, data + begin, data + end)


def _corrupt(path: Path, why: str) -> MobeError:
    return MobeError(f"{path}: truncated or corrupt safetensors file: {why}. Download this file again.")


def _scale_name(name: str) -> str:
    """Block scales of an FP8 tensor: ``x.weight_scale_inv``, or ``gate_up_proj_scale_inv`` when fused."""
    return name + "_scale_inv"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; MobeError names the file if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise MobeError(f"{path}: no such file") from e
    except (ValueError, OSError, RecursionError) as e:
        raise MobeError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise MobeError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_weight_map(path: Path) -> dict[str, str]:
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


def _check_is_model_directory(path: Path) -> None:
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
