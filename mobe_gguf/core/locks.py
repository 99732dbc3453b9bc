"""The only kind of lock in this project: the kernel's flock, on a file that may be renamed, removed or inherited.

It guards outputs (``atomic``), the cache of ``build`` and the work directory of ``factorize``.  When a process is killed,
the kernel releases its lock, and no lock file stays behind.

The package filelock (3.29 and 4.3) is no replacement:

- it locks a separate file beside each output;
- it does not notice that a file was renamed between opening and locking it;
- it does not expose the descriptor.  A compiler must inherit it, so that the build tree stays locked when the parent is
  killed;
- without flock it creates a marker file, which a killed process leaves behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

#: The errors of flock on a file system without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Busy(Exception):
    """Another process or thread holds the lock."""


@contextlib.contextmanager
def locked(
    path: Path, patience: float | None = 0.0, on_wait: Callable[[], None] | None = None
) -> Iterator[int | None]:
    """Hold the lock on the file ``path``, which is created if missing; yields its descriptor.

    On a file system without locks, yields None and holds nothing.  ``patience``: seconds to wait for another holder; None
    waits without limit.  ``on_wait`` is called once before waiting.  Raises :class:`Busy` when patience ends, OSError if
    the file cannot be opened.
    """
    began = time.monotonic()
    while (fd := _try(path)) is None:
        if patience is not None and time.monotonic() - began > patience:
            raise Busy(str(path))
        if on_wait is not None:
            on_wait()
            on_wait = None
        time.sleep(0.02)
    try:
        yield fd if fd >= 0 else None
    finally:
        if fd >= 0:
            os.close(fd)


def _try(path: Path) -> int | None:
    """A descriptor that holds the lock; None if another holds it, -1 if there are no locks."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    mine = False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the previous holder may have renamed or removed the file after it was opened here: then this lock guards nothing
        mine = os.path.samestat(os.fstat(fd), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        return -1
    finally:
        if not mine:
            os.close(fd)
    return fd if mine else None
