"""The finished file in several files, by llama-gguf-split."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mobe_gguf.core.atomic import rename, sync
from mobe_gguf.core.errors import UsageError
from mobe_gguf.evaluate import tool
from mobe_gguf.export.shards import shard_paths
from mobe_gguf.formats.gguf import read_gguf

#: llama-gguf-split takes whole megabytes.
UNIT = 10**6


def check_limit(limit: int | None) -> None:
    """UsageError if files cannot be as small as ``limit``."""
    if limit is not None and limit < UNIT:
        raise UsageError(f"--split-max-size: expected at least 1M, got {limit} bytes")


def split(path: Path, folder: Path, limit: int, out: Path) -> list[Path]:
    """Split the file at ``path`` into files with at most ``limit`` bytes of tensors, with the names that ``out`` gives
    them; returns their final paths, the first one first.  A file that is no larger becomes ``out`` itself.

    ``folder``: for unfinished files, on the file system of ``out``.  A tensor larger than ``limit`` gets a file of its
    own.  The first file comes last, so a set with a first file is whole.
    """
    tensors = sum(info.n_bytes for info in read_gguf(path).tensors.values())
    if tensors <= limit:
        rename(path, out)
        return [out]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stem = out.name.removesuffix(".gguf")
    tool.run(
        "llama-gguf-split", "--split", "--split-max-size", f"{limit // UNIT}M", str(path), str(folder / stem)
    )
    made = sorted(folder.glob("*.gguf"), key=_number)
    paths = shard_paths(out, len(made)) if len(made) > 1 else [out]
    paths[0].unlink(missing_ok=True)
    for file, to in reversed(list(zip(made, paths, strict=True))):
        sync(file)
        rename(file, to)
    return paths


def _number(path: Path) -> int:
    found = re.search(r"-(\d+)-of-\d+\.gguf$", path.name)
    return int(found[1]) if found else 0
