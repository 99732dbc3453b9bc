"""Values that are too small for their type: super-blocks have float16 scales, which become coarse below 6e-5.

A k-quant's scale of a super-block is its largest scale divided by 31, 63 or 127, so that of values around 1e-3 it is below
float16's normal numbers, in steps of 6e-8.  Types with one scale a block of 32 and more levels come there later, those of
floats never.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Type -> root mean square at which its error on Gaussian rows is a quarter more than on larger ones, as a power of two
#: (``tests/quant/test_small.py`` measures it).  Of nvfp4 as libggml encodes it: without a scale of the tensor.
LEAST = {
    "nvfp4": 2.0**-6,
    "q6_k": 2.0**-10,
    "iq4_xs": 2.0**-11,
    "q8_0": 2.0**-12,
    "q5_k": 2.0**-12,
    "q4_k": 2.0**-14,
    "f16": 2.0**-14,
    "iq3_s": 2.0**-15,
    "iq3_xxs": 2.0**-16,
    "iq4_nl": 2.0**-16,
    "q5_1": 2.0**-16,
}


@dataclass
class Squares:
    """Root mean square of values that come in pieces; rows of zeros (experts that were pruned) do not count."""

    total: float = 0.0
    count: int = 0

    def add(self, rows: torch.Tensor) -> None:
        """``rows`` ``[..., n]`` of any float type."""
        squares = rows.float().square().sum(-1)
        self.total += float(squares.sum())
        self.count += int((squares > 0).sum()) * rows.shape[-1]

    @property
    def rms(self) -> float:
        return (self.total / self.count) ** 0.5 if self.count else 0.0


def is_small(type_name: str, rms: float) -> bool:
    """Whether values of this size lose more to the type than larger ones do; zeros do not."""
    return 0 < rms <= LEAST.get(type_name, 0.0)


def small_line(found: list[tuple[str, str, float]]) -> str:
    """A warning about tensors, given as (name, type, root mean square), in one line."""
    name, type_name, rms = min(found, key=lambda one: one[2] / LEAST[one[1]])
    others = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
    return (
        f"{name}{others}: values around {rms:.1e} are too small for {type_name}, whose scales are float16: its error is larger "
        "than on others. Give it a type with a scale a block (--tensor-type: q5_1, iq4_nl, q4_0), or bf16"
    )
