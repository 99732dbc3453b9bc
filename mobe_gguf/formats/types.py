"""ggml's tensor types by the number that a GGUF file has for them: the table of the pinned runtime.

It is a table, not a call into the library, because a head can be read before a runtime is built.
``tests/runtime/test_ggml.py`` compares it with the installed ``libggml-base``; ``python docs/parts.py --types`` prints the
rows.  gguf-py's table is outdated: 0.19.0 on PyPI lacks ``q2_0`` and gives ``q8_1`` 40 bytes where the library has 36.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorType:
    """A row of n values takes ``n / block * bytes`` bytes; ``name`` is ggml's in lower case."""

    name: str
    id: int
    block: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per value."""
        return 8 * self.bytes / self.block


_ROWS = (
    TensorType("f32", 0, 1, 4),
    TensorType("f16", 1, 1, 2),
    TensorType("q4_0", 2, 32, 18),
    TensorType("q4_1", 3, 32, 20),
    TensorType("q5_0", 6, 32, 22),
    TensorType("q5_1", 7, 32, 24),
    TensorType("q8_0", 8, 32, 34),
    TensorType("q8_1", 9, 32, 36),
    TensorType("q2_k", 10, 256, 84),
    TensorType("q3_k", 11, 256, 110),
    TensorType("q4_k", 12, 256, 144),
    TensorType("q5_k", 13, 256, 176),
    TensorType("q6_k", 14, 256, 210),
    TensorType("q8_k", 15, 256, 292),
    TensorType("iq2_xxs", 16, 256, 66),
    TensorType("iq2_xs", 17, 256, 74),
    TensorType("iq3_xxs", 18, 256, 98),
    TensorType("iq1_s", 19, 256, 50),
    TensorType("iq4_nl", 20, 32, 18),
    TensorType("iq3_s", 21, 256, 110),
    TensorType("iq2_s", 22, 256, 82),
    TensorType("iq4_xs", 23, 256, 136),
    TensorType("i8", 24, 1, 1),
    TensorType("i16", 25, 1, 2),
    TensorType("i32", 26, 1, 4),
    TensorType("i64", 27, 1, 8),
    TensorType("f64", 28, 1, 8),
    TensorType("iq1_m", 29, 256, 56),
    TensorType("bf16", 30, 1, 2),
    TensorType("tq1_0", 34, 256, 54),
    TensorType("tq2_0", 35, 256, 66),
    TensorType("mxfp4", 39, 32, 17),
    TensorType("nvfp4", 40, 64, 36),
    TensorType("q1_0", 41, 128, 18),
    TensorType("q2_0", 42, 64, 18),
)

#: Number -> type, and name -> type.  The numbers in between belong to types that were removed.
BY_ID = {t.id: t for t in _ROWS}
BY_NAME = {t.name: t for t in _ROWS}
