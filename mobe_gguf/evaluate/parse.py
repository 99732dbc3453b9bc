"""Read the numbers that llama-perplexity prints (tools/perplexity/perplexity.cpp of the pinned llama.cpp)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

NUMBER = r"(-?(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|nan|inf))"

#: One finished chunk of a perplexity run, and of a KL divergence run.
PERPLEXITY_CHUNK = re.compile(r"\[(\d+)\][^,\[\n]*,")
DIVERGENCE_CHUNK = re.compile(r"^ *(\d+) [^\n]*%\n", re.MULTILINE)

#: Percentiles of KL divergence over tokens, by the program's names.
PERCENTILES = (
    "Maximum",
    "99.9%",
    "99.0%",
    "95.0%",
    "90.0%",
    "Median",
    "10.0%",
    "5.0%",
    "1.0%",
    "0.1%",
    "Minimum",
)

#: The first line of the statistics.
BEGIN = "====== Perplexity statistics ======\n"


class ParseError(ValueError):
    """Output that ends early or has an unknown form; the message says what is missing."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """One file against the reference, over all evaluated tokens.

    ``kl``: KL divergence of the file's distribution from the reference's, in nats per token; ``percentiles`` of it by
    PERCENTILES.  ``perplexity``: of the file; ``reference``: perplexity of the reference; ``ratio``: of the two.
    ``delta_p``: root mean square of the change of the next token's probability.  ``top1``: share of tokens for which
    both have the same likeliest token.  The last two are fractions, not percent.
    """

    kl: Estimate
    percentiles: dict[str, float]
    perplexity: Estimate
    reference: Estimate
    ratio: Estimate
    delta_p: Estimate
    top1: Estimate


def divergence(stdout: str) -> Divergence:
    """Statistics of a ``--kl-divergence`` run; ParseError if some are missing."""
    _, begin, text = stdout.partition(BEGIN)
    if not begin:
        raise ParseError("it printed no statistics")

    def estimate(label: str, scale: float = 1.0) -> Estimate | None:
        found = re.search(rf"^{re.escape(label)}\s*:\s*{NUMBER} ± +{NUMBER}(?: %)?\n", text, re.MULTILINE)
        return Estimate(float(found[1]) * scale, float(found[2]) * scale) if found else None

    def percentile(label: str) -> float | None:
        found = re.search(rf"^ *{re.escape(label)} +KLD: +{NUMBER}\n", text, re.MULTILINE)
        return float(found[1]) if found else None

    values = {
        "kl": estimate("Mean    KLD"),
        "perplexity": estimate("Mean PPL(Q)"),
        "reference": estimate("Mean PPL(base)"),
        "ratio": estimate("Mean PPL(Q)/PPL(base)"),
        "delta_p": estimate("RMS Δp", 0.01),
        "top1": estimate("Same top p", 0.01),
    }
    percentiles = {label: percentile(label) for label in PERCENTILES}
    missing = [name for name, value in (*values.items(), *percentiles.items()) if value is None]
    if missing:
        raise ParseError(f"it printed no value of {', '.join(missing)}")
    found = {name: value for name, value in values.items() if value is not None}
    return Divergence(percentiles={k: v for k, v in percentiles.items() if v is not None}, **found)


def perplexity(output: str) -> Estimate | None:
    """``Final estimate`` of a perplexity run (it goes to stderr); None if it is missing."""
    found = re.search(rf"Final estimate: PPL = {NUMBER} \+/- {NUMBER}", output)
    return Estimate(float(found[1]), float(found[2])) if found else None


class Chunks:
    """Counts chunks in output that comes in pieces; calls ``on_chunk`` with the number of each."""

    def __init__(self, pattern: re.Pattern[str], on_chunk: Callable[[int], None]):
        self._pattern = pattern
        self._on_chunk = on_chunk
        self._rest = ""
        self.last = 0

    def feed(self, piece: str) -> None:
        self._rest += piece
        end = 0
        for match in self._pattern.finditer(self._rest):
            end = match.end()
            self.last = int(match[1])
            self._on_chunk(self.last)
        self._rest = self._rest[end:]
