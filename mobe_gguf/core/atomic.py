"""Atomic output: a file gets its name only when it is complete, and one process at a time writes it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.locks import Busy, locked

#: Seconds that a writer waits for another writer of the same file.  Small writes take turns; a long one raises an error.
PATIENCE = 5.0

KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


def destination(path: str | os.PathLike[str]) -> Path:
    """The file that is replaced when ``path`` is written: ``path`` itself, or the target of a symbolic link.

    A link stays and its target changes.  For a dangling link the target is created.
    MobeError if there is something other than a regular file (a directory, device, pipe or socket), or links form a circle.
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


def check_output(out: Path, inputs: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """MobeError or UsageError if ``out`` cannot become a file, before any work is done; UsageError if it is one of the
    ``inputs``, or lies in one that is a model's directory and is no GGUF file: it would be replaced."""
    if out.is_dir():
        raise UsageError(f"{out} is a directory; name the file to write, for instance {out / 'model.gguf'}")
    final = destination(out)
    parent = final.absolute().parent
    link = f"{out} links to {final}: " if out.is_symlink() else ""
    if not parent.is_dir():
        raise MobeError(f"{link}{parent}: no such directory. Make it first:\n  mkdir -p {parent}")
    if not os.access(parent, os.W_OK):
        raise MobeError(f"{link}{parent}: no permission to write there; choose another place for {out.name}")

    for path in (Path(given) for given in inputs if given is not None):
        held_by = path.iterdir() if path.is_dir() and out.suffix != ".gguf" else [path]
        if final.exists() and any(file.is_file() and final.samefile(file) for file in held_by):
            what = "the file" if path.is_file() else f"a file of {path}"
            raise UsageError(f"{out} is {what} that is read; it would be replaced. Write to another")


@contextlib.contextmanager
def held(lock: Path, out: Path) -> Iterator[bool]:
    """Hold ``lock`` (see ``locks``) so that no other process or thread writes ``out``.  The holder may rename or remove it.

    On a file system without locks, yields False and holds nothing.  MobeError if another holds it for PATIENCE seconds.
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
    """Rename a complete file or directory durably: the directory that contains it is synced, too.

    An existing file or empty directory is replaced.  The caller must have synced a file's content before.
    """
    os.replace(source, target)
    with contextlib.suppress(OSError):  # some file systems do not sync directories
        sync(target.absolute().parent)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync and rename it, on failure remove it.

    The temporary name is ``.<name>.part``, the same for every run: a run overwrites what a killed one left.
    The file is locked: MobeError if another process or thread is writing it, see :func:`held`.  MobeError also if
    ``path`` is not a regular file, see :func:`destination`, which also handles symbolic links.
    ``shared``: another process, on this machine or another, may write the same file at the same time.  The temporary
    name is then unique to this process.  So it is on a file system without locks.
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
                    os.truncate(part, 0)  # left by a killed run: free its space now
                else:
                    fixed.unlink(missing_ok=True)
            yield part
            sync(part)
            rename(part, final)
    except BaseException:  # at any moment, even before this code knows the name of what it has just created
        with contextlib.suppress(OSError):
            own.unlink()
        if not shared:
            _remove_if_free(fixed)
        raise


def _remove_if_free(part: Path) -> None:
    """Remove a temporary file unless another run holds it."""
    with contextlib.suppress(OSError, Busy):
        if part.exists():
            with locked(part, 0):
                part.unlink()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
