"""Values that are too small for their type: super-blocks have float16 scales, which become coarse below 6e-5.

In a k-quant, a super-block's scale is its largest block scale divided by 31, 63 or 127.  For values around 1e-3 it is below
float16's normal range, where steps are 6e-8.  Types with one scale for each block of 32 and more levels reach this at
smaller values, floating-point types never.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Type -> root mean square, a power of two, at which its error on Gaussian rows is a quarter more than on larger ones
#: (``tests/quant/test_small.py`` measures it).  nvfp4 is as libggml encodes it: without a tensor scale.
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
    """Root mean square of values that arrive in pieces; rows of zeros (pruned experts) do not count."""

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
    """Whether the type's relative error is larger for values of this size than for larger ones; False for zeros."""
    return 0 < rms <= LEAST.get(type_name, 0.0)


def small_line(found: list[tuple[str, str, float]]) -> str:
    """A one-line warning about tensors, given as (name, type, root mean square)."""
    name, type_name, rms = min(found, key=lambda one: one[2] / LEAST[one[1]])
    others = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
    return (
        f"{name}{others}: values around {rms:.1e} are too small for {type_name}, whose scales are float16: its error is larger "
        "than on others. Give it a type with a scale a block (--tensor-type: q5_1, iq4_nl, q4_0), or bf16"
    )
