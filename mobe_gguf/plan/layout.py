"""The tensors of a model's plain GGUF file, with their shapes, and its keys: from headers, or from config.json alone.

Nothing is derived by hand.  Names and shapes are those that transformers' own class saves; the class is built without
memory, on the ``meta`` device.  llama.cpp's converter then treats them as it treats a real checkpoint.  O(tensors)
time: a second for Mixtral, some ten for DeepSeek-V3's 45,000.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.calibrate.skeleton import silent
from mobe_gguf.core.errors import MobeError
from mobe_gguf.export import converter
from mobe_gguf.formats.gguf import GgufFile, first_value, read_model
from mobe_gguf.formats.safetensors import read_header
from mobe_gguf.quant.mixture import ModelFacts

Shapes = dict[str, tuple[int, ...]]

#: Suffixes of what quantized checkpoints store beside a matrix; the matrix itself has the plain name and shape.
SCALES = ("_scale_inv", "_scale", ".input_scale", ".weight_scale_2")

#: Estimated bytes of a vocabulary's entry in GGUF keys, used if there is no tokenizer.  Token, type and merges of the
#: ten models in ``tests/plan`` take 40 to 60.
VOCABULARY_ENTRY = 50


@dataclass(frozen=True)
class Layout:
    """A model as llama.cpp would hold it.

    - ``tensors``: GGUF names and shapes of the plain model, in torch's order.
    - ``origin``: what was read.
    - ``native``: bits of the experts in the source (16, 8, 4).
    - ``vocabulary_bytes``: estimated size of the tokenizer's keys if there is no tokenizer.
    - ``typed_keys``: keys as gguf's writer holds them.  For a GGUF file instead ``file``, which has them, and
      ``head_bytes``, the bytes before its tensors.
    """

    name: str
    origin: str
    arch: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    forced: Mapping[str, str] = field(default_factory=dict)
    native: float = 16
    head_bytes: int = 0
    vocabulary_bytes: int = 0
    typed_keys: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None

    def number(self, key: str, default: int = 0) -> int:
        """The architecture's key as one number; the largest of a list with a number for each layer."""
        value = self.keys.get(f"{self.arch}.{key}", default)
        if isinstance(value, (list, tuple)):
            return int(max(value, default=default))
        return int(first_value(value) or default)

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts.of(self.arch, dict(self.keys))

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Layers with routed experts."""
        found = (re.fullmatch(r"blk\.(\d+)\.ffn_down_exps\.weight", name) for name in self.tensors)
        return tuple(sorted(int(match[1]) for match in found if match))

    @property
    def n_layer(self) -> int:
        """Layers that every token passes, without those for multi-token prediction, which come last."""
        return self.number("block_count") - self.number("nextn_predict_layers")

    @property
    def n_expert(self) -> int:
        return self.number("expert_count")

    @property
    def n_expert_used(self) -> int:
        return self.number("expert_used_count")

    def expert_shape(self) -> tuple[int, int, int]:
        """``(n, p, d)`` of the layer with the most weights; MobeError if no layer has routed experts."""
        shapes = [self.tensors[f"blk.{layer}.ffn_down_exps.weight"] for layer in self.expert_layers]
        if not shapes:
            raise MobeError(f"{self.name}: no layer has routed experts; this tool is for mixtures of experts")
        n, d, p = max(shapes, key=math.prod)
        return n, p, d


def read_layout(model: Path) -> Layout:
    """The layout of a Hugging Face directory (weights may be missing), a ``config.json`` or a GGUF file.

    MobeError if it is none of these, or neither transformers nor llama.cpp's converter knows the model.
    """
    if model.is_file() and model.suffix == ".json":
        return _of_config(model)
    if model.is_file():
        return _of_gguf(read_model(model))
    if (model / "config.json").is_file():
        return _of_config(model / "config.json")
    raise MobeError(f"{model}: expected a model directory, a config.json, a GGUF file or a hub id (org/name)")


# GGUF


def _of_gguf(file: GgufFile) -> Layout:
    tensors = {name: info.shape for name, info in file.tensors.items()}
    experts = [info for name, info in file.tensors.items() if "_exps.weight" in name]
    weights = sum(math.prod(info.shape) for info in experts)
    native = 8 * sum(info.n_bytes for info in experts) / weights if weights else 16
    keys = {key: getattr(value, "head", value) for key, value in file.keys.items()}
    head = min((info.offset for info in file.tensors.values()), default=0)
    return Layout(file.path.name, "GGUF header", file.arch, keys, tensors, {}, native, head, 0, {}, file.path)


# Hugging Face


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise MobeError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(config, dict) or not isinstance(config.get("architectures"), list):
        raise MobeError(
            f"{path}: holds no list 'architectures'; expected the config.json of a Hugging Face model"
        )
    return config


def source_shapes(path: Path) -> Shapes:
    """Names and shapes of the tensors in the checkpoint of a ``config.json``; MobeError as :func:`read_layout`."""
    return _source_shapes(path, _read_config(path))[0]


def _of_config(path: Path) -> Layout:
    config = _read_config(path)
    quantized = config.get("quantization_config") or {}
    native = _native_bits(quantized) if isinstance(quantized, dict) else 16
    shapes, origin = _source_shapes(path, config)
    package = converter._package()
    converter._set_log_level(False)
    with converter._explained(path.parent, "the tensors"), torch.inference_mode():
        hparams = package.ModelBase.load_hparams(path.parent, False)
        hparams.pop("quantization_config", None)
        conversion = _convert(package, path.parent, hparams, shapes)
        known = _set_keys(conversion, hparams)
    tensors = {t.name: tuple(t.source.shape) for t in conversion.tensors.values()}
    forced = {t.name: t.forced for t in conversion.tensors.values() if t.forced}
    return Layout(
        path.resolve().parent.name,
        origin,
        conversion.arch,
        conversion.keys,
        tensors,
        forced,
        native,
        vocabulary_bytes=0 if known else VOCABULARY_ENTRY * int(config.get("vocab_size") or 0),
        typed_keys=dict(conversion.writer.kv_data[0]),
    )


def _native_bits(quantized: Mapping[str, Any]) -> float:
    method = str(quantized.get("quant_method", ""))
    if method == "fp8":
        return 8
    if method in ("mxfp4", "nvfp4", "gptq", "awq") or quantized.get("format") == "pack-quantized":
        return 4
    return 16


def _source_shapes(path: Path, config: Mapping[str, Any]) -> tuple[Shapes, str]:
    """Names and shapes of the checkpoint's tensors: from its headers if these give them plainly, else from
    transformers."""
    headers = _headers(path.parent)
    if headers and not any(
        name.endswith(("_blocks", "_packed", ".qweight", ".experts.gate_up_proj")) for name in headers
    ):
        return headers, "headers"
    shapes = _transformers_shapes(path, config)
    return shapes | _prediction_layers(shapes, config), "config.json"


def _headers(directory: Path) -> Shapes:
    """Names and shapes in all safetensors files, without scales of quantized matrices; empty if a file in the index is
    missing."""
    index = directory / "model.safetensors.index.json"
    files = sorted(directory.glob("*.safetensors"))
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise MobeError(f"{index}: cannot be read as an index: {e}") from e
        files = [directory / str(name) for name in sorted(listed)]
    if not files or not all(file.is_file() for file in files):
        return {}
    found: Shapes = {}
    for file in files:
        found |= {name: tuple(info.shape) for name, info in read_header(file).items()}
    return {name: shape for name, shape in found.items() if not name.endswith(SCALES)}


def _transformers_shapes(path: Path, config: Mapping[str, Any]) -> Shapes:
    """The tensors that ``save_pretrained`` of transformers' class would write; the class is built without memory."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    names = [str(name) for name in config["architectures"]]
    found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if found is None:
        raise MobeError(
            f"{path}: transformers {transformers.__version__} knows no architecture {names[0]!r}, and there are no "
            "safetensors files whose headers say what the model holds. Give the directory with them, or a GGUF file: "
            "mobe-gguf convert MODEL model.gguf"
        )
    settings = {k: v for k, v in config.items() if k not in ("auto_map", "model_type", "quantization_config")}
    try:
        with torch.device("meta"), silent(True):
            model = found(found.config_class(**settings))
        return {
            name: tuple(t.shape) for name, t in revert_weight_conversion(model, model.state_dict()).items()
        }
    except Exception as e:  # transformers raises many kinds of errors for an invalid config
        raise MobeError(f"{path}: transformers cannot build {found.__name__}: {type(e).__name__}: {e}") from e


def _prediction_layers(shapes: Shapes, config: Mapping[str, Any]) -> Shapes:
    """Layers for multi-token prediction, which checkpoints hold but transformers' classes leave out.

    DeepSeek and GLM have ``num_nextn_predict_layers`` of them, after the last layer, with embeddings of their own.
    Qwen3-Next has one, under ``mtp.``; its config.json does not say so.  The converter keeps those that llama.cpp
    supports.
    """
    count, d, vocabulary = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    made: Shapes = {}
    if config.get("model_type") == "qwen3_next":
        last = f"model.layers.{count - 1}."  # has full attention, as the prediction layer has
        made |= {f"mtp.layers.0.{n.removeprefix(last)}": s for n, s in shapes.items() if n.startswith(last)}
        made |= {f"mtp.{n}.weight": (d,) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
        return made | {"mtp.fc.weight": (d, 2 * d)}
    last = f"model.layers.{count - 1}."
    for layer in range(count, count + int(config.get("num_nextn_predict_layers") or 0)):
        stem = f"model.layers.{layer}."
        made |= {stem + n.removeprefix(last): shape for n, shape in shapes.items() if n.startswith(last)}
        made |= {stem + f"{name}.weight": (d,) for name in ("enorm", "hnorm", "shared_head.norm")}
        made |= {stem + f"{name}.weight": (vocabulary, d) for name in ("embed_tokens", "shared_head.head")}
        made[stem + "eh_proj.weight"] = (d, 2 * d)
    return made


def _convert(
    package: Any, directory: Path, hparams: dict[str, Any], shapes: Shapes
) -> converter.HfConversion:
    """The converter's tensor table for tensors of these names and shapes, which hold no data."""
    lazy, base = package.base.LazyTorchTensor, package.base.ModelBase
    model_class = package.get_model_class(hparams["architectures"][0])
    caught: dict[str, Any] = {}
    result = converter.HfConversion()
    subclass = converter._catching(model_class, lazy, caught, result, None, None)

    if hasattr(subclass, "no_mtp") and not any(".mtp." in f".{n}" or "eh_proj" in n for n in shapes):
        subclass.no_mtp = True

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> dict[str, Any]:
        out = {}
        for name, shape in shapes.items():
            meta = lazy.meta_with_dtype_and_shape(torch.bfloat16, shape)
            if kept := self.filter_tensors(
                (name, lambda meta=meta: lazy(meta=meta, args=(meta,), func=_no_data))
            ):
                out[kept[0]] = kept[1]
        return out

    original = base.index_tensors  # families' own index_tensors call it, so it is replaced in the base class
    base.index_tensors = index_tensors
    try:
        result.model = subclass(
            directory, package.base.gguf.LlamaFileType.ALL_F32, Path("model.gguf"), hparams=hparams
        )
    finally:
        base.index_tensors = original
    converter.list_tensors(result, package.base.gguf, caught, hparams)
    return result


def _no_data(meta: Any) -> Any:
    """Zeros in place of small tensors that a family computes from others; only their shapes count."""
    return torch.zeros(meta.shape, dtype=meta.dtype)


def _set_keys(conversion: converter.HfConversion, hparams: Mapping[str, Any]) -> bool:
    """Set all keys as export does; without a tokenizer only the vocabulary's size.  Returns whether there was a
    tokenizer."""
    directory = conversion.model.dir_model
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
    known = any((directory / name).is_file() for name in files)
    if not known:

        def set_vocab() -> None:
            conversion.writer.add_tokenizer_model("none")
            conversion.writer.add_vocab_size(int(hparams["vocab_size"]))

        conversion.model.set_vocab = set_vocab
    conversion.finish("MOSTLY_F16", Path("model.gguf"))
    return known
