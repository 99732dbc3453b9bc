"""Types with one scale a block: q4_0 to q8_0, iq4_nl, and the two fp4 types, whose scales are of eight bits.

Blocks of 32 columns (nvfp4: 64 with four scales) hold a nibble a column, the first half of the columns in the low ones; q5_0 and
q5_1 have the fifth bits in a word before them.
"""

from __future__ import annotations

import numpy as np

from mobe_gguf.quant.rounding.forms import Stored, Type, register

#: Levels of iq4_nl and iq4_xs.
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
#: Levels of mxfp4 and nvfp4, twice what the four bits (E2M1) say; their scales are halved in turn.
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def blocks(data: np.ndarray, size: int) -> np.ndarray:
    """Rows of blocks of ``size`` bytes: ``[rows, blocks, size]``."""
    return np.ascontiguousarray(data).reshape(len(data), -1, size)


def halves(part: np.ndarray) -> np.ndarray:
    """Two bytes of every block, ``[rows, blocks, 2]``, as float16 ``[rows, blocks]``."""
    return np.ascontiguousarray(part).view(np.float16)[..., 0]


def raw(values: np.ndarray | None) -> np.ndarray:
    """float16 ``[rows, blocks]`` as bytes ``[rows, blocks, 2]``."""
    assert values is not None
    if values.dtype != np.float16:
        raise TypeError(f"scales of a block are float16, got {values.dtype}")
    return np.ascontiguousarray(values)[..., None].view(np.uint8)


def joined(*parts: np.ndarray) -> np.ndarray:
    """Parts ``[rows, blocks, bytes]`` of every block, one after the other: ``[rows, all bytes]``."""
    whole = np.concatenate(parts, -1)
    return whole.reshape(len(whole), -1)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """``[..., b]`` bytes -> ``[..., 2 b]``: the low nibbles, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Undoes :func:`unpack_nibbles`."""
    low, high = np.split(codes.astype(np.uint8), 2, -1)
    return low | high << 4


class Nibbles(Type):
    """d, then maybe an offset, maybe 32 fifth bits, then 16 bytes of nibbles."""

    group = block = 32

    def __init__(self, name: str, levels: np.ndarray, offset: bool = False, fifth: bool = False):
        self.name, self.points, self.offset, self.fifth = (
            name,
            levels.astype(np.float32)[:, None],
            offset,
            fifth,
        )
        self.size = 18 + 2 * offset + 4 * fifth

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, self.size)
        codes = unpack_nibbles(b[..., -16:])
        if self.fifth:
            bits = np.unpackbits(np.ascontiguousarray(b[..., -20:-16]), axis=-1, bitorder="little")
            codes = codes | bits << 4
        dmin = halves(b[..., 2:4]) if self.offset else None
        return Stored(codes.reshape(len(b), -1), halves(b[..., :2]), dmin=dmin)

    def pack(self, stored: Stored) -> np.ndarray:
        codes = blocks(stored.codes, 32)
        parts = [raw(stored.d)]
        if self.offset:
            parts.append(raw(stored.dmin))
        if self.fifth:
            parts.append(np.packbits(codes >> 4 & 1, axis=-1, bitorder="little"))
        return joined(*parts, pack_nibbles(codes & 15))


class Bytes(Type):
    """q8_0: d and a byte a column.  -128 is left out, as the encoder does."""

    name, group, block = "q8_0", 32, 32
    points = np.arange(-127, 128, dtype=np.float32)[:, None]

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 34)
        codes = (b[..., 2:].view(np.int8).astype(np.int16) + 127).astype(np.uint8)
        return Stored(codes.reshape(len(b), -1), halves(b[..., :2]))

    def pack(self, stored: Stored) -> np.ndarray:
        codes = (blocks(stored.codes, 32).astype(np.int16) - 127).astype(np.int8)
        return joined(raw(stored.d), codes.view(np.uint8))


class Fp4(Type):
    """mxfp4 and nvfp4: scales of eight bits out of a table, ``scales`` of them a block, and no d."""

    points = FP4[:, None]

    def __init__(self, name: str, group: int, scales: int, table: np.ndarray):
        self.name, self.group, self.block, self.multipliers = name, group, group * scales, table
        self.n_scales = scales

    def unpack(self, data: np.ndarray) -> Stored:
        half = self.group // 2
        b = blocks(data, self.n_scales * (1 + half))
        packed = b[..., self.n_scales :].reshape(len(b), -1, half)
        k = b[..., : self.n_scales].reshape(len(b), -1)
        return Stored(unpack_nibbles(packed).reshape(len(b), -1), k=k)

    def pack(self, stored: Stored) -> np.ndarray:
        assert stored.k is not None
        packed = pack_nibbles(blocks(stored.codes, self.group))
        rows = len(packed)
        return joined(
            stored.k.reshape(rows, -1, self.n_scales),
            packed.reshape(rows, -1, self.n_scales * self.group // 2),
        )


def _e8m0() -> np.ndarray:
    """Half of 2^(e - 127), e from 0 to 255 (255 is no number in the standard; ggml takes it for 2^127)."""
    return np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def _ue4m3() -> np.ndarray:
    """Half of what four bits of exponent and three of mantissa say; 127 is read as 0, and what is above is negative
    elsewhere, so never written."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    small = np.ldexp(mantissa.astype(np.float64), -9)
    value = np.where(exponent == 0, small, np.ldexp(1 + mantissa / 8, exponent - 7))
    return (value / 2).astype(np.float32)


register(
    Nibbles("q4_0", np.arange(-8, 8)),
    Nibbles("q4_1", np.arange(16), offset=True),
    Nibbles("q5_0", np.arange(-16, 16), fifth=True),
    Nibbles("q5_1", np.arange(32), offset=True, fifth=True),
    Nibbles("iq4_nl", IQ4),
    Bytes(),
    Fp4("mxfp4", 32, 1, _e8m0()),
    Fp4("nvfp4", 16, 4, _ue4m3()),
)
