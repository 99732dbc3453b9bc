"""The experts of a GGUF file, read in slices and decoded by libggml.

:class:`GgufModel` has the same interface as :class:`mobe_gguf.models.checkpoint.Checkpoint` for a Hugging Face directory
(see ``original``).  It reads any architecture whose experts llama.cpp calls ``blk.L.ffn_{gate,up,down}_exps.weight``, or
``blk.L.ffn_gate_up_exps.weight`` where gate and up are one tensor.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.sides import side
from mobe_gguf.core.tensors import merged_name
from mobe_gguf.formats.gguf import GgufFile, GgufTensor, missing_tensors, read_model
from mobe_gguf.formats.safetensors import Entry
from mobe_gguf.models.config_values import Judgement
from mobe_gguf.models.families import EMBEDDINGS, WRITERS, Family
from mobe_gguf.models.layout import GATE_UP, OPTIONAL, ExpertLayout
from mobe_gguf.models.tensors import all_finite
from mobe_gguf.runtime import ggml

#: Bytes that are copied at a time.  (1 GB takes 0.3 s of CPU time in pieces of 256 KiB, 0.7 to 1.5 s in pieces of 16 MiB,
#: each of which is mapped anew.)
CHUNK = 1 << 18

#: Values decoded at a time when a tensor is converted to another type.
VALUES = 1 << 20

#: Bytes of each of the three samples of a tensor that go into the checksum.
SAMPLE = 4096

#: The projections in a merged tensor, in the order of their rows.
MERGED = GATE_UP[0]

#: The file in a directory of factors that describes the GGUF model they belong to.
FACTORS_NAME = "factors.json"

_TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def family(arch: str) -> Family:
    """The names for factors of a GGUF file: those of a MoBE checkpoint whose MoE blocks are ``blk.L``."""
    return Family(arch, (), "", block="blk.{layer}")


@dataclass(frozen=True)
class StoredTensor:
    """Values as stored in a GGUF file: a tensor, or gate or up of a merged one.

    ``shape``: in torch's order.  The last two axes are a matrix.  The bytes of matrix i begin at ``offset + i * stride`` in
    ``file`` and are contiguous.
    """

    name: str
    file: Path
    type: str
    shape: tuple[int, ...]
    offset: int
    stride: int

    @classmethod
    def of(cls, info: GgufTensor) -> StoredTensor:
        """A whole tensor."""
        return cls(
            info.name,
            info.file,
            info.type,
            info.shape,
            info.offset,
            info.n_bytes // math.prod(info.shape[:-2]),
        )

    @classmethod
    def half(cls, info: GgufTensor, name: str, part: int) -> StoredTensor:
        """Gate (``part`` 0) or up (1) of the merged tensor ``[n, 2p, d]``, called ``name``."""
        n, rows, d = info.shape
        stride = info.n_bytes // n
        return cls(name, info.file, info.type, (n, rows // 2, d), info.offset + part * stride // 2, stride)

    @property
    def row_bytes(self) -> int:
        return ggml.type_info(self.type).row_bytes(self.shape[-1])

    @property
    def matrix_bytes(self) -> int:
        return math.prod(self.shape[-2:-1]) * self.row_bytes

    @property
    def n_bytes(self) -> int:
        return ggml.type_info(self.type).tensor_bytes(self.shape)

    def matrix(self, index: int) -> torch.Tensor:
        """Matrix ``index``, decoded: float32 ``shape[-2:]``; nothing else is read."""
        with open(self.file, "rb") as file:
            return self._decoded(self._read(file, self.offset + index * self.stride, self.matrix_bytes))

    def pieces(self) -> Iterator[torch.Tensor]:
        """The values in order, some rows at a time: float32 ``[rows, shape[-1]]``."""
        step = max(1, VALUES // self.shape[-1]) * self.row_bytes
        for raw in self._blocks(step):
            yield self._decoded(raw)

    def blocks(self) -> Iterator[bytes]:
        """The stored bytes, without those between the matrices, in pieces of whole blocks of the type."""
        size = ggml.type_info(self.type).bytes
        yield from self._blocks(CHUNK // size * size)

    def _blocks(self, step: int) -> Iterator[bytes]:
        whole = self.stride == self.matrix_bytes
        size = self.n_bytes if whole else self.matrix_bytes
        with open(self.file, "rb") as file:
            for i in range(self.n_bytes // size):
                begin = self.offset + i * self.stride
                for at in range(0, size, step):
                    yield self._read(file, begin + at, min(step, size - at))

    def _decoded(self, raw: bytes) -> torch.Tensor:
        rows = np.frombuffer(raw, np.uint8).reshape(-1, self.row_bytes)
        return torch.from_numpy(ggml.dequantize(rows, self.type, self.shape[-1]))

    def _read(self, file: IO[bytes], begin: int, n: int) -> bytes:
        raw = os.pread(file.fileno(), n, begin)  # at most CHUNK or a matrix: one call reads all of it
        if len(raw) != n:
            raise MobeError(f"{self.file}: became shorter while tensor {self.name} was read")
        return raw


class GgufModel:
    """A GGUF file with a MoE model, or the first file of a split one, opened lazily: the head now, experts on demand.

    Raises MobeError if the file is damaged, has no routed experts, or has factors instead of them.
    """

    #: Same attribute as in ``Checkpoint``; opening a file with factors raises an error.
    is_mobe = False

    #: Everything that is not factorized stays in the file.
    directory = None

    #: For the factors' directory.
    config_name = FACTORS_NAME

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.file: GgufFile = read_model(self.path)
        self.arch = self.file.arch
        self.family = family(self.arch)
        for name in self.file.tensors:
            if re.fullmatch(r"blk\.\d+\.ffn_\w+_basis\.(weight|mix)", name):
                raise MobeError(
                    f"{self.path}: holds MoBE factors already ({name}). Factorize the original model's file."
                )
        self._first  # noqa: B018, refuses a file without experts

    # the model

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts: those that have ``ffn_up_exps`` or ``ffn_gate_up_exps``.  Layers for multi-token
        prediction, which come last, stay as they are: no text runs through them, so there are no moments."""
        found = (re.fullmatch(r"blk\.(\d+)\.ffn_(gate_)?up_exps\.weight", name) for name in self.file.tensors)
        layers = sorted({int(match[1]) for match in found if match})
        predicting = self.file.arch_number("nextn_predict_layers")
        end = self.n_layer if predicting else math.inf
        return tuple(layer for layer in layers if layer < end)

    @cached_property
    def _first(self) -> StoredTensor:
        """Up of the first MoE layer.  n and d of all other layers are compared with it."""
        if not self.moe_layers:
            raise MobeError(
                f"{self.path}: no tensor blk.*.ffn_up_exps.weight: the model ({self.arch}) has no routed experts, there is "
                "nothing to factorize"
            )
        return self._up(self.moe_layers[0])

    def _up(self, layer: int) -> StoredTensor:
        found = self.stored(layer, "up")
        if len(found.shape) != 3:
            raise MobeError(
                f"{self.path}: tensor {found.name} has shape {list(found.shape)}, expected [n, p, d]"
            )
        return found

    @property
    def n_expert(self) -> int:
        return self._first.shape[0]

    @property
    def n_ff_exp(self) -> int:
        return max(self.width(layer) for layer in self.moe_layers)

    def width(self, layer: int) -> int:
        """p of a layer's experts.  In some models layers differ."""
        return self._up(layer).shape[1]

    @property
    def n_embd(self) -> int:
        """Length of an expert's input, from its tensor: in some architectures it is less than the hidden size."""
        return self._first.shape[2]

    @property
    def n_layer(self) -> int:
        """Layers that a text runs through, as in ``Checkpoint``: without those for multi-token prediction."""
        predicting, count = self.file.arch_number("nextn_predict_layers"), self._number("block_count")
        if predicting >= count:
            raise MobeError(
                f"{self.path}: key {self.arch}.nextn_predict_layers is {predicting}, expected less than the {count} layers"
            )
        return count - predicting

    @property
    def n_expert_used(self) -> int:
        k = self.file.arch_most("expert_used_count")  # in an array by layer, dense ones have 0
        if k < 1:
            self._number("expert_used_count")
        if k > self.n_expert:
            raise MobeError(
                f"{self.path}: key {self.arch}.expert_used_count is {k}, expected 1 to {self.n_expert}, as many experts as a "
                "layer has"
            )
        return k

    def _number(self, key: str) -> int:
        value = self.file.arch_number(key)
        if value < 1:
            raise MobeError(f"{self.path}: key {self.arch}.{key} is {value}, expected a positive number")
        return value

    @property
    def config(self) -> dict[str, Any]:
        """The model's entries in ``factors.json``; ``n_ff_exp_of`` only if layers differ."""
        widths = {str(layer): self.width(layer) for layer in self.moe_layers}
        return {
            "architecture": self.arch,
            "n_layer": self.n_layer,
            "n_expert": self.n_expert,
            "n_expert_used": self.n_expert_used,
            "n_embd": self.n_embd,
            "n_ff_exp": self.n_ff_exp,
        } | ({"n_ff_exp_of": widths} if len(set(widths.values())) > 1 else {})

    @property
    def config_file(self) -> dict[str, Any]:
        return self.config

    @property
    def n_params(self) -> int:
        """Parameters of the whole model."""
        return sum(math.prod(info.shape) for info in self.file.tensors.values())

    #: Same attributes as in ``ModelDirectory``: an ordinary model, complete in the file.
    factors = None

    @property
    def original_checksum(self) -> str:
        return self.checksum

    def gguf_source(self, path: str | os.PathLike[str] | None) -> GgufModel:
        """Itself; UsageError if another ``path`` is given."""
        if path is not None:
            raise UsageError(f"--source is for factors of a GGUF file, and {self.path} is one itself")
        return self

    def source_files(self) -> list[Path]:
        """The files of the model."""
        return sorted({info.file for info in self.file.tensors.values()})

    def kept_bytes(self, units: list[tuple[int, str]]) -> int:
        """Bytes that are copied from the model to the factors' directory: none, they stay in the GGUF file."""
        return 0

    def copies(self, units: Iterable[tuple[int, str]]) -> list[Entry]:
        """Tensors that are copied to the factors' directory: none, see :meth:`kept_bytes`."""
        return []

    def small_files(self) -> list[Path]:
        """Files that are copied to the factors' directory: none."""
        return []

    @cached_property
    def checksum(self) -> str:
        """sha256 that tells one source from another, cheaply.

        It covers the architecture and, for every tensor, its name, type, shape and three samples of 4 KiB (first, middle,
        last).  It does not cover metadata or the split into files, because the factors fit the model just as well with
        another chat template, split or merged.  This is enough to tell a fine-tune or another quantization, but does not
        prove that every byte is equal.
        """
        digest = hashlib.sha256(self.arch.encode())
        files: dict[Path, IO[bytes]] = {}
        try:
            for name, info in sorted(self.file.tensors.items()):
                digest.update(f"{name} {info.type} {info.shape}\n".encode())
                if info.file not in files:
                    files[info.file] = open(info.file, "rb")  # noqa: SIM115, closed below
                last = max(0, info.n_bytes - SAMPLE)
                for at in (0, last // 2, last):
                    digest.update(
                        os.pread(files[info.file].fileno(), min(SAMPLE, info.n_bytes), info.offset + at)
                    )
        finally:
            for file in files.values():
                file.close()
        return digest.hexdigest()

    def routed_scale(self) -> Any:
        """The factor of the routed experts' sum in the file; None if there is none."""
        return self.file.arch_key("expert_weights_scale")

    def stream_writers(self, layer: int) -> list[tuple[str, str]]:
        """``(name, GGUF stem)`` of the matrices of :data:`WRITERS` that the layer has."""
        stems = {f"blk.{layer}.{stem}" for stem in WRITERS.values()}
        return [(f"{stem}.weight", stem) for stem in sorted(stems) if f"{stem}.weight" in self.file.tensors]

    def matrix(self, name: str) -> torch.Tensor:
        """Any weight as float32."""
        return StoredTensor.of(self.file.tensors[name]).matrix(0)

    def embedding_rows(self, count: int) -> torch.Tensor | None:
        """The first rows of the embedding, one piece of decoding; None if there is no such tensor."""
        info = self.file.tensors.get(EMBEDDINGS[-1])
        return None if info is None else next(StoredTensor.of(info).pieces())

    # experts

    def stored(self, layer: int, projection: str) -> StoredTensor:
        """A layer's experts as stored: ``[n, p, d]``, ``[n, d, p]`` for down.  MobeError if there are none."""
        name = names.transform_name(layer, projection)
        if name in self.file.tensors:
            return StoredTensor.of(self.file.tensors[name])
        merged = self.file.tensors.get(merged_name(layer))
        if merged is None or projection not in MERGED:
            hint = f" Leave {projection} out:\n  --projections up" if projection in OPTIONAL else ""
            raise MobeError(f"{self.path}: tensor {name} is missing.{hint}")
        if len(merged.shape) != 3 or merged.shape[1] % 2:
            raise MobeError(
                f"{self.path}: tensor {merged.name} has shape {list(merged.shape)}, expected [n, 2p, d]"
            )
        for kind in ("scale", "bias"):
            other = name.replace("weight", kind)
            for found in (
                other,
                other.replace(f"_{projection}_", "_up_"),
                merged.name.replace("weight", kind),
            ):
                if found in self.file.tensors:
                    raise MobeError(
                        f"{self.path}: tensor {found} belongs to {merged.name}, which is taken apart here; such a model "
                        "cannot be factorized from GGUF. Use its Hugging Face directory."
                    )
        return StoredTensor.half(merged, name, MERGED.index(projection))

    def layout(self, layer: int) -> ExpertLayout:
        """How the layer's experts are stored: one tensor for each projection, or one for gate and up together."""
        merged = self.is_merged(layer)
        fused = GATE_UP if merged else tuple((p,) for p in names.ALL_PROJECTIONS)
        there = tuple(
            p
            for p in names.ALL_PROJECTIONS
            if names.transform_name(layer, p) in self.file.tensors or (merged and p in MERGED)
        )
        return ExpertLayout(self.n_expert, self.width(layer), self.n_embd, there, fused)

    def is_merged(self, layer: int) -> bool:
        """True if the layer's gate and up are one tensor."""
        return names.transform_name(layer, "up") not in self.file.tensors and (
            merged_name(layer) in self.file.tensors
        )

    def expert_shape(self, layer: int, projection: str) -> tuple[int, int]:
        """``[p, d]`` of gate and up, ``[d, p]`` of down."""
        return side(projection).matrix(self.width(layer), self.n_embd)

    def expert_sources(self, layer: int, projection: str) -> tuple[str, ...]:
        """Name of the tensor that :meth:`expert_stack` reads; where gate and up are merged, each has its own name."""
        return (self.stored(layer, projection).name,)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's values; uint8 for a quantized one."""
        layer = int(name.split(".")[1])
        info = self.file.tensors.get(name) or self.file.tensors[merged_name(layer)]
        return _TORCH.get(info.type, torch.uint8)

    def check_whole(self) -> None:
        """MobeError unless all required tensors other than the experts are there.  Reads the head only."""
        self.n_expert_used  # noqa: B018, compared with the number of experts
        if missing := missing_tensors(self.file):
            raise MobeError(
                f"{self.path}: tensor {missing[0]} is missing. Download or export the file again."
            )

    def check_values(self) -> Judgement:
        """A GGUF file's keys are those that the runtime reads: nothing to carry or to refuse."""
        return Judgement()

    def check_experts(self, layer: int, projection: str) -> None:
        """MobeError unless the layer's experts exist, with the right shape and a type that libggml decodes.  Reads the head
        only."""
        found = self.stored(layer, projection)
        expected = (self.n_expert, *self.expert_shape(layer, projection))
        if found.shape != expected:
            raise MobeError(
                f"{self.path}: tensor {found.name} has shape {list(found.shape)}, expected {list(expected)} as of "
                f"{' and '.join(dict.fromkeys((self._first.name, self._up(layer).name)))}"
            )
        if not ggml.type_info(found.type).decodes:
            raise MobeError(
                f"{self.path}: tensor {found.name} has type {found.type}, which cannot be decoded"
            )

    def expert(self, layer: int, projection: str, index: int) -> torch.Tensor:
        """One routed expert's matrix, float32 ``[p, d]`` (``[d, p]`` for down), checked to be finite."""
        found = self.stored(layer, projection)
        w = found.matrix(index)
        if not all_finite(w):
            bad = int((~torch.isfinite(w)).sum())
            raise MobeError(
                f"{self.path}: tensor {found.name}, expert {index}, holds {bad} values that are NaN or Inf. The file is "
                "damaged; download it again."
            )
        return w

    def expert_stack(self, layer: int, projection: str) -> torch.Tensor:
        """All routed experts' matrices of one layer, float32 ``[n, p, d]`` (``[n, d, p]`` for down), read one by one."""
        stack = torch.empty(self.n_expert, *self.expert_shape(layer, projection))
        for e in range(self.n_expert):
            stack[e] = self.expert(layer, projection, e)
        return stack
