"""Put factors back into the GGUF file that they were made of: its keys and all other tensors are copied byte for byte.

:class:`GgufConversion` is the counterpart of ``converter.HfConversion``.  It has the file's tensors, in order.  A
tensor that keeps its type is copied; one that gets another type is decoded.  If gate and up are one tensor, they are
split in the layers that have factors, because llama.cpp then asks for both.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from mobe_gguf import runtime
from mobe_gguf.core import names
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.tensors import merged_name
from mobe_gguf.export.origin import Origin
from mobe_gguf.export.source import Source, Tensor
from mobe_gguf.export.tokenizer import Recognized
from mobe_gguf.export.write import Encoded
from mobe_gguf.formats.gguf import ALIGNMENT, MAGIC, padded
from mobe_gguf.models.factors import FactorDirectory
from mobe_gguf.models.gguf_source import GgufModel, StoredTensor
from mobe_gguf.quant.mixture import ModelFacts, Spec
from mobe_gguf.quant.recipe import (
    Choice,
    Recipe,
    allows_quantization,
    is_named,
    plan,
)
from mobe_gguf.runtime import ggml

#: Type numbers of GGUF values (ggml/docs/gguf.md).
_U16, _U32, _I32, _F32, _BOOL, _STRING = 2, 4, 5, 6, 7, 8
_FORMATS = {_U16: "<H", _U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?"}

#: Keys of a split file; the output may be split differently.
SPLIT_NO, SPLIT_TENSORS, SPLIT_COUNT = "split.no", "split.tensors.count", "split.count"


class Keys:
    """The keys of the new file: those of the source, unchanged, and those that are replaced or added.

    It has the methods of ``gguf.GGUFWriter`` that ``export`` calls.
    """

    def __init__(self, model: GgufModel):
        self.model = model
        self.set: dict[str, bytes] = {}
        self.values: dict[str, Any] = {
            name: value
            for name, value in model.file.keys.items()
            if name not in (SPLIT_NO, SPLIT_TENSORS, SPLIT_COUNT)
        }

    def add_uint32(self, name: str, value: int) -> None:
        self._add(name, value, pair(name, _U32, value))

    def add_bool(self, name: str, value: bool) -> None:
        self._add(name, value, pair(name, _BOOL, value))

    def add_float32(self, name: str, value: float) -> None:
        self._add(name, value, pair(name, _F32, value))

    def add_string(self, name: str, value: str) -> None:
        self._add(name, value, pair(name, _STRING, value))

    def _add(self, name: str, value: Any, raw: bytes) -> None:
        self.values[name] = value
        self.set[name] = raw

    def pairs(self) -> list[bytes]:
        """All of them, encoded, in order."""
        with open(self.model.file.path, "rb") as file:

            def read(name: str) -> bytes:
                begin, end = self.model.file.key_spans[name]
                file.seek(begin)
                return file.read(end - begin)

            return [self.set[name] if name in self.set else read(name) for name in self.values]


def pair(name: str, kind: int, value: Any) -> bytes:
    """One key with its type and value, as GGUF has it."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    return (
        text(name)
        + struct.pack("<I", kind)
        + (text(value) if kind == _STRING else struct.pack(_FORMATS[kind], value))
    )


class GgufConversion:
    """``source``, with gate and up split in the layers that have factors, under the names that A gets."""

    pre: Recognized | None = None

    def __init__(self, factors: FactorDirectory | None, source: GgufModel, rest: GgufModel | None = None):
        self.model = source
        self.arch = source.arch
        self.writer = Keys(source)
        self.whole = factors is None
        layers = () if factors is None else factors.moe_layers
        apart = {merged_name(i): i for i in layers if source.is_merged(i)}
        self.tensors: dict[str, Tensor] = {}
        if factors is not None:
            for index in layers:
                for projection in factors.layer(index).projections:
                    source.check_experts(index, projection)
        for name, info in source.file.tensors.items():
            stored = [StoredTensor.of(info)]
            if name in apart:
                stored = [source.stored(apart[name], projection) for projection in ("gate", "up")]
            for part in stored:
                self.tensors[part.name] = Tensor(part.name, part)
        self.rest = rest
        if rest is not None and factors is not None:
            replaced = {names.transform_name(i, p) for i in layers for p in factors.layer(i).projections}
            self._take(rest, [name for name in self.tensors if name not in replaced])
        self.recipe: Recipe | None = None
        self.notes: list[str] = []

    def _take(self, rest: GgufModel, wanted: list[str]) -> None:
        """Take these tensors from another file of the same model.  UsageError if it is of another model."""
        if rest.arch != self.arch:
            raise UsageError(
                f"--rest-from {rest.path}: it is of a {rest.arch} model, the factors of a {self.arch} model"
            )
        for name in wanted:
            found, shape = rest.file.tensors.get(name), tuple(self.tensors[name].source.shape)
            if found is None or tuple(found.shape) != shape:
                got = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise UsageError(
                    f"--rest-from {rest.path}: tensor {name} {got}, expected {list(shape)}; give a file of the same model"
                )
            self.tensors[name].source = StoredTensor.of(found)

    @property
    def keys(self) -> dict[str, Any]:
        """GGUF keys and values set so far."""
        return self.writer.values

    @property
    def alignment(self) -> int:
        return self.model.file.alignment

    def files(self) -> list[Path]:
        """Files of the source, and of the model that gives the rest."""
        models = (self.model,) if self.rest is None else (self.model, self.rest)
        return sorted({info.file for model in models for info in model.file.tensors.values()})

    def replace(self, name: str, source: Source) -> None:
        self.tensors[name].source = source

    def without_keys(self, names: Iterable[str]) -> None:
        for name in names:
            self.writer.values.pop(name, None)
            self.writer.set.pop(name, None)

    def finish(self, file_type: str, out: Path, origin: Origin | None = None) -> None:
        """Nothing to do: the source has all keys, and :meth:`header` sets those that depend on types."""

    def choose(self, recipe: Recipe) -> dict[str, Choice]:
        """The type of every tensor.

        Factors get types by ``recipe``.  Other tensors keep theirs, with three exceptions: an option names them,
        ``recipe.rest`` gives them types, or nothing is factorized and ``recipe`` applies to all.  UsageError as
        ``recipe.plan``.
        """
        self.recipe = recipe
        facts = ModelFacts.of(self.arch, self.keys)
        specs, kept = [], {}
        for tensor in self.tensors.values():
            spec = Spec(tensor.name, tensor.source.shape)
            allowed = allows_quantization(spec)
            if isinstance(tensor.source, StoredTensor) and not (
                allowed and (self.whole or is_named(spec, recipe))
            ):
                kept[tensor.name] = Choice(tensor.source.type, tensor.source.type)
            else:
                specs.append(spec)
        found = plan(specs, recipe, facts) | kept
        if recipe.rest is not None:
            rest = [
                Spec(t.name, t.source.shape)
                for t in self.tensors.values()
                if isinstance(t.source, StoredTensor)
            ]
            others = plan(rest, Recipe(recipe.rest, imatrix=recipe.imatrix, moments=recipe.moments), facts)
            changed = {s.name for s in rest if allows_quantization(s) and not is_named(s, recipe)}
            found |= {name: choice for name, choice in others.items() if name in changed}
        return found

    def is_copied(self, name: str, choice: Choice) -> bool:
        """Whether the tensor is copied as it is.  UsageError if it gets another type but its own cannot be decoded."""
        source = self.tensors[name].source
        if not isinstance(source, StoredTensor) or source.type == choice.type:
            return isinstance(source, StoredTensor)
        if not ggml.type_info(source.type).decodes:
            raise UsageError(
                f"tensor {name} has type {source.type}, which cannot be decoded; leave it as it is"
            )
        return False

    def header(self, shards: list[list[Encoded]], index: int) -> Header:
        """Head of one of the files; the first has the keys."""
        runtime.use_conversion()  # PyPI's gguf does not know all file types
        import gguf

        tensors = [tensor for shard in shards for tensor in shard]
        if index == 0:
            if file_type := self._file_type(tensors):
                self.writer.add_uint32("general.file_type", gguf.LlamaFileType[file_type].value)
            if any(ggml.type_info(tensor.type).quantized for tensor in tensors):
                self.writer.add_uint32("general.quantization_version", gguf.GGML_QUANT_VERSION)
            pairs = self.writer.pairs()
        else:
            key = "general.alignment"  # each file of a split needs it, else it has the default
            pairs = [pair(key, _U32, self.alignment)] if self.alignment != ALIGNMENT else []
        if len(shards) > 1:  # in the order and with the types of llama-gguf-split
            pairs += [
                pair(SPLIT_NO, _U16, index),
                pair(SPLIT_TENSORS, _I32, len(tensors)),
                pair(SPLIT_COUNT, _U16, len(shards)),
            ]
        return Header(pairs, shards[index], self.alignment)

    def _file_type(self, tensors: list[Encoded]) -> str | None:
        """File type of ``--quant`` if most parameters have its type; else None: the source's own fits best."""
        assert self.recipe is not None
        parameters: Counter[str] = Counter()
        for tensor in tensors:
            parameters[tensor.type] += math.prod(tensor.tensor.source.shape)
        return self.recipe.file_type if parameters.most_common(1)[0][0] == self.recipe.base else None


class Header:
    """Head of a GGUF file, version 3, with the methods of ``gguf.GGUFWriter`` that ``write_gguf`` calls.

    ``pairs``: encoded keys.  gguf-py's own writer would encode every key again, whole vocabularies included.
    """

    def __init__(self, pairs: list[bytes], tensors: list[Encoded], alignment: int):
        self.pairs = pairs
        self.tensors = tensors
        self.alignment = alignment
        self.file: IO[bytes] | None = None

    def write_header_to_file(self, path: Path | None = None) -> None:
        if path is None:
            raise ValueError("the head of a file needs its path")
        self.file = open(path, "wb")  # noqa: SIM115, closed in close()
        self.file.write(MAGIC + struct.pack("<IQQ", 3, len(self.tensors), len(self.pairs)))

    def write_kv_data_to_file(self) -> None:
        self._opened.write(b"".join(self.pairs))

    def write_ti_data_to_file(self) -> None:
        offset = 0
        for tensor in self.tensors:
            shape, name = tensor.tensor.source.shape[::-1], tensor.tensor.name.encode()
            self._opened.write(
                struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            )
            self._opened.write(struct.pack("<IQ", ggml.type_info(tensor.type).id, offset))
            offset += padded(tensor.nbytes, self.alignment)
        self._pad()

    def write_tensor_data(self, tensor: Encoded) -> None:
        tensor.tofile(self._opened)
        self._pad()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    @property
    def _opened(self) -> IO[bytes]:
        assert self.file is not None
        return self.file

    def _pad(self) -> None:
        self._opened.write(bytes(-self._opened.tell() % self.alignment))
