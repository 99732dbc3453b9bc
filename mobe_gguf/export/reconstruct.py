"""A MoBE checkpoint multiplied out: a Hugging Face directory of the original architecture.

    W_i = A_i f( sum_j alpha_ij B_j )   takes the place of A_i; bases and mixes are left out; config.json is the original's again

Everything else is copied as it is.  FP8 is dequantized, because experts in another type would contradict
``quantization_config``. Experts are computed while they are written.  Finished shards wait in the hidden folder
``.OUT.parts``; when all are finished, the folder is renamed to OUT.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.core.atomic import atomic_path, rename, write_json
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import check_space, describe_size, why_not_written
from mobe_gguf.core.progress import bar
from mobe_gguf.export.factors import check_factors
from mobe_gguf.export.shards import Parts, fingerprint
from mobe_gguf.formats.safetensors import DTYPES, INDEX_NAME, STORED, Entry, write_safetensors
from mobe_gguf.models.entries import fused_entries
from mobe_gguf.models.gguf_source import FACTORS_NAME
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint, ModelWithFactors, Reconstruction
from mobe_gguf.models.tensors import all_finite
from mobe_gguf.models.wab import WabCheckpoint, WabFiles
from mobe_gguf.models.writer import MAX_SHARD, copy_files, shard_names, shards

#: Keys of config.json that only a MoBE checkpoint has.
MOBE_KEYS = ("num_B", "activation", "mobe")

#: safetensors' names of the types that can be converted into each other.
SPELLED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass
class Reconstructed:
    """What was written, or would be.  ``dtype``: type of the experts; ``notes``: what a user should know about
    config.json."""

    path: str
    architecture: str
    dtype: str
    n_experts: int
    n_params: int
    n_bytes: int
    files: list[str]
    files_kept: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def open_factors(model: Path, wab: WabFiles | None) -> ModelWithFactors:
    """The MoBE checkpoint ``model``, or the authors' training output ``wab`` for it.

    MobeError if the factors are those of a GGUF file: only ``export`` can multiply these out.
    """
    if (model / FACTORS_NAME).is_file():
        raise MobeError(
            f"{model} holds factors of a GGUF file. To multiply these out into such a file:\n"
            f"  mobe-gguf export {model} dense.gguf --quant q8_0 --dense"
        )
    return MobeCheckpoint(model) if wab is None else WabCheckpoint(model, wab)


def reconstruct_model(
    checkpoint: ModelWithFactors,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD,
    dry_run: bool = False,
    quiet: bool = False,
) -> Reconstructed:
    """Write ``checkpoint`` with ordinary experts to the new directory ``out``.

    ``dtype`` (f32, f16, bf16): type of all matrices.  If None, experts get the type in config.json and other tensors
    keep theirs.  An interrupted run resumes at the unfinished shard, if nothing changed. MobeError if the checkpoint
    contradicts itself, ``out`` exists, or it cannot be written.
    """
    started = time.monotonic()
    _check_absent(out)
    check_factors(checkpoint)
    checkpoint.check_whole()
    target = STORED[dtype] if dtype is not None else _model_dtype(checkpoint.config)
    config, notes = original_config(checkpoint, target)
    items = list(_entries(checkpoint, target, dtype is not None))
    runs = shards(items, max_shard_size)
    names = shard_names(len(runs))
    result = Reconstructed(
        path=str(out),
        architecture=config["architectures"][0],
        dtype=next(name for name, value in STORED.items() if value == target),
        n_experts=checkpoint.n_expert * len(checkpoint.moe_layers),
        n_params=sum(math.prod(item.shape) for item in items),
        n_bytes=sum(item.n_bytes for item in items),
        files=names,
        notes=notes,
    )
    parts = Parts(out, _key(checkpoint, target, dtype, max_shard_size))
    if dry_run:
        return result
    try:
        check_space(out, result.n_bytes, parts.files(), "Make room or write elsewhere.")
        with parts.locked():
            _check_absent(out)  # the process that held the lock may have finished it
            try:
                result.files_kept = _write(checkpoint, parts, dict(zip(names, runs, strict=True)), quiet)
                index = {entry.name: name for name, run in zip(names, runs, strict=True) for entry in run}
                copy_files(checkpoint.small_files(), parts.folder)
                write_json(
                    parts.folder / INDEX_NAME,
                    {"metadata": {"total_size": result.n_bytes}, "weight_map": index},
                )
                write_json(parts.folder / "config.json", config)
                parts.state.unlink()
                rename(parts.folder, out)
            finally:
                parts.remove_if_useless()
    except OSError as e:
        kept = f"; finished shards are kept in {parts.folder}, the same command resumes from there"
        kept = kept if parts.finished else "; nothing was written"
        raise MobeError(f"{out}: cannot be written: {why_not_written(e)}{kept}") from e
    result.seconds = time.monotonic() - started
    return result


def _check_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise MobeError(f"{out} exists already. Choose another OUT or remove it.")


def _write(checkpoint: ModelWithFactors, parts: Parts, runs: dict[str, list[Entry]], quiet: bool) -> int:
    """Write the shards that are not finished; returns how many were."""
    parts.load()
    kept = len(parts.finished)
    parts.begin()
    with bar(f"reconstruct {checkpoint.path.name}", len(runs), quiet) as progress, torch.inference_mode():
        for name, run in runs.items():
            size = f"{name}: {describe_size(sum(entry.n_bytes for entry in run))}"
            if name in parts.finished:
                progress.found(1, f"{size}, finished earlier")
                continue
            with atomic_path(parts.folder / name) as part:
                write_safetensors(part, run, {"format": "pt"})
            parts.finish(name)
            progress.advance(1, size)
    return kept


def _key(checkpoint: ModelWithFactors, *settings: Any) -> str:
    return fingerprint(checkpoint.source_files(), checkpoint.activation, *settings)


# tensors


def _entries(checkpoint: ModelWithFactors, target: torch.dtype, convert_all: bool) -> Iterator[Entry]:
    """All tensors of the output, those of an expert stack one after the other."""
    layers = [checkpoint.layer(index) for index in checkpoint.moe_layers]
    units = [(layer, projection) for layer in layers for projection in layer.projections]
    dropped = {name for layer in layers for name in layer.factor_names}
    stacked = checkpoint.moe_layers if checkpoint.family.stacked_here else ()
    for index in stacked:  # transformers has no form with an expert in a tensor of its own
        dropped |= {n for p in checkpoint.family.kinds for n in checkpoint.expert_sources(index, p)}
        yield from fused_entries(checkpoint, index, _reader(checkpoint, index), target)
    others = {
        entry.name: entry
        for entry in checkpoint.copies([(layer.index, projection) for layer, projection in units])
        if entry.name not in dropped
    }
    for name, entry in others.items():
        if name.endswith("_scale_inv"):
            continue
        if entry.dtype.startswith("F8_"):
            yield _dequantized(checkpoint, entry, others.get(f"{name}_scale_inv"), target)
        elif convert_all and len(entry.shape) > 1 and entry.dtype in FLOATS:
            yield _converted(entry, target)
        else:
            yield entry
    for layer, projection in units if not stacked else ():
        read = Reconstruction(layer, projection)
        for e in range(checkpoint.n_expert):
            name = checkpoint.family.expert_weight(layer.index, e, projection)
            shape = checkpoint.expert_shape(layer.index, projection)
            yield _computed(name, shape, target, partial(read, e))


def _reader(checkpoint: ModelWithFactors, index: int) -> Callable[[str, int], torch.Tensor]:
    """What reads or multiplies out an expert's matrix of a layer."""
    layer = checkpoint.layer(index)
    factors = {p: Reconstruction(layer, p) for p in layer.projections}

    def read(projection: str, e: int) -> torch.Tensor:
        if projection in factors:
            return factors[projection](e)
        return checkpoint.expert(index, projection, e)

    return read


def _computed(
    name: str, shape: tuple[int, ...], target: torch.dtype, read: Callable[[], torch.Tensor]
) -> Entry:
    """A tensor that is computed while it is written."""

    def data() -> Iterator[Any]:
        tensor = read().to(target)
        if not all_finite(tensor):
            raise MobeError(
                f"tensor {name} holds values that {SPELLED[target].lower()} cannot; choose --dtype bf16 or f32"
            )
        yield tensor.contiguous().flatten().view(torch.uint8).numpy()

    return Entry(name, SPELLED[target], shape, math.prod(shape) * target.itemsize, data)


def _converted(entry: Entry, target: torch.dtype) -> Entry:
    """A tensor in another type, a piece at a time."""
    if DTYPES[entry.dtype] == target:
        return entry

    def data() -> Iterator[Any]:
        for chunk in entry.data():
            values = torch.frombuffer(bytearray(chunk), dtype=DTYPES[entry.dtype])
            yield values.to(target).view(torch.uint8).numpy()

    return Entry(entry.name, SPELLED[target], entry.shape, math.prod(entry.shape) * target.itemsize, data)


def _dequantized(
    checkpoint: ModelWithFactors, entry: Entry, scales: Entry | None, target: torch.dtype
) -> Entry:
    """A block-scaled FP8 tensor in another type."""

    def whole(entry: Entry) -> torch.Tensor:
        raw = bytearray().join(bytes(chunk) for chunk in entry.data())
        return torch.frombuffer(raw, dtype=DTYPES[entry.dtype]).view(entry.shape)

    def read() -> torch.Tensor:
        return checkpoint.to_float(entry.name, whole(entry), None if scales is None else whole(scales))

    return _computed(entry.name, entry.shape, target, read)


# config.json


def original_config(checkpoint: ModelWithFactors, target: torch.dtype) -> tuple[dict[str, Any], list[str]]:
    """config.json of the ordinary model, and notes on changes in it that a user may have to correct.

    In the MoBE authors' checkpoints, ``architectures`` and ``auto_map`` may name the authors' own classes, and code
    that is not beside them.
    """
    config = {key: value for key, value in checkpoint.config_file.items() if key not in MOBE_KEYS}
    config.pop("quantization_config", None)
    names = [name for name in config.get("architectures") or [] if not _is_mobe_class(name)]
    config["architectures"] = names or [checkpoint.family.architecture]
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(target).removeprefix("torch.")
    if not {"dtype", "torch_dtype"} & set(config):
        config["torch_dtype"] = str(target).removeprefix("torch.")
    notes = []
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict):
        kept = {key: value for key, value in auto_map.items() if _is_there(checkpoint.path, value)}
        gone = sorted({_module(value) for key, value in auto_map.items() if key not in kept})
        if gone:
            notes.append(
                f"auto_map of config.json without what is not in {checkpoint.path}: {', '.join(gone)}. A model that "
                "transformers does not know by itself needs that code from the original's directory"
            )
        config["auto_map"] = kept
        if not kept:
            del config["auto_map"]
    return config, notes


def _is_mobe_class(name: str) -> bool:
    """Whether ``name`` is a class of MoBE's authors, such as ``Qwen3MoBEForCausalLM``."""
    return re.search(r"MoBE", name) is not None


def _module(value: Any) -> str:
    return str(value).split("--")[-1].split(".")[0] + ".py"


def _is_there(path: Path, value: Any) -> bool:
    """Whether an entry of ``auto_map`` (``file.Class``, ``hub/id--file.Class``) leads to the original's code."""
    if not isinstance(value, str) or _is_mobe_class(value):
        return False
    return "--" in value or (path / _module(value)).is_file()


def _model_dtype(config: dict[str, Any]) -> torch.dtype:
    """The weights' type in config.json; bfloat16 if it names none of the three."""
    said = config.get("dtype") or config.get("torch_dtype")
    return next((t for t in STORED.values() if said == str(t).removeprefix("torch.")), torch.bfloat16)
