"""Where types run out of float16: the table is what the library does, and who writes or checks files says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mobe_gguf.quant.recipe import BLOCK
from mobe_gguf.quant.small import LEAST, Squares, is_small, small_line
from mobe_gguf.runtime import ggml

#: Their encoders take seconds, and they have no business here: one scale of many levels.
SLOW = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s"}


def error(name: str, deviation: float) -> float:
    x = np.random.default_rng(0).standard_normal((16, 1024), dtype=np.float32) * np.float32(deviation)
    y = ggml.dequantize(ggml.quantize(x, name, threads=1), name, 1024, threads=1)
    return float(np.square(y - x, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum())


@pytest.mark.parametrize("name", sorted({*BLOCK, "nvfp4"} - SLOW - {"f32", "bf16"}))
def test_least(name: str) -> None:
    """A quarter more error at the value of the table, not yet at twice as much; of the others not at 1e-5."""
    usual = error(name, 1.0)
    if name in LEAST:
        assert error(name, LEAST[name]) > 1.2 * usual and error(name, 2 * LEAST[name]) < 1.3 * usual
    else:
        assert error(name, 1e-5) < 1.25 * usual


def test_squares() -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    x[3] = 0
    squares = Squares()
    squares.add(x[:2].bfloat16())
    squares.add(x[2:])
    assert squares.rms == pytest.approx(1e-3, rel=0.1) and Squares().rms == 0
    assert is_small("q6_k", 5e-4) and not is_small("q3_k", 5e-4) and not is_small("q6_k", 0.0)
    line = small_line([("a", "iq4_xs", 4e-4), ("b", "q6_k", 1e-4)])
    assert line.startswith("b and 1 more tensors: values around 1.0e-04 are too small for q6_k")
