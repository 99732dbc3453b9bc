"""Run llama-bench on several files in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mobe_gguf import runtime
from mobe_gguf.evaluate import tool


@dataclass
class Speeds:
    """Tokens per second, one number a round."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half of the distance from the slowest to the fastest round, as a share of the median."""
        return (max(self.values) - min(self.values)) / 2 / self.median

    def __str__(self) -> str:
        return f"{self.median:.2f} ±{self.spread:.0%}"


@dataclass(frozen=True)
class Contender:
    """A file with options of its own for llama-bench; ``program`` is None for the installed one."""

    label: str
    file: Path
    options: tuple[str, ...] = ()
    program: Path | None = None


def run(contender: Contender, batch: int, tokens: int, options: Sequence[str] = ()) -> float:
    """Tokens per second: ``tokens`` of a prompt in batches of ``batch``, or generated one by one if that is 1."""
    what = (
        ("-p", "0", "-n", str(tokens))
        if batch == 1
        else ("-n", "0", "-p", str(tokens), "-b", str(batch), "-ub", str(batch))
    )
    arguments = ("-m", str(contender.file), *what, "-r", "1", "-o", "json", *options, *contender.options)
    if contender.program is None:
        out = tool.run("llama-bench", *arguments).stdout
    else:
        command = [str(contender.program), *arguments]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(out)[0]["avg_ts"])


def compare(
    contenders: Sequence[Contender], batch: int, tokens: int, rounds: int, options: Sequence[str] = ()
) -> dict[str, Speeds]:
    """Speeds by label; every round takes each contender once, in an order that turns."""
    speeds = {contender.label: Speeds() for contender in contenders}
    for turn in range(rounds):
        shift = turn % len(contenders)
        for contender in (*contenders[shift:], *contenders[:shift]):
            speeds[contender.label].values.append(run(contender, batch, tokens, options))
    return speeds


def threads_of(machine: int, wanted: str) -> list[int]:
    """``1,all`` as numbers, without repeats."""
    return sorted({machine if word == "all" else int(word) for word in wanted.split(",")})


def require_runtime() -> None:
    """MobeError now rather than after the files were written."""
    runtime.tool("llama-bench")
