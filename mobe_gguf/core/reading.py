"""The time of a token: a token waits for what it reads from each memory.  One model for ``plan`` and ``--placement``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

#: Bytes per second of a GPU's memory if nothing else is known, and the share of them that a matrix product reaches.
VRAM_BANDWIDTH = 600e9
GPU_SHARE = 0.7


def reading_seconds(
    vram: float, vram_bandwidth: float, ram: Mapping[str, float], rate: Callable[[str], float]
) -> float:
    """Seconds for reading ``vram`` bytes from a GPU's memory and ``ram`` bytes of each type from system memory, at
    ``rate(type)`` bytes per second."""
    seconds = vram / (vram_bandwidth * GPU_SHARE)
    return seconds + sum(n_bytes / rate(kind) for kind, n_bytes in ram.items() if n_bytes)
