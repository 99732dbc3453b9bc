"""llama.cpp's own Hugging Face converter, run for everything but the bytes of the tensors.

The pinned ``conversion`` package knows the tokenizers, hyper-parameters, permutations, MLA splits and FP8
sources of every architecture.  Its model class is subclassed at run time.  The subclass hides the tensors
B and W (basis and mix) and catches what would be written, still lazy.  A of a factorized projection has
the name of the expert it replaces, so the class stacks the A's by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import re
import struct
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError, one_line
from mobe_gguf.export import stacks, tiktoken, tokenizer
from mobe_gguf.export.conversion import add_keys
from mobe_gguf.export.origin import Origin
from mobe_gguf.export.source import Lazy, Source, Tensor, Whole, cast, evaluate
from mobe_gguf.export.write import Encoded, Head
from mobe_gguf.formats.safetensors import INDEX_NAME, SINGLE_NAME, read_json
from mobe_gguf.models.config_values import for_converter
from mobe_gguf.models.factors import ModelDirectory
from mobe_gguf.models.families import layer_in
from mobe_gguf.quant.mixture import ModelFacts, Spec
from mobe_gguf.quant.recipe import Choice, Recipe, plan

#: Tensors of a MoBE checkpoint that the converter must not see: ``block.B_gate``, ``block.W_up_1``, ...
FACTOR = re.compile(r"\.[BW]_(gate|up|down)(_\d+)?$")

#: Architectures whose graph needs an output matrix in the file: if a model's is tied to the embeddings, these are
#: written twice.
UNTIED = ("gpt-oss", "qwen2moe", "olmoe", "bailingmoe", "dots1", "exaone-moe", "minimax-m2")


@dataclass
class HfConversion:
    """A model as the converter sees it, before a byte is written.  ``writer`` is a ``gguf.GGUFWriter``."""

    arch: str = ""
    model: Any = None
    writer: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    pre: tokenizer.Recognized | None = None
    own_keys: dict[str, int | float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    view: tempfile.TemporaryDirectory[str] | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """GGUF keys and values set so far."""
        return {key: value.value for part in self.writer.kv_data for key, value in part.items()}

    def without_keys(self, names: Iterable[str]) -> None:
        for part in self.writer.kv_data:
            for name in names:
                part.pop(name, None)

    @property
    def alignment(self) -> int:
        """Alignment of each tensor's data, in bytes."""
        return self.writer.data_alignment

    def files(self) -> list[Path]:
        """Files that it reads besides the checkpoint's own: none."""
        return []

    def replace(self, name: str, source: Source) -> None:
        self.tensors[name].source = source
        for part in self.writer.tensors:  # general.size_label is counted from these
            if name in part:
                part[name].shape = source.shape

    def choose(self, recipe: Recipe) -> dict[str, Choice]:
        """The type of every tensor as llama-quantize chooses it, except where the converter insists on one."""
        specs = [Spec(t.name, t.source.shape) for t in self.tensors.values()]
        choices = plan(specs, recipe, ModelFacts.of(self.arch, self.keys))
        return choices | {t.name: Choice(t.forced, t.forced) for t in self.tensors.values() if t.forced}

    def is_copied(self, name: str, choice: Choice) -> bool:
        """Whether the tensor passes through as it is stored: never for a Hugging Face model."""
        return False

    def finish(self, file_type: str, out: Path, origin: Origin | None = None) -> None:
        """Set the remaining keys, tokenizer included; ``file_type`` as in ``gguf.LlamaFileType``.

        ``general.*`` comes from ``origin``, or from the name of the model's directory if there is none.
        """
        gguf = _package().base.gguf
        self.model.ftype = gguf.LlamaFileType[file_type]
        self.model.fname_out = out
        path = self.model.dir_model
        with _explained(path, "the tokenizer and metadata"), no_remote_code(path):
            if origin is None:
                self.model.prepare_metadata(vocab_only=False)
            else:
                with origin.directory(path) as self.model.dir_model_card:
                    self.model.prepare_metadata(vocab_only=False)
        self._set_own_keys()
        if origin is not None and (said := origin.keys()):
            for part in self.writer.kv_data:
                for key in [key for key in part if key.startswith("general.base_model.")]:
                    del part[key]
            add_keys(self.writer, said)
        self._check_keys(path)

    def _check_keys(self, path: Path) -> None:
        """MobeError names the first key whose value the file has no room for."""
        for part in self.writer.kv_data:
            for key, value in part.items():
                try:
                    self.writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)
                except (struct.error, ValueError, TypeError, AttributeError) as e:
                    said = repr(value.value)[:60]
                    raise MobeError(
                        f"{path}: llama.cpp's converter makes {said} of key {key}, which is no {value.type.name}: {e}. "
                        "Look for it in config.json and the tokenizer's files"
                    ) from e

    def header(self, shards: list[list[Encoded]], index: int) -> Head:
        """A ``gguf.GGUFWriter`` with the keys and the tensor table of one of the files."""
        gguf = _package().base.gguf
        writer = gguf.GGUFWriter(path=None, arch=self.arch)
        writer.kv_data = [dict(self.writer.kv_data[0]) if index == 0 else {}]
        if len(shards) > 1:  # in the order and with the types of llama-gguf-split
            writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, index)
            writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, sum(map(len, shards)))
            writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, len(shards))
        for tensor in shards[index]:
            ggml_type = gguf.GGMLQuantizationType[tensor.type.upper()]
            shape = tensor.tensor.source.shape
            writer.add_tensor_info(
                tensor.tensor.name, shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=ggml_type
            )
        return writer

    def _set_own_keys(self) -> None:
        """Set keys that the runtime reads and the converter writes differently, or not at all."""
        add_keys(self.writer, {f"{self.arch}.{key}": value for key, value in self.own_keys.items()})


def convert(
    checkpoint: ModelDirectory, out: Path, tokenizer_pre: str | None = None, verbose: bool = False
) -> HfConversion:
    """Run the converter's model class over ``checkpoint``.  Nothing is written to ``out``; only its name is used.

    ``tokenizer_pre``: a value for ``tokenizer.ggml.pre`` instead of the recognized one.  MobeError if the
    converter does not know the architecture, or refuses the model.
    """
    conversion = _package()
    _set_log_level(verbose)
    pre = None
    if tokenizer_pre is not None:
        listing = inspect.getsource(conversion.base.TextModel.get_vocab_base_pre)
        pre = tokenizer.check_name(tokenizer_pre, tokenizer.known_names(listing))
    with _explained(checkpoint.path, "the tensors"), torch.inference_mode():
        judgement = checkpoint.check_values()
        said = checkpoint.family.text(conversion.ModelBase.load_hparams(checkpoint.path, False))
        hparams = for_converter(checkpoint.family.name, said, judgement)
        if "lm_head.weight" in checkpoint:  # as transformers: an output matrix in the checkpoint is not tied
            hparams["tie_word_embeddings"] = False
        model_class = _model_class(conversion, checkpoint, hparams)
        gguf = conversion.base.gguf
        result = HfConversion(own_keys=judgement.keys, notes=[*checkpoint.notes, *judgement.notes])
        caught: dict[str, Any] = {}
        subclass = _catching(model_class, conversion.base.LazyTorchTensor, caught, result, pre, checkpoint)
        folder = checkpoint.path
        if checkpoint.has_stale_index:
            result.view = _without_index(checkpoint.path)
            folder = Path(result.view.name) / checkpoint.path.absolute().name
        result.model = subclass(folder, gguf.LlamaFileType.ALL_F32, out, hparams=hparams)
        list_tensors(result, gguf, caught, hparams)
        result.tensors = stacks.add(result.tensors, result.writer, checkpoint)
    return result


def list_tensors(result: HfConversion, gguf: Any, caught: dict[str, Any], hparams: Mapping[str, Any]) -> None:
    """Let ``result.model``, made by a class of :func:`_catching`, list its tensors and keys in ``result``."""
    result.arch = result.model.gguf_writer.arch
    result.writer = _catcher(gguf.GGUFWriter, caught, result)(path=None, arch=result.arch)
    result.writer.kv_data = result.model.gguf_writer.kv_data  # some classes set keys when they are made
    result.model.gguf_writer = result.writer
    result.model.prepare_tensors()
    if result.arch in UNTIED and hparams.get("tie_word_embeddings"):
        _untie(result)


def _fused_of(checkpoint: ModelDirectory) -> dict[str, list[tuple[str, int, slice]]]:
    """Fused tensor, with all experts of a layer -> the matrices in it: the name of each one alone, the expert's index,
    its rows.

    For most families the converter's classes know only separate experts.
    """
    family, found = checkpoint.family, {}
    for layer in checkpoint.moe_layers:
        for projections in family.fused:
            if not checkpoint.is_fused(layer, projections[0]):
                continue
            rows = checkpoint.expert_shape(layer, projections[0])[0]
            found[checkpoint.fused_name(layer, projections[0])] = [
                (family.expert_weight(layer, e, projection), e, slice(i * rows, (i + 1) * rows))
                for e in range(checkpoint.n_expert)
                for i, projection in enumerate(projections)
            ]
    return found


def _own_name(checkpoint: ModelDirectory, name: str) -> str:
    """The converter's name for a tensor beside fused experts."""
    layer = layer_in(name)
    fused = layer in checkpoint.moe_layers and checkpoint.is_fused(layer, "up")
    name = checkpoint.family.own_name(name, layer) if fused else name
    return checkpoint.family.converter_name(name)


def _predicts(checkpoint: ModelDirectory) -> bool:
    """Whether there are layers for multi-token prediction."""
    return any(
        layer_in(name) >= checkpoint.n_layer or re.match(r"(model\.)?mtp", name) for name in checkpoint.names
    )


def _without_index(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary directory that holds a directory of the same name as ``path``, with links to all its files except the
    index, which the converter would believe."""
    view = tempfile.TemporaryDirectory(prefix="mobe-gguf-")
    folder = Path(view.name) / path.absolute().name
    folder.mkdir()
    for file in path.iterdir():
        if file.name != INDEX_NAME and (file.suffix != ".safetensors" or file.name == SINGLE_NAME):
            (folder / file.name).symlink_to(file.absolute())
    return view


def _take(tensor: torch.Tensor, index: int, rows: slice) -> torch.Tensor:
    """Some rows of one expert, out of the stack of all."""
    return tensor[index, rows]


def _untie(result: HfConversion) -> None:
    """Write the embeddings as the output matrix, too."""
    if "output.weight" not in result.tensors:
        source = result.tensors["token_embd.weight"].source
        result.tensors["output.weight"] = Tensor("output.weight", source)
        n_bytes = 4 * int(np.prod(source.shape, dtype=np.int64))
        result.writer.add_tensor_info("output.weight", source.shape, np.dtype(np.float32), n_bytes)


def _model_class(conversion: Any, checkpoint: ModelDirectory, hparams: dict[str, Any]) -> Any:
    """The converter's class; ``hparams["architectures"]`` is corrected if it names a class of MoBE's authors."""
    names = [*(hparams.get("architectures") or []), checkpoint.family.architecture]
    for name in names:
        if name is None:
            continue
        try:
            found = conversion.get_model_class(name)
        except NotImplementedError:
            continue
        hparams["architectures"] = [name]
        return found
    raise MobeError(
        f"{checkpoint.path}/config.json: llama.cpp's converter knows no architecture {names[0]!r}"
    )


def _catching(
    base: Any,
    lazy: Any,
    caught: dict[str, Any],
    result: HfConversion,
    pre: Any,
    checkpoint: ModelDirectory | None,
) -> Any:
    """A subclass of the converter's model class ``base`` that hides B and W and collects its tensors in ``caught``.

    ``checkpoint``: what it reads, None if it gets only names and shapes.
    """
    stacked = set() if checkpoint is None else stacks.sources(checkpoint)
    fused = {} if checkpoint is None or stacked else _fused_of(checkpoint)

    class Marked(lazy):
        """A LazyTorchTensor that marks conversions between types, see ``source.is_cast``."""

        _tensor_type = torch.Tensor

        def to(self, *args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
                meta = self.meta_with_dtype_and_shape(args[0], self.shape)
                return type(self)(meta=meta, args=(self, args[0]), func=cast)
            return self._wrap_fn(torch.Tensor.to)(self, *args, **kwargs)

    class Catching(base):
        model_arch = base.model_arch
        #: True if no layer is for multi-token prediction; some classes expect such layers in every model.
        no_mtp = base.no_mtp if checkpoint is None else not _predicts(checkpoint)

        def set_vocab(self) -> None:
            with _explained(self.dir_model, "the tokenizer", NoVocabulary):
                try:
                    super().set_vocab()
                except (FileNotFoundError, AttributeError, AssertionError) as e:
                    if not _is_in_json(self.dir_model, str(e)):
                        raise
                    self._set_vocab_gpt2()

        @classmethod
        def filter_tensors(cls, item: Any) -> Any:
            return None if FACTOR.search(item[0]) or item[0] in stacked else super().filter_tensors(item)

        def get_tensors(self) -> Iterator[tuple[str, Any]]:
            for name, tensor in super().get_tensors():
                if type(tensor) is lazy and tensor._data is None:
                    tensor = Marked(
                        meta=tensor._meta, args=tensor._args, kwargs=tensor._kwargs, func=tensor._func
                    )
                if name not in fused:
                    yield name if checkpoint is None else _own_name(checkpoint, name), tensor
                for expert, index, rows in fused.get(name, ()):
                    yield (
                        expert,
                        Marked(meta=tensor._meta[index, rows], args=(tensor, index, rows), func=_take),
                    )

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            for new_name, tensor in super().modify_tensors(data_torch, name, bid):
                caught[new_name] = tensor
                yield new_name, tensor

        def get_vocab_base_pre(self, tokenizer_: Any) -> str:
            if isinstance(tokenizer_, tiktoken.Tiktoken):
                result.pre = pre or tokenizer_.recognized
            else:
                result.pre = pre or self._recognized(tokenizer_)
            return result.pre.name

        def _recognized(self, tokenizer_: Any) -> tokenizer.Recognized:
            logger = logging.getLogger("hf-to-gguf")
            level = logger.level
            logger.setLevel(
                logging.ERROR
            )  # the converter's long warning is about something that is handled here
            try:
                return tokenizer.Recognized(
                    super().get_vocab_base_pre(tokenizer_), "llama.cpp's converter knows it"
                )
            except NotImplementedError:
                return tokenizer.recognize(self.dir_model)
            finally:
                logger.setLevel(level)

    return Catching


def _is_in_json(path: Path, why: str) -> bool:
    """Whether tokenizer.json has the vocabulary that a class of the converter could not read, for the reason ``why``:
    the class wants a sentencepiece model, ranks that are in Python code, or a setting in the form of transformers 4."""
    if "add_bos_token" in why:
        said = path / "tokenizer_config.json"
        return said.is_file() and read_json(said).get("add_bos_token") is True
    return ("tokenizer.model" in why or "mergeable_ranks" in why) and (path / "tokenizer.json").is_file()


def _catcher(base: Any, caught: dict[str, Any], result: HfConversion) -> Any:
    """A subclass of GGUFWriter ``base`` that lists the tensors in ``result`` and keeps no data."""

    class Catcher(base):
        def add_tensor(
            self, name: str, tensor: Any, raw_shape: Any = None, raw_dtype: Any = None, **_: Any
        ) -> None:
            if name in caught:
                node = caught.pop(name)
                source: Source = Lazy(node) if hasattr(node, "_func") else Whole(node)
            else:  # the class writes small tensors, such as scales, without modify_tensors
                array = np.asarray(evaluate(tensor))
                if array.dtype not in (np.float32, np.float16):
                    raise MobeError(
                        f"tensor {name} is already quantized in the source; convert the model to bf16 first"
                    )
                source = Whole(torch.from_numpy(array))
            shape = source.shape
            self.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape, dtype=np.int64)))
            forced = None if raw_dtype is None or raw_dtype.name == "F32" else raw_dtype.name.lower()
            result.tensors[name] = Tensor(name, source, forced)

    return Catcher


def _package() -> Any:
    """The pinned source's ``conversion`` package, without its models, which are loaded later."""
    runtime.use_conversion()
    return importlib.import_module("conversion")


def _set_log_level(verbose: bool) -> None:
    """Set the level of the converter's loggers; its warnings are about things that are handled or explained here."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("hf-to-gguf", "gguf", "transformers"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


@contextlib.contextmanager
def no_remote_code(path: Path) -> Iterator[None]:
    """Keep the converter from running Python code in the model's directory, which it would do by default.

    If there is a tokenizer.json beside the code, it describes the same vocabulary and is used instead; so is Kimi-K2's
    rank file, see ``tiktoken``.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    original = AutoTokenizer.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **(kwargs | {"trust_remote_code": False}))
        except ValueError as e:
            if "trust_remote_code" not in str(e):
                raise
            if (path / "tokenizer.json").is_file():
                return PreTrainedTokenizerFast.from_pretrained(path)
            if found := tiktoken.read(path):
                return found
            code = ", ".join(sorted(p.name for p in path.glob("*.py"))) or "not in this directory"
            raise MobeError(
                f"{path}: its tokenizer is Python code ({code}), and code out of a model directory is never run here. "
                f"Put the tokenizer as a file beside it, {path / 'tokenizer.json'}: many models have a copy of it in "
                "that form on the hub."
            ) from e

    AutoTokenizer.from_pretrained = from_pretrained  # type: ignore[method-assign]
    try:
        yield
    finally:
        AutoTokenizer.from_pretrained = original  # type: ignore[method-assign]


class NoVocabulary(MobeError):
    """The tokenizer cannot be converted; the model can."""


@contextlib.contextmanager
def _explained(path: Path, what: str, kind: type[MobeError] = MobeError) -> Iterator[None]:
    """Turn whatever the converter's code raises into a MobeError of ``kind``."""
    try:
        yield
    except MobeError as e:
        if isinstance(e, kind):
            raise
        raise kind(e.message) from e
    except Exception as e:
        if "StrictDataclass" in type(e).__name__:  # transformers reads config.json for a tokenizer, too
            raise MobeError(f"{path}/config.json: transformers refuses it: {one_line(e)}") from e
        said = one_line(e) or traceback.extract_tb(e.__traceback__)[-1].line  # of an assertion without words
        raise kind(
            f"{path}: llama.cpp's converter cannot take over {what}: {type(e).__name__}: {said}. "
            "Run again with -v to see what it did."
        ) from e
