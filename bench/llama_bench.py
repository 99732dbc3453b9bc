"""Run llama-bench on several files in turns, so that other load affects all of them alike."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mobe_gguf import runtime
from mobe_gguf.evaluate import tool


@dataclass
class Speeds:
    """Tokens per second, one number for each round."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half of the difference between the fastest and the slowest round, as a share of the median."""
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


def run(
    contender: Contender, batches: Sequence[int], tokens: int, options: Sequence[str] = ()
) -> dict[int, float]:
    """Tokens per second by batch; the file is loaded once.  ``tokens`` of a prompt are computed in batches of each
    size, or generated one by one if ``batches`` is only 1.

    With -embd all tokens of a prompt pass the last layer and the output, as those of parallel slots do.  Otherwise
    llama.cpp computes only the last token there, and one of the few layers would be missing.
    """
    sizes = ",".join(map(str, batches))
    what = (
        ("-p", "0", "-n", str(tokens))
        if tuple(batches) == (1,)
        else ("-n", "0", "-p", str(tokens), "-b", sizes, "-ub", str(max(batches)), "-embd", "1")
    )
    arguments = ("-m", str(contender.file), *what, "-r", "1", "-o", "json", *options, *contender.options)
    if contender.program is None:
        out = tool.run("llama-bench", *arguments).stdout
    else:
        command = [str(contender.program), *arguments]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    speeds = [float(result["avg_ts"]) for result in json.loads(out)]
    return dict(zip(batches, speeds, strict=True))


def compare_each(
    contenders: Sequence[Contender],
    batches: Sequence[int],
    tokens: int,
    rounds: int,
    options: Sequence[str] = (),
) -> dict[int, dict[str, Speeds]]:
    """Speeds by batch and label; every round runs each contender once, in a rotating order."""
    speeds = {batch: {contender.label: Speeds() for contender in contenders} for batch in batches}
    for turn in range(rounds):
        shift = turn % len(contenders)
        for contender in (*contenders[shift:], *contenders[:shift]):
            for batch, found in run(contender, batches, tokens, options).items():
                speeds[batch][contender.label].values.append(found)
    return speeds


def compare(
    contenders: Sequence[Contender], batch: int, tokens: int, rounds: int, options: Sequence[str] = ()
) -> dict[str, Speeds]:
    """:func:`compare_each` for one batch."""
    return compare_each(contenders, (batch,), tokens, rounds, options)[batch]


def grouped(batches: Sequence[int], tokens: Mapping[int, int]) -> list[tuple[list[int], int]]:
    """Groups of ``batches`` that can share a run, with the run's tokens: those of the same number of tokens; batch 1
    runs alone."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for batch in batches:
        groups.setdefault((batch == 1, tokens.get(batch, batch)), []).append(batch)
    return [(group, count) for (_, count), group in groups.items()]


def threads_of(machine: int, wanted: str) -> list[int]:
    """``1,all`` as numbers, without repeats."""
    return sorted({machine if word == "all" else int(word) for word in wanted.split(",")})


def require_runtime() -> None:
    """MobeError if there is no runtime; called before the files are written."""
    runtime.tool("llama-bench")
