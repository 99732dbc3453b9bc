"""Files: their sizes as options say them, whether there is room for them, their checksums."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from mobe_gguf.errors import MobeError, UsageError

#: Bytes read at a time.
CHUNK = 8 << 20

#: Powers of ten, as llama-gguf-split reads sizes.
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str, option: str = "--split-max-size") -> int:
    """``50G`` -> bytes; UsageError names the ``option`` if it is no size."""
    match = re.fullmatch(r"(\d+)([MGT])", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"{option} {text}: expected a whole number and M, G or T, for instance 50G or 500M")
    return int(match[1]) * UNITS[match[2]]


def check_space(out: Path, needed: int, left: Iterable[Path], mend: str) -> None:
    """MobeError, which ends with ``mend``, if the file system of ``out`` has less than ``needed`` bytes free.

    What an interrupted run left, ``left`` and the file beside ``out``, is overwritten or taken over, so it counts as
    free; an existing ``out`` is not, for it is replaced only once the new file is whole.
    """
    left = (out.with_name(f".{out.name}.part"), *left)
    free = shutil.disk_usage(out.absolute().parent).free
    free += sum(part.stat().st_blocks * 512 for part in left if part.is_file())
    if free < needed:
        raise MobeError(
            f"{out.absolute().parent}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free. {mend}"
        )


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
