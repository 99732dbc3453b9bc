"""Writing the output: finished units become shards, everything else is copied byte for byte.

The directory grows under a temporary name beside the final one and is renamed when it is whole.  Unit files are
linked, not copied, where the file system can, so the factors need no second place on disk; the rest streams in chunks,
so memory does not grow with the model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mobe_gguf.core.atomic import rename, write_json
from mobe_gguf.formats.safetensors import INDEX_NAME, Entry, read_header, write_safetensors
from mobe_gguf.models.original import Original

#: Bytes of a shard, as ``save_pretrained`` has it.
MAX_SHARD = 5_000_000_000


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
        rest = shards(source.copies(units), MAX_SHARD)
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
        copy_files(source.small_files(), part)
        write_json(part / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(part / source.config_name, config)
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


def copy_files(paths: Iterable[Path], target: Path) -> None:
    """Into the directory ``target``, under their names."""
    for path in paths:
        shutil.copyfile(path, target / path.name)
