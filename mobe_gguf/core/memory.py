"""How much memory there is."""

from __future__ import annotations

import os
from pathlib import Path


def free_memory() -> int:
    """Bytes that can be had without swapping (Linux), else all there are."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
