"""Types with blocks of 256 whose scales are small integers times a float16: q2_k to q6_k and iq4_xs.

Byte l of a run of 32 holds columns l, l + 32, l + 64, ... of the run's, from its lowest bits on.
"""

from __future__ import annotations

import numpy as np

from mobe_gguf.quant.rounding.forms import Stored, Type, register
from mobe_gguf.quant.rounding.legacy import (
    IQ4,
    blocks,
    halves,
    joined,
    pack_nibbles,
    raw,
    unpack_nibbles,
)


def _range(low: int, high: int) -> np.ndarray:
    return np.arange(low, high, dtype=np.float32)


def _spread(packed: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """Runs of bytes ``[..., runs, 32]`` -> ``[..., runs, shifts, 32]``: the bits of each shift."""
    return packed[..., None, :] >> np.array(shifts, np.uint8)[:, None] & np.uint8(mask)


def _gathered(codes: np.ndarray, shifts: tuple[int, ...]) -> np.ndarray:
    """Undoes :func:`_spread`."""
    out = codes[..., 0, :] << shifts[0]
    for i, shift in enumerate(shifts[1:], 1):
        out = out | codes[..., i, :] << shift
    return out.astype(np.uint8)


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:2], -1)


def _columns(stored: Stored, *shape: int) -> np.ndarray:
    """Codes ``[rows, blocks, *shape]``, uint8."""
    rows = len(stored.codes)
    return np.ascontiguousarray(stored.codes, np.uint8).reshape(rows, -1, *shape)


def _rows(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(len(x), -1)


def _grouped(x: np.ndarray | None, groups: int) -> np.ndarray:
    assert x is not None
    return x.reshape(len(x), -1, groups)


_PAIRS = (0, 2, 4, 6)


class Q2K(Type):
    """scales[16] (scale low, minimum high), qs[64], d, dmin."""

    name, group, block = "q2_k", 16, 256
    points, multipliers, minima = _range(0, 4)[:, None], _range(0, 16), -_range(0, 16)

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 84)
        codes = _spread(b[..., 16:80].reshape(*b.shape[:2], 2, 32), _PAIRS, 3)
        scales = b[..., :16]
        return Stored(
            _rows(codes), halves(b[..., 80:82]), _rows(scales & 15), halves(b[..., 82:]), _rows(scales >> 4)
        )

    def pack(self, stored: Stored) -> np.ndarray:
        scales = _grouped(stored.k, 16) | _grouped(stored.m, 16) << 4
        qs = _gathered(_columns(stored, 2, 4, 32), _PAIRS)
        return joined(scales, _flat(qs), raw(stored.d), raw(stored.dmin))


class Q3K(Type):
    """hmask[32], qs[64], scales[12] (16 of six bits), d."""

    name, group, block = "q3_k", 16, 256
    points, multipliers = _range(-4, 4)[:, None], _range(-32, 32)

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 110)
        low = _spread(b[..., 32:96].reshape(*b.shape[:2], 2, 32), _PAIRS, 3).reshape(*b.shape[:2], 8, 32)
        high = _spread(b[..., :32], tuple(range(8)), 1)
        scales = unpack_nibbles(b[..., 96:104])
        top = _spread(b[..., 104:108], _PAIRS, 3).reshape(*b.shape[:2], 16)
        return Stored(_rows(low | high << 2), halves(b[..., 108:]), _rows(scales | top << 4))

    def pack(self, stored: Stored) -> np.ndarray:
        codes, k = _columns(stored, 8, 32), _grouped(stored.k, 16)
        high = _gathered(codes >> 2, tuple(range(8)))
        low = _gathered((codes & 3).reshape(*codes.shape[:2], 2, 4, 32), _PAIRS)
        top = _gathered((k >> 4).reshape(*k.shape[:2], 4, 4), _PAIRS)
        return joined(high, _flat(low), pack_nibbles(k & 15), top, raw(stored.d))


class Q45K(Type):
    """q4_k and q5_k: d, dmin, scales[12] (8 scales and 8 minima of six bits), with q5_k qh[32], qs[128]."""

    group, block = 32, 256
    multipliers, minima = _range(0, 64), -_range(0, 64)

    def __init__(self, name: str, fifth: bool):
        self.name, self.fifth = name, fifth
        self.points = _range(0, 32 if fifth else 16)[:, None]

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 176 if self.fifth else 144)
        k, m = self._scales(b[..., 4:16])
        codes = _spread(b[..., -128:].reshape(*b.shape[:2], 4, 32), (0, 4), 15).reshape(*b.shape[:2], 8, 32)
        if self.fifth:
            codes = codes | _spread(b[..., 16:48], tuple(range(8)), 1) << 4
        return Stored(_rows(codes), halves(b[..., :2]), _rows(k), halves(b[..., 2:4]), _rows(m))

    def pack(self, stored: Stored) -> np.ndarray:
        codes, k, m = _columns(stored, 8, 32), _grouped(stored.k, 8), _grouped(stored.m, 8)
        first = k[..., :4] | k[..., 4:] >> 4 << 6
        second = m[..., :4] | m[..., 4:] >> 4 << 6
        third = k[..., 4:] & 15 | (m[..., 4:] & 15) << 4
        low = _gathered((codes & 15).reshape(*codes.shape[:2], 4, 2, 32), (0, 4))
        fifth = [_gathered(codes >> 4, tuple(range(8)))] if self.fifth else []
        return joined(raw(stored.d), raw(stored.dmin), first, second, third, *fifth, _flat(low))

    @staticmethod
    def _scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
        k = np.concatenate([first & 63, third & 15 | first >> 6 << 4], -1)
        m = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1)
        return k, m


class Q6K(Type):
    """ql[128], qh[64], scales[16] (int8), d.  ``k`` is the scale plus 128."""

    name, group, block = "q6_k", 16, 256
    points, multipliers = _range(-32, 32)[:, None], _range(-128, 128)

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 210)
        # a run of 128 columns: 64 bytes of nibbles (their low ones first), 32 of pairs
        low = _spread(b[..., :128].reshape(*b.shape[:2], 2, 64), (0, 4), 15).reshape(*b.shape[:2], 2, 4, 32)
        high = _spread(b[..., 128:192].reshape(*b.shape[:2], 2, 32), _PAIRS, 3)
        return Stored(_rows(low | high << 4), halves(b[..., 208:]), _rows(b[..., 192:208] ^ 128))

    def pack(self, stored: Stored) -> np.ndarray:
        codes = _columns(stored, 2, 4, 32)
        low = _gathered((codes & 15).reshape(*codes.shape[:2], 2, 2, 64), (0, 4))
        high = _gathered(codes >> 4, _PAIRS)
        return joined(_flat(low), _flat(high), _grouped(stored.k, 16) ^ 128, raw(stored.d))


class IQ4XS(Type):
    """d, the upper two bits of 8 scales, their lower four, qs[128]."""

    name, group, block = "iq4_xs", 32, 256
    points, multipliers = IQ4[:, None], _range(-32, 32)

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 136)
        low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], -1).reshape(*b.shape[:2], 8)
        high = (b[..., 2:4, None] >> np.array(_PAIRS, np.uint8) & 3).reshape(*b.shape[:2], 8)
        codes = unpack_nibbles(b[..., 8:].reshape(*b.shape[:2], 8, 16))
        return Stored(_rows(codes), halves(b[..., :2]), _rows(low | high << 4))

    def pack(self, stored: Stored) -> np.ndarray:
        k = _grouped(stored.k, 8)
        low = k[..., ::2] & 15 | (k[..., 1::2] & 15) << 4
        top = (k >> 4).reshape(*k.shape[:2], 2, 4)
        high = top[..., 0] | top[..., 1] << 2 | top[..., 2] << 4 | top[..., 3] << 6
        return joined(raw(stored.d), high, low, _flat(pack_nibbles(_columns(stored, 8, 32))))


register(Q2K(), Q3K(), Q45K("q4_k", False), Q45K("q5_k", True), Q6K(), IQ4XS())
