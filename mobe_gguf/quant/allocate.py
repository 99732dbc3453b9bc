"""Types for a given size: chooses each tensor's type so that the sum of errors is the least that the size allows.

    chosen = allocate({"blk.0.ffn_up_basis.weight": [Option("q3_k", 1000, 0.2), Option("q4_k", 1300, 0.1)], ...}, budget)

Pure functions; ``export.type_errors`` and ``factorize.job.probing`` measure the errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import format_size, parse_size

#: Types that are tried, where the rows allow them and the importance matrix that some need is given.
LADDER = (
    "iq1_s",
    "iq1_m",
    "iq2_xxs",
    "iq2_xs",
    "iq2_s",
    "q2_k",
    "iq3_xxs",
    "iq3_s",
    "q3_k",
    "iq4_xs",
    "mxfp4",
    "iq4_nl",
    "q4_k",
    "q5_k",
    "q6_k",
    "q8_0",
)

#: Types that are worth their bytes only where codes are chosen by second moments.  Not the ternary ones, which libggml rounds as
#: badly: iq1_s and iq2_xxs are smaller for the error, and CUDA has no product of experts for tq1_0 and tq2_0.
BY_MOMENTS = ("q1_0",)

#: Number of steps into which the bytes between the smallest and the largest choice are divided.
GRAINS = 20_000


@dataclass(frozen=True)
class Target:
    """The wanted size of a file: ``n_bytes`` of the whole file, or ``bits`` per weight of its tensors; the other is None."""

    n_bytes: int | None = None
    bits: float | None = None

    def option(self) -> str:
        """The target as an option of the command line."""
        return (
            f"--target-bpw {self.bits:g}" if self.bits else f"--target-size {format_size(self.n_bytes or 0)}"
        )

    def budget(self, n_params: int, head: int) -> int:
        """Bytes for tensors in a file of ``n_params`` parameters whose header takes ``head`` bytes."""
        return int(self.bits * n_params / 8) if self.bits is not None else (self.n_bytes or 0) - head


def parse_target(size: str | None, bits: float | None) -> Target | None:
    """Read ``--target-size`` (``4.6M``, ``12G``; powers of ten) and ``--target-bpw``; UsageError if both are given or a
    value is invalid."""
    if size is not None and bits is not None:
        raise UsageError("--target-size and --target-bpw both say how large the file is to be; leave one out")
    if bits is not None:
        if not 0 < bits <= 32:
            raise UsageError(f"--target-bpw {bits:g}: expected bits per weight, for instance 3.4")
        return Target(bits=bits)
    return None if size is None else Target(n_bytes=parse_size(size, "--target-size"))


@dataclass(frozen=True)
class Option:
    """A type that a tensor may have, its bytes and its error."""

    type: str
    n_bytes: int
    error: float


class TooSmall(MobeError):
    """No choice fits: at least ``least`` bytes are needed."""

    def __init__(self, budget: int, least: int):
        super().__init__(f"{budget} bytes, but the smallest types take {least}")
        self.least = least


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option for each name: the sum of errors is least, and the sum of bytes is at most ``budget``.

    Dynamic programming over the bytes beyond the smallest options, counted in GRAINS steps and rounded up.  So the result
    never exceeds the budget, and a larger budget never has a larger error.  Ties go to fewer bytes.  Raises TooSmall.
    """
    curves = {name: sorted(found, key=lambda o: (o.n_bytes, o.error)) for name, found in options.items()}
    least = sum(curve[0].n_bytes for curve in curves.values())
    if least > budget:
        raise TooSmall(budget, least)
    spread = sum(curve[-1].n_bytes - curve[0].n_bytes for curve in curves.values())
    grain = max(1, -(-spread // GRAINS))
    room = min((budget - least) // grain, -(-spread // grain) + len(curves))
    best = np.zeros(room + 1)  # least error of the names so far, with at most so many grains
    taken = []
    for curve in curves.values():
        grains = [-(-(o.n_bytes - curve[0].n_bytes) // grain) for o in curve]
        totals = np.full((len(curve), room + 1), np.inf)
        for row, g, option in zip(totals, grains, curve, strict=True):
            if g <= room:
                row[g:] = best[: room + 1 - g] + option.error
        index = totals.argmin(0)
        taken.append((index.astype(np.int8), grains))
        best = totals[index, np.arange(room + 1)]
    chosen, left = {}, room
    for (name, curve), (index, grains) in zip(reversed(curves.items()), reversed(taken), strict=True):
        i = int(index[left])
        chosen[name] = curve[i]
        left -= grains[i]
    return {name: chosen[name] for name in options}
