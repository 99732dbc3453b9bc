"""Reading Hugging Face model directories: config.json and safetensors, checked before use.

Nothing here loads a pickle.  Any fault of a directory raises a :class:`MobeError` that names the file or tensor.  A
directory that opens has all its shards, complete, with the tensors that the index lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.formats.safetensors import (
    Entry,
    check_is_model_directory,
    read_json,
)
from mobe_gguf.models import entries, mxfp4
from mobe_gguf.models.config_types import check_types
from mobe_gguf.models.config_values import Judgement, check_values
from mobe_gguf.models.factors import ModelDirectory
from mobe_gguf.models.families import EMBEDDINGS, WRITERS, family_of
from mobe_gguf.models.foreign import check_format, check_names
from mobe_gguf.models.layout import ExpertLayout
from mobe_gguf.models.tensors import all_finite

#: Types of an expert's matrix that can be factorized directly; F8_E4M3 as well, with its scales.
PLAIN_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Types of weights outside experts, as safetensors calls them.
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3")

#: Biases that are there if config.json says 'attention_bias'.
_ATTENTION_BIAS = re.compile(r"\.self_attn\.[qkvo]_proj\.bias$")

#: Endings of files that hold weights in any format.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}

T = TypeVar("T")


class Checkpoint(ModelDirectory):
    """A Hugging Face model directory, opened lazily: headers are read now, tensors on demand.

    Raises MobeError if config.json or a shard is missing or corrupt, if the index contradicts the shards, or if
    ``model_type`` is unknown.
    """

    kind = "huggingface"
    config_name = "config.json"

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        check_is_model_directory(path)
        #: config.json as it is; :attr:`config` has the text model's values at the top.
        self.config_file = read_json(path / self.config_name)
        check_format(path, self.config_file)
        with _naming(path):
            family = family_of(self.config_file)
            self.config = family.text(self.config_file)
        super().__init__(path, family)

    @property
    def original_checksum(self) -> str | None:
        return self.checksum

    @property
    def directory(self) -> Checkpoint:
        return self

    def hf_config(self) -> Any:
        """transformers' config of the model; raises transformers' own errors."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path, trust_remote_code=False)

    # the model

    def _of_config(self, read: Callable[[dict[str, Any]], T]) -> T:
        """``read(config)``, with the directory added to the file name in its MobeError."""
        with _naming(self.path):
            return read(self.config)

    def _said(self, keys: tuple[str, ...]) -> str:
        """``.../config.json: 'key' is value``, for the first of ``keys`` that is present."""
        key = next((key for key in keys if self.config.get(key) is not None), keys[0])
        return f"{self.path}/config.json: '{key}' is {self.config.get(key)!r}"

    @cached_property
    def n_layer(self) -> int:
        return self._of_config(self.family.n_layer)

    @cached_property
    def n_expert(self) -> int:
        return self._of_config(self.family.n_expert)

    @cached_property
    def n_expert_used(self) -> int:
        k = self._of_config(self.family.n_expert_used)
        if k > self.n_expert:
            raise MobeError(
                f"{self._said(self.family.n_expert_used_keys)}, expected 1 to {self.n_expert}, as many experts as a layer has"
            )
        return k

    @cached_property
    def n_embd(self) -> int:
        return self._of_config(self.family.n_embd)

    @cached_property
    def hidden_size(self) -> int:
        """Length of a token's state."""
        return self._of_config(self.family.hidden_size)

    @cached_property
    def n_ff_exp(self) -> int:
        return self._of_config(self.family.n_ff_exp)

    @cached_property
    def is_mobe(self) -> bool:
        """True if the directory holds MoBE factors instead of (all) original experts."""
        return self.config.get("num_B") is not None or any(
            f".B_{projection}" in n for n in self._tensors for projection in ALL_PROJECTIONS
        )

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts according to config.json, checked against the existing tensors."""
        if self.n_layer > len(self._tensors):  # before counting up to a false number
            raise MobeError(
                f"{self._said(self.family.n_layer_keys)}, but the model has only {len(self._tensors)} tensors"
            )
        declared = self._of_config(self.family.moe_layers)
        if not declared:
            raise MobeError(
                f"{self.path}: config.json describes no MoE layer at all; there is nothing to factorize"
            )
        check_names(self.path, self._tensors, self.family.text_key is not None)
        for layer in range(self.n_layer):
            first = self.family.expert_weight(layer, 0, "up")
            fused = self.fused_name(layer, "up")
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
            last = self.family.expert_weight(layer, self.n_expert - 1, "up")
            if first in self and layer in declared and last not in self:  # before making so many names
                raise MobeError(f"{self._said(self.family.n_expert_keys)}, but tensor {last} is missing")
            extra = self.family.expert_weight(layer, self.n_expert, "up")
            if extra in self:
                raise MobeError(
                    f"{self._said(self.family.n_expert_keys)}, but there is a tensor {extra}, of one more"
                )
        return declared

    def missing(self) -> list[str]:
        """Required tensors that are missing, other than the experts' own: embeddings, the last norm, the router of each MoE
        layer."""
        needed = [self.family.embedding, self.family.final_norm]
        needed += [self.router(layer) for layer in self.moe_layers]
        if not self.family.is_tied(self.config):
            needed.append(self.family.output)
        return [name for name in needed if name not in self]

    def router(self, layer: int) -> str:
        """The matrix that chooses a token's experts."""
        name = self.family.router(layer, self.is_fused(layer, "up"))
        other = self.family.router(layer)
        return other if name not in self and other in self else name

    def check_whole(self) -> None:
        """MobeError unless config.json is consistent and all required tensors exist, with the right shapes and in readable
        types.  This finds faults before the work, not after it.  Reads headers only."""
        self._check_config()
        for name in self.missing():
            if name == self.family.output:
                raise MobeError(
                    f"{self.path}: tensor {name} is missing, and config.json does not say 'tie_word_embeddings': the model has no "
                    "output. Download it again, or set the key if its output is its embeddings"
                )
            self.info(name)
        for name in {self.family.embedding, self.family.output} & set(self._tensors):
            if type(self.config.get("vocab_size")) is int:
                self.expect_shape(name, (self.config["vocab_size"], self.hidden_size), "from config.json")
        for layer in self.moe_layers:
            self.expect_shape(
                self.router(layer), (self.n_expert, self.hidden_size), "a row for each expert of config.json"
            )
            for projection in self.ordinary(layer):
                self.check_experts(layer, projection)
        self._check_kinds()

    def _check_kinds(self) -> None:
        """MobeError names a weight that is no matrix of floats: whole numbers without scales, or nothing at all."""
        text = self.router(self.moe_layers[0]).partition("layers.")[0] + "layers."  # not of a part that sees
        for name in self.names:
            if not name.endswith((".weight", ".bias")):
                continue
            info = self.info(name)
            if info.dtype not in WEIGHT_TYPES:
                raise MobeError(
                    f"{self.path}: tensor {name} has type {info.dtype}; weights can be read from f32, f16, bf16 and block-scaled f8_e4m3. "
                    "Convert the model to bf16 first."
                )
            if 0 in info.shape or not info.shape:
                raise MobeError(
                    f"{self.path}: tensor {name} has shape {list(info.shape)}, which holds no weights. Download it again."
                )
            if (
                name.startswith(text)
                and _ATTENTION_BIAS.search(name)
                and self.config.get("attention_bias") is False
            ):
                raise MobeError(
                    f"{self.path}: there is a tensor {name}, and config.json says 'attention_bias' false: transformers leaves it out, "
                    "llama.cpp would add it. Set the key, or remove the tensor"
                )

    def _check_config(self) -> None:
        """Check values of config.json that are used only later, or only by other programs."""
        self.n_expert_used  # noqa: B018, compared with the number of experts
        found = self.config.get("architectures")
        if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
            raise MobeError(
                f"{self.path}/config.json: 'architectures' must be a list with the name of the model's class, got {found!r}"
            )
        self._fp8_block()

    def check_values(self) -> Judgement:
        """How to carry the values of config.json that the GGUF file would not compute by default.  MobeError if one cannot be
        carried, or has another type than its key."""
        check_types(self.family.declared(self.config), self.config_file, self.path)
        return check_values(self.family.name, self.config, self.path)

    def ordinary(self, layer: int) -> tuple[str, ...]:
        """Projections of a MoE layer whose experts are stored as matrices: here all."""
        return self.family.kinds

    # experts

    def expert_sources(self, layer: int, projection: str) -> tuple[str, ...]:
        """Names of the tensors that :meth:`expert_stack` reads, scales included."""
        if self.is_fused(layer, projection):
            names = [self.fused_name(layer, projection)]
        else:
            names = [self.family.expert_weight(layer, e, projection) for e in range(self.n_expert)]
        scales = [s for name in names for s in (_scale_name(name), mxfp4.scales_of(name)) if s in self]
        return tuple(names + scales)

    def expert_names(self) -> set[str]:
        """All tensors that :meth:`expert` reads."""
        units = ((layer, projection) for layer in self.moe_layers for projection in self.family.kinds)
        return {name for unit in units for name in self.expert_sources(*unit)}

    def layout(self, layer: int) -> ExpertLayout:
        """How the layer's experts are stored."""
        family = self.family
        return ExpertLayout(
            self.n_expert,
            self.n_ff_exp,
            self.n_embd,
            family.kinds,
            tuple(f for f in family.fused if self.is_fused(layer, f[0])),
            self._fp8_block(),
            family.transposed and not self.fused_name(layer, "up").endswith(mxfp4.BLOCKS),
            family.interleaved,
        )

    def check_experts(self, layer: int, projection: str) -> None:
        """MobeError unless all tensors that :meth:`expert_stack` will read exist, with the right shape and a readable type,
        FP8 with its scales.  Reads headers only."""
        if projection not in self.family.kinds:
            raise MobeError(
                f"{self.path}: experts of {self.family.name} have no {projection}. Leave it out:\n  --projections up"
            )
        layout = self.layout(layer)
        shape, scales = layout.stored_shape(projection), layout.scale_shapes(projection)
        if layout.together(projection) is not None:
            name = self.fused_name(layer, projection)
            if name.endswith(mxfp4.BLOCKS):
                self.expect_shape(name, mxfp4.stored_shape(shape), "from config.json")
                self.expect_shape(mxfp4.scales_of(name), mxfp4.stored_shape(shape)[:-1], f"blocks of {name}")
                return
            said = self._tensors.get(_scale_name(name))
            found = said is not None and said.shape in scales
            self._check_matrix(name, shape, said.shape if said is not None and found else scales[0])
            return
        for e in range(self.n_expert):
            self._check_matrix(self.family.expert_weight(layer, e, projection), shape, scales[0])

    def _check_matrix(self, name: str, shape: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        """Check a tensor's type and shape.  ``blocks``: shape of its scales, if it has any."""
        self.expect_shape(name, shape, "from config.json")
        dtype, scale = self.dtype(name), _scale_name(name)
        self._check_type(name, dtype, scale in self)
        if dtype == torch.float8_e4m3fn:
            self.expect_shape(scale, blocks, f"blocks of {name}")

    def _check_type(self, name: str, dtype: torch.dtype, scaled: bool) -> None:
        """MobeError unless values of that type can be read: floats, or FP8 with scales."""
        if dtype == torch.float8_e4m3fn:
            if not scaled:
                raise MobeError(f"{self.path}: tensor {name} is FP8 but {_scale_name(name)} is missing")
        elif dtype not in PLAIN_FLOATS:
            raise MobeError(
                f"{self.path}: tensor {name} has type {str(dtype).removeprefix('torch.')}; experts can be read from "
                "f32, f16, bf16 and block-scaled f8_e4m3. Convert the model to bf16 first."
            )

    def expert(self, layer: int, projection: str, index: int) -> torch.Tensor:
        """One routed expert's original matrix, float32 ``[p, d]`` (``[d, p]`` for down), checked to be finite.

        FP8 (e4m3 with block scales, as DeepSeek-V3 and Kimi-K2 are published) is dequantized.
        """
        shape = self.expert_shape(layer, projection)
        if self.is_fused(layer, projection):
            return self._fused_expert(layer, projection, index)
        name = self.family.expert_weight(layer, index, projection)
        self.expect_shape(name, shape, "from config.json")
        scale = self.get(_scale_name(name)) if _scale_name(name) in self else None
        return self.to_float(name, self.get(name), scale)

    def expert_stack(self, layer: int, projection: str) -> torch.Tensor:
        """All routed experts' matrices of one layer, float32 ``[n, p, d]`` (``[n, d, p]`` for down).

        Experts are read one at a time, so peak memory is the result and one more expert.
        """
        stack = torch.empty(self.n_expert, *self.expert_shape(layer, projection))
        for e in range(self.n_expert):
            stack[e] = self.expert(layer, projection, e)
        return stack

    def matrix(self, name: str) -> torch.Tensor:
        """Any weight as float32, FP8 dequantized, checked to be finite."""
        scale = self.get(_scale_name(name)) if _scale_name(name) in self else None
        return self.to_float(name, self.get(name), scale)

    def _fused_expert(self, layer: int, projection: str, index: int) -> torch.Tensor:
        """One expert's part of a fused tensor.  FP8 blocks may span several parts, so scales are applied before the split."""
        name, layout = self.fused_name(layer, projection), self.layout(layer)
        part, parts = layout.place(projection)
        if name.endswith(mxfp4.BLOCKS):
            self.check_experts(layer, projection)
            w = mxfp4.dequantize(self.get_row(name, index), self.get_row(mxfp4.scales_of(name), index))
            return self.to_float(name, layout.part(w, projection), None).contiguous()
        self.expect_shape(name, layout.stored_shape(projection), "from config.json")
        w = self.get_row(name, index)
        if _scale_name(name) not in self:
            return self.to_float(name, layout.part(w, projection), None).contiguous()
        scale = self.get_row(_scale_name(name), index)
        if (self.n_expert, *scale.shape) == layout.scale_shapes(projection)[
            -1
        ]:  # each part has its own blocks
            return self.to_float(name, w.chunk(parts)[part], scale.chunk(parts)[part])
        return layout.part(self.to_float(name, w, scale), projection).contiguous()

    def routed_scale(self) -> Any:
        """The factor of the routed experts' sum in config.json; None if there is none."""
        return self.config.get("routed_scaling_factor")

    def stream_writers(self, layer: int) -> list[tuple[str, str]]:
        """``(name, GGUF stem)`` of the matrices of :data:`WRITERS` that the layer has."""
        names = (
            (f"{self.family.layer_name(layer)}.{end}", f"blk.{layer}.{stem}") for end, stem in WRITERS.items()
        )
        return [(name, stem) for name, stem in names if name in self]

    def embedding_rows(self, count: int) -> torch.Tensor | None:
        """About ``count`` rows of the embedding, float32, spread over the vocabulary; None if there is no such tensor."""
        name = next((n for n in EMBEDDINGS if n in self), None)
        if name is None:
            return None
        n = self.shape(name)[0]
        return torch.stack([self.get_row(name, i).float() for i in range(0, n, max(1, n // count))])

    def to_float(self, name: str, w: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """The stored tensor ``w`` as float32, multiplied by its blocks' ``scale`` if it is FP8; MobeError if not finite."""
        self._check_type(name, w.dtype, scale is not None)
        if w.dtype == torch.float8_e4m3fn:
            assert scale is not None  # otherwise its type was refused before
            w = dequantize_fp8(name, w, scale, self._fp8_block())
        else:
            w = w.float()
        if not all_finite(w):
            bad = int((~torch.isfinite(w)).sum())
            raise MobeError(
                f"{self.path}: tensor {name} holds {bad} values that are NaN or Inf. The download is damaged or the "
                "model diverged in training; it cannot be factorized."
            )
        return w

    def _fp8_block(self) -> tuple[int, int]:
        """Rows and columns of an FP8 block, from config.json."""
        where, quantization = self.path / "config.json", self.config.get("quantization_config")
        if not isinstance(quantization, dict | None):
            raise MobeError(f"{where}: 'quantization_config' must be an object, got {quantization!r}")
        found = (quantization or {}).get("weight_block_size") or [128, 128]
        if not isinstance(found, list) or len(found) != 2 or not all(type(x) is int and x > 0 for x in found):
            raise MobeError(f"{where}: 'weight_block_size' must be two positive integers, got {found!r}")
        return found[0], found[1]

    @cached_property
    def n_params(self) -> int:
        """Parameters of the whole model, including stored multi-token-prediction layers."""
        return sum(
            info.numel * (2 if name.endswith(mxfp4.BLOCKS) else 1)
            for name, info in self._tensors.items()
            if not name.endswith(("_scale_inv", mxfp4.SCALES))
        )

    def kept_bytes(self, units: list[tuple[int, str]]) -> int:
        """Bytes of the model that are copied to the output when ``(layer, projection)`` ``units`` are factorized."""
        kept = sum(info.n_bytes for info in self._tensors.values())
        for layer, projection in units:
            _, parts = self.layout(layer).place(projection)
            kept -= sum(self.info(name).n_bytes for name in self.expert_sources(layer, projection)) // parts
        return kept

    # what is copied to another directory

    def small_files(self) -> list[Path]:
        """Tokenizer, chat template, generation config, remote code: all files that are neither weights nor rewritten."""
        return [
            path
            for path in sorted(self.path.iterdir())
            if path.is_file()
            and path.suffix not in WEIGHT_SUFFIXES
            and not path.name.endswith(".index.json")
            and path.name != self.config_name
            and not path.name.startswith(".")
        ]

    def copies(self, factorized: Iterable[tuple[int, str]]) -> list[Entry]:
        """All tensors except the matrices of the ``factorized`` (layer, projection) units, see ``entries.copies``."""
        return entries.copies(self, factorized, self.layout)

    @cached_property
    def checksum(self) -> str:
        """sha256 that tells one source model from another, cheaply.

        It covers config.json, every shard's name, size and header, and 32 samples of 4 KiB spread over each shard's data.
        This is enough to tell a fine-tune from its base, but does not prove that every byte is equal.
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


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Prefix ``config.json`` in a MobeError with its directory."""
    try:
        yield
    except MobeError as e:
        raise MobeError(f"{path}/{e.message}") from e


def dequantize_fp8(name: str, w: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float32 ``w * scale`` with one scale per block: w ``[a, b]``, scale ``[ceil(a/block0), ceil(b/block1)]``.

    Despite its name, ``weight_scale_inv`` in published files is the factor to multiply by (DeepSeek-V3,
    inference/fp8_cast_bf16.py).
    """
    expected = tuple(-(-size // step) for size, step in zip(w.shape, block, strict=True))
    if tuple(scale.shape) != expected:
        raise MobeError(
            f"scales of FP8 tensor {name} have shape {list(scale.shape)}, expected {list(expected)}"
        )
    full = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return w.float() * full[: w.shape[0], : w.shape[1]]


def _scale_name(name: str) -> str:
    """Name of an FP8 tensor's block scales: ``x.weight_scale_inv``, or ``gate_up_proj_scale_inv`` when fused."""
    return name + "_scale_inv"
