"""The machine: memory, GPUs, and how fast weights are read.  Speeds are measured once and kept in the cache folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from mobe_gguf.core.atomic import write_json
from mobe_gguf.core.memory import free_memory, usable_cpus
from mobe_gguf.core.reading import VRAM_BANDWIDTH
from mobe_gguf.runtime import speed
from mobe_gguf.runtime.source import cache_dir

#: Share of a type's measured rate that the products of a whole model reach, and those of one with factors, which has more
#: and smaller products.  Plain files of three shapes reached 0.62 to 0.92, one with factors 0.58 (docs/performance.md).
CPU_SHARE, FACTORS_SHARE = 0.78, 0.6
#: Each type is measured this many times, all types in turn; the median counts.
PASSES = 3

#: How ``runtime.speed`` measures; rates measured in another way are not taken from the cache.
WAY = "repacked, wall time"


@dataclass
class Machine:
    """``ram``, ``vram``: bytes.  ``rates``: type -> bytes per second of a matrix times a vector on the CPU.  ``node``:
    seconds per node of the graph.  ``ram_bandwidth``: that of another machine, used instead of the rates measured
    here."""

    ram: int
    vram: int = 0
    vram_bandwidth: float = VRAM_BANDWIDTH
    ram_bandwidth: float | None = None
    rates: dict[str, float] = field(default_factory=dict)
    node: float = 0.0
    gpu: str = ""

    def cpu_rate(self, type_name: str, factorized: bool = False) -> float:
        """Bytes per second at which the CPU processes weights of a type, in a model that may be ``factorized``."""
        share = FACTORS_SHARE if factorized else CPU_SHARE
        return self.ram_bandwidth or share * self.rates[type_name]


def this_machine(types: Iterable[str], cache: Path | None = None) -> Machine:
    """What this process may use.  Speeds of ``types`` are measured if the cache has none for this processor and
    runtime."""
    threads = usable_cpus()
    cache = cache or cache_dir() / "machine.json"
    key = f"{_processor()} x{threads}, {WAY}"
    try:
        known = json.loads(cache.read_text())
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        known = {}
    found = known.get(key)
    entry: dict[str, Any] = found if isinstance(found, dict) else {}
    missing = [name for name in dict.fromkeys(types) if not isinstance(entry.get(name), float)]
    entry |= measured(missing, threads)
    if not isinstance(entry.get("node"), float):
        entry["node"] = speed.node_seconds(threads)
        missing.append("node")
    if missing:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, known | {key: entry})
    devices = speed.devices()
    return Machine(
        ram=free_memory(),
        vram=sum(size for _, size in devices),
        rates={name: entry[name] for name in entry if name != "node"},
        node=entry["node"],
        gpu=", ".join(name for name, _ in devices),
    )


def measured(types: Sequence[str], threads: int, passes: int = PASSES) -> dict[str, float]:
    """The rate of each type in bytes per second: the median of ``passes`` measurements."""
    found = [{name: speed.matrix_rate(name, threads) for name in types} for _ in range(passes)]
    return {name: median(one[name] for one in found) for name in types}


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
