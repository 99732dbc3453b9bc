"""Sizes in options, free space, checksums and names of files."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

from mobe_gguf.core.errors import MobeError, UsageError

#: Bytes read at a time.
CHUNK = 8 << 20

#: The system's error numbers for a full disk or an exhausted quota.
FULL = (errno.ENOSPC, errno.EDQUOT)

#: Units are powers of ten, as in llama-gguf-split; all options that take a size use them.
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str, option: str, instead: str = "") -> int:
    """``50G``, ``1.5 gb``, ``900K`` -> bytes; UsageError names the ``option`` if this is not a size or is below one byte.

    ``instead``: what else the option accepts, for the message.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT])B?", text.strip().upper())
    size = round(Decimal(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(
            f"{option} {text}: expected {instead}a number and K, M, G or T (powers of ten), for instance 900K, 4.6M or 50G"
        )
    return size


def format_size(n_bytes: int) -> str:
    """The text that :func:`parse_size` reads as ``n_bytes``: ``500M``, ``1.5M``, ``0.9M``."""
    text = f"{Decimal(n_bytes).scaleb(-6):f}"
    return f"{text.rstrip('0').rstrip('.')}M"


def describe_size(n_bytes: int, decimals: int = 2) -> str:
    """A size for people, in a suitable unit: ``12.50 GB``, ``4.61 MB``, ``900 B``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.{decimals}f} {unit}"
    return f"{n_bytes} B"


def amount(n: int) -> str:
    """``30.53 B``, ``15.20 M``, ``960``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= 10 * size or (n >= size and unit != "k"):
            return f"{n / size:,.2f} {unit}"
    return str(n)


def describe_sizes(*sizes: int) -> tuple[str, ...]:
    """:func:`describe_size` of several sizes, with enough decimals that different sizes look different."""
    for decimals in range(2, 10):
        texts = tuple(describe_size(size, decimals) for size in sizes)
        if len(set(texts)) == len(set(sizes)):
            break
    return texts


def readable(name: str) -> str:
    """A file's name as printable text, with U+FFFD for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def check_name(name: str) -> None:
    """UsageError if a file name or another argument is not UTF-8: GGUF keys and safetensors do not allow such names."""
    if readable(name) != name:
        raise UsageError(
            f"{readable(name)}: this name is not UTF-8 (bytes {os.fsencode(name)!r}); rename the file"
        )


def check_space(out: Path, needed: int, left: Iterable[Path], mend: str) -> None:
    """MobeError if the file system of ``out`` has less than ``needed`` bytes free.  The message ends with ``mend``.

    Leftovers of an interrupted run (``left`` and the temporary file beside ``out``) count as free: they are overwritten
    or reused.  An existing ``out`` does not count as free: it is replaced only when the new file is complete.
    """
    left = (out.with_name(f".{out.name}.part"), *left)
    free = shutil.disk_usage(out.absolute().parent).free
    free += sum(part.stat().st_blocks * 512 for part in left if part.is_file())
    if free < needed:
        wanted, there = describe_sizes(needed, free)
        raise MobeError(f"{out.absolute().parent}: {wanted} are needed, {there} are free. {mend}")


def why_not_written(e: OSError) -> str:
    """The reason why writing failed, for a message."""
    return "the disk is full" if e.errno in FULL else str(e.strerror or e)


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Unchanged:
    """Notices that the weights of ``model``, a directory or a GGUF file, are replaced or changed while they are read."""

    def __init__(self, model: Path):
        part = re.fullmatch(r"(.+-)\d{5}(-of-\d{5}\.gguf)", model.name)
        if model.is_dir():
            files = list(model.glob("*.safetensors"))
        elif part:
            files = [
                p for p in model.parent.iterdir() if p.name.startswith(part[1]) and p.name.endswith(part[2])
            ]
        else:
            files = [model]
        self._states = {file: self._state(file) for file in files}

    @staticmethod
    def _state(file: Path) -> tuple[int, int, int] | None:
        try:
            found = file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def check(self, left: str) -> None:
        """MobeError names a file that is another now.  ``left``: what is to be done with what was made of it."""
        for file, state in self._states.items():
            if (now := self._state(file)) != state:
                what = "is gone" if now is None else "was changed"
                raise MobeError(
                    f"{file}: it {what} while it was read, so the result would be of two models; {left}"
                )
