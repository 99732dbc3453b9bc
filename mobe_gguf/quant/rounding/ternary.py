"""Types of two bits and fewer without a codebook: q1_0 (signs), tq1_0 and tq2_0 (-1, 0, 1), q2_0 (-1 to 2); one float16 scale a block."""

from __future__ import annotations

import numpy as np

from mobe_gguf.quant.rounding.forms import Stored, Type, register
from mobe_gguf.quant.rounding.legacy import blocks, halves, joined, raw

#: Powers of three, the first digit's first: five digits share a byte.
_POWERS = np.array([81, 27, 9, 3, 1], np.uint16)


class Signs(Type):
    name, group, block = "q1_0", 128, 128
    points = np.array([[-1], [1]], np.float32)

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 18)
        bits = np.unpackbits(np.ascontiguousarray(b[..., 2:]), axis=-1, bitorder="little")
        return Stored(bits.reshape(len(b), -1), halves(b[..., :2]))

    def pack(self, stored: Stored) -> np.ndarray:
        bits = np.packbits(blocks(stored.codes, 128).astype(np.uint8), axis=-1, bitorder="little")
        return joined(raw(stored.d), bits)


class TwoBits(Type):
    """Four neighbours share a byte, the first in its lowest bits."""

    name, group, block = "q2_0", 64, 64
    points = np.array([[-1], [0], [1], [2]], np.float32)

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 18)
        codes = b[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
        return Stored(codes.reshape(len(b), -1), halves(b[..., :2]))

    def pack(self, stored: Stored) -> np.ndarray:
        c = blocks(stored.codes, 64).astype(np.uint8)
        c = c.reshape(*c.shape[:2], 16, 4)
        return joined(raw(stored.d), c[..., 0] | c[..., 1] << 2 | c[..., 2] << 4 | c[..., 3] << 6)


class TernaryTwo(Type):
    """Two bits a digit; byte m of a run of 32 holds columns m, m + 32, m + 64 and m + 96."""

    name, group, block = "tq2_0", 256, 256
    points = np.array([[-1], [0], [1]], np.float32)

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 66)
        packed = b[..., :64].reshape(*b.shape[:2], 2, 1, 32)
        codes = packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
        return Stored(codes.reshape(len(b), -1), halves(b[..., 64:]))

    def pack(self, stored: Stored) -> np.ndarray:
        c = blocks(stored.codes, 256).astype(np.uint8)
        c = c.reshape(*c.shape[:2], 2, 4, 32)
        packed = c[..., 0, :] | c[..., 1, :] << 2 | c[..., 2, :] << 4 | c[..., 3, :] << 6
        return joined(packed.reshape(*packed.shape[:2], 64), raw(stored.d))


class TernaryOne(Type):
    """Five digits a byte, as the fraction they make: ``ceil(256 digits / 243)``.

    Bytes 0 to 31 hold columns m + 32 i, the next 16 columns 160 + m + 16 i, the last four, of four digits, 240 + m + 4 i.
    """

    name, group, block = "tq1_0", 256, 256
    points = TernaryTwo.points

    def unpack(self, data: np.ndarray) -> Stored:
        b = blocks(data, 54)
        runs = (b[..., :32], 5), (b[..., 32:48], 5), (b[..., 48:52], 4)
        parts = [self._digits(packed, n).reshape(*b.shape[:2], -1) for packed, n in runs]
        return Stored(np.concatenate(parts, -1).reshape(len(b), -1), halves(b[..., 52:]))

    def pack(self, stored: Stored) -> np.ndarray:
        c = blocks(stored.codes, 256).astype(np.uint16)
        runs = c[..., :160], c[..., 160:240], c[..., 240:]
        parts = []
        for digits, n in zip(runs, (5, 5, 4), strict=True):
            digits = digits.reshape(*c.shape[:2], n, -1)
            number = (digits * _POWERS[:n, None]).sum(-2)
            parts.append(((number * 256 + 242) // 243).astype(np.uint8))
        return joined(*parts, raw(stored.d))

    @staticmethod
    def _digits(packed: np.ndarray, n: int) -> np.ndarray:
        """``[rows, blocks, bytes]`` -> ``[rows, blocks, n, bytes]``: the leading digit of what is left, n times."""
        left: np.ndarray = packed.astype(np.uint16)
        out = []
        for _ in range(n):
            left = left * 3
            out.append(left >> 8)
            left = left & 255
        return np.stack(out, -2).astype(np.uint8)


register(Signs(), TwoBits(), TernaryOne(), TernaryTwo())
