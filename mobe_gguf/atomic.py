"""Outputs appear under their name only when they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it, on failure remove it.

    The temporary name is ``.<name>.part``: the same for every run, so what a killed run left is overwritten
    by the next instead of piling up.  ``shared``: another process, on this machine or another, may write the same file
    at the same time; then the name is this process's own.
    """
    final = Path(path)
    own = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    part = final.with_name(f".{final.name}{own}.part")
    try:
        yield part
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(part, final)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
