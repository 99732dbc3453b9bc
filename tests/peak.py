"""The memory that a piece of work takes at its peak, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


def run(script: str, *arguments: object) -> str:
    """What ``script`` prints; it may import this module."""
    # what is freed is given back at once: how much malloc keeps for later differs from run to run
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
        ),
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Yields a list that gets one number at the end: bytes at the peak, less those at the start.

    Only of the process's own pages: those of a file that is mapped are the system's to take back.
    """
    before, peaks, done = _own(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(_own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    taken: list[int] = []
    try:
        yield taken
    finally:
        done.set()
        watcher.join()
    taken.append(max(peaks) - before)


def _own() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
