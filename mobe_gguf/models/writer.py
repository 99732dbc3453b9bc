"""Writing the output: finished units become shards, everything else is copied byte for byte.

The directory grows under a temporary name beside the final one and is renamed when it is whole.  Unit files are
linked, not copied, where the file system can, so the factors need no second place on disk; the rest streams in chunks,
so memory does not grow with the model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mobe_gguf.core.atomic import rename, write_json
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.formats.safetensors import INDEX_NAME, Entry, TensorInfo, read_header, write_safetensors
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.gguf_factors import FACTORS_NAME
from mobe_gguf.models.original import Original

#: Bytes of a shard, as ``save_pretrained`` has it.
MAX_SHARD = 5_000_000_000

#: Files that hold weights in one way or another; every other file of the source is copied.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def copies(checkpoint: Checkpoint, factorized: Iterable[tuple[int, str]]) -> list[Entry]:
    """What is taken over from the source: all but the matrices of the ``factorized`` (layer, projection) units.

    Where transformers 5 has fused a layer's experts into one tensor they are taken apart again, and the MoE block gets
    its classic name: a MoBE checkpoint always has one tensor an expert.
    """
    factorized = set(factorized)
    dropped = {source for unit in factorized for source in checkpoint.expert_sources(*unit)}
    family = checkpoint.family
    fused: dict[str, Any] = {}
    out: list[Entry] = []
    for layer in checkpoint.moe_layers:
        for projection in ALL_PROJECTIONS:
            if checkpoint.is_fused(layer, projection):
                for source in checkpoint.expert_sources(layer, projection):
                    fused.setdefault(source, []).append((layer, projection))
    renamed = {
        family.fused_weight(layer, "down").removesuffix("experts.down_proj"): family.block_name(layer) + "."
        for units in fused.values()
        for layer, _ in units
    }
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if name in fused:
            for layer, projection in fused[name]:
                if (layer, projection) not in factorized:
                    out += _split(checkpoint, name, info, layer, projection)
        elif name not in dropped:
            for old, new in renamed.items():
                name = new + name.removeprefix(old) if name.startswith(old) else name
            file = checkpoint.path / info.shard
            out.append(Entry.copy(name, info.dtype, info.shape, file, info.begin, info.end))
    return out


def _split(
    checkpoint: Checkpoint, name: str, info: TensorInfo, layer: int, projection: str
) -> Iterator[Entry]:
    """One expert after the other out of a fused tensor ``[n, 2p, d]`` (gate first) or ``[n, d, p]``, or its scales."""
    n, rows, columns = info.shape
    part, halves = checkpoint.layout(layer).place(projection)
    size = (info.end - info.begin) // n // halves
    offset = part * size
    suffix = "_scale_inv" if name.endswith("_scale_inv") else ""
    for e in range(n):
        begin = info.begin + e * halves * size + offset
        to = checkpoint.family.expert_weight(layer, e, projection) + suffix
        yield Entry.copy(
            to, info.dtype, (rows // halves, columns), checkpoint.path / info.shard, begin, begin + size
        )


def write_output(
    out: Path, source: Original, units: Mapping[tuple[int, str], Path], config: dict[str, Any]
) -> None:
    """Assemble directory ``out`` from the unit files and what of the source comes along; it appears only when it is whole.

    Of a Hugging Face directory all that is not factorized comes along; what is in a GGUF file stays there.
    """
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        rest = shards(copies(source, units), MAX_SHARD) if isinstance(source, Checkpoint) else []
        names = shard_names(len(units) + len(rest))
        weight_map: dict[str, str] = {}
        total = 0
        for name, unit in zip(names, units.values(), strict=False):
            _link(unit, part / name)
            for tensor, info in read_header(unit).items():
                weight_map[tensor] = name
                total += info.n_bytes
        for name, shard in zip(names[len(units) :], rest, strict=True):
            write_safetensors(part / name, shard, {"format": "pt"})
            weight_map |= {entry.name: name for entry in shard}
            total += sum(entry.n_bytes for entry in shard)
        if isinstance(source, Checkpoint):
            copy_small_files(source.path, part)
        write_json(part / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(part / ("config.json" if isinstance(source, Checkpoint) else FACTORS_NAME), config)
        rename(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def shard_names(count: int) -> list[str]:
    """Of all ``count`` files of a model, as ``save_pretrained`` names them."""
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def shards(items: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """Runs of tensors of at most ``limit`` bytes (a larger tensor gets a shard of its own)."""
    runs: list[list[Entry]] = []
    size = 0
    for item in items:
        if not runs or size + item.n_bytes > limit:
            runs.append([])
            size = 0
        runs[-1].append(item)
        size += item.n_bytes
    return runs


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def copy_small_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation config, remote code: whatever is not weights nor written anew."""
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name != "config.json" and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
