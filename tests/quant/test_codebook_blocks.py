"""Blocks of codebook types: taken apart, put together, and what libggml makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from mobe_gguf.core.errors import MobeError
from mobe_gguf.quant.rounding.codebook_blocks import CODEBOOKS, codebook, decode, grid, pack, unpack
from mobe_gguf.runtime import ggml

every_type = pytest.mark.parametrize("name", CODEBOOKS)


def encoded(name: str, n: int = 512) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = (0.03 * rng.standard_normal((40, n))).astype(np.float32)
    x[3] = 0
    x[5] *= 1e-4
    x[7, 100] = 4
    return ggml.quantize(x, name, rng.random(n).astype(np.float32) + 0.1)


def arbitrary(name: str) -> np.ndarray:
    """Bytes that no encoder made: every field takes every value.  (A NaN in ``d`` is a NaN everywhere.)"""
    return np.random.default_rng(1).integers(0, 256, (400, 2 * ggml.type_info(name).bytes), dtype=np.uint8)


@every_type
@pytest.mark.parametrize("make", [encoded, arbitrary])
def test_packing_gives_the_same_bytes(name, make):
    data = make(name)
    assert np.array_equal(pack(name, unpack(name, data, 512)), data)


@every_type
@pytest.mark.parametrize("make", [encoded, arbitrary])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_decodes_as_the_library_does(name, make):
    data = make(name)
    assert np.array_equal(
        decode(name, unpack(name, data, 512)), ggml.dequantize(data, name, 512), equal_nan=True
    )


@every_type
def test_grid_has_different_entries(name):
    book, entries = codebook(name), grid(name)
    assert entries.shape == (book.entries, book.width)
    assert len(np.unique(entries, axis=0)) == book.entries
    if book.signs == "shift":
        assert set(np.unique(entries)) == {-1, 0, 1}
    else:
        assert entries.min() > 0


def test_signs_that_the_type_cannot_hold():
    codes = unpack("iq2_xs", encoded("iq2_xs"), 512)
    codes.negative[2, 9] ^= True
    with pytest.raises(MobeError, match="odd number of eight signs"):
        pack("iq2_xs", codes)


def test_codes_out_of_range():
    codes = unpack("iq2_xxs", encoded("iq2_xxs"), 512)
    codes.index[0, 0] = 256
    with pytest.raises(MobeError, match="index has .* values to 256"):
        pack("iq2_xxs", codes)


def test_rows_of_another_size():
    with pytest.raises(MobeError, match="take 148 bytes, got"):
        unpack("iq2_xs", np.zeros((2, 147), np.uint8), 512)


def test_types_without_a_codebook():
    with pytest.raises(MobeError, match="q4_k has no codebook"):
        codebook("q4_k")
