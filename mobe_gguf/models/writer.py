"""Write the output: finished units become shards, everything else is copied byte for byte.

The directory is written under a temporary name beside the final one and is renamed when it is complete.  Where the file
system allows it, unit files are linked instead of copied, so the factors take no additional disk space.  The rest is copied
in chunks, so memory does not grow with the model.
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

#: Bytes of a shard, as in ``save_pretrained``.
MAX_SHARD = 5_000_000_000


def write_output(
    out: Path, source: Original, units: Mapping[tuple[int, str], Path], config: dict[str, Any]
) -> None:
    """Assemble directory ``out`` from the unit files and copies from the source.  It appears only when it is complete.

    From a Hugging Face directory everything that is not factorized is copied.  The content of a GGUF file stays there.
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
    """Names of the ``count`` files of a model, as in ``save_pretrained``."""
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def shards(items: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """Group tensors into shards of at most ``limit`` bytes (a larger tensor gets its own shard)."""
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
    """Copy files into the directory ``target``, under their own names."""
    for path in paths:
        shutil.copyfile(path, target / path.name)
