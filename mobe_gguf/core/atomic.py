"""Outputs appear under their name only when they are whole, and each is written by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.locks import Busy, locked

#: Seconds that a writer waits for another of the same file: small ones take their turns, of a large one it is told.
PATIENCE = 5.0

KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


def destination(path: str | os.PathLike[str]) -> Path:
    """The file that is replaced when ``path`` is written: itself, or the one that it is a symbolic link to.

    So a link stays and its target changes, as when a program opens the link to write; a dangling one gets its target.
    MobeError if what is there is no regular file (a directory, device, pipe or socket), or links lead in a circle.
    """
    path = Path(path)
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        kind = stat.S_IFREG
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise MobeError(
            f"{path}: symbolic links that lead in a circle; remove them or write elsewhere"
        ) from e
    if kind != stat.S_IFREG:
        raise MobeError(
            f"{path}: it is a {KINDS.get(kind, 'special file')}, expected a file or none; write elsewhere"
        )
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_output(out: Path) -> None:
    """MobeError or UsageError if ``out`` cannot become a file, before any work is done."""
    if out.is_dir():
        raise UsageError(f"{out} is a directory; name the file to write, for instance {out / 'model.gguf'}")
    final = destination(out)
    parent = final.absolute().parent
    link = f"{out} links to {final}: " if out.is_symlink() else ""
    if not parent.is_dir():
        raise MobeError(f"{link}{parent}: no such directory. Make it first:\n  mkdir -p {parent}")
    if not os.access(parent, os.W_OK):
        raise MobeError(f"{link}{parent}: no permission to write there; choose another place for {out.name}")


@contextlib.contextmanager
def held(lock: Path, out: Path) -> Iterator[bool]:
    """Hold ``lock``, see ``locks``, so that no other process nor thread writes ``out``.  Its holder may rename or remove it.

    Yields False, and holds nothing, on a file system without locks.  MobeError if another holds it for PATIENCE seconds.
    """
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(locked(lock, PATIENCE))
        except Busy as e:
            raise MobeError(
                f"{out}: another run is writing it; wait for that one, or choose another OUT"
            ) from e
        yield fd is not None


def sync(path: Path) -> None:
    """Return when the file or directory is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Give what is whole another name, for good: the directory that has the name is on the disk, too.

    An existing file, or empty directory, is replaced.  A file's content must have been synced before.
    """
    os.replace(source, target)
    with contextlib.suppress(OSError):  # some file systems do not sync directories
        sync(target.absolute().parent)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it, on failure remove it.

    The temporary name is ``.<name>.part``: the same for every run, so what a killed run left is overwritten
    by the next instead of piling up.  It is locked: MobeError if another process or thread is at it, see :func:`held`; and
    if ``path`` is no regular file, see :func:`destination`, which also says what becomes of a symbolic link.
    ``shared``: another process, on this machine or another, may write the same file at the same time; then the name is
    this process's own.  It is, too, on a file system without locks.
    """
    final = destination(path)
    own = final.with_name(f".{final.name}.{socket.gethostname()}-{os.getpid()}.part")
    fixed = final.with_name(f".{final.name}.part")
    try:
        with contextlib.ExitStack() as stack:
            part = own
            if not shared:
                if stack.enter_context(held(fixed, Path(path))):
                    part = fixed
                    os.truncate(part, 0)  # of a killed run: the place that it takes is needed
                else:
                    fixed.unlink(missing_ok=True)
            yield part
            sync(part)
            rename(part, final)
    except BaseException:  # whenever it comes: also before the name of what was just created is known here
        with contextlib.suppress(OSError):
            own.unlink()
        if not shared:
            _remove_if_free(fixed)
        raise


def _remove_if_free(part: Path) -> None:
    """Remove a temporary file that nobody holds: another run may have taken it over, or hold it since before."""
    with contextlib.suppress(OSError, Busy):
        if part.exists():
            with locked(part, 0):
                part.unlink()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
