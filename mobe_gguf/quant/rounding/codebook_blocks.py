"""Blocks of the codebook types (iq1_s to iq3_s): unpack them into codes and pack them again.

A block of 256 columns is one float16 scale ``d``, a level for each run of ``per_level`` columns, and for each group of
``width`` columns the number of an entry of the type's grid.  Types of two and three bits give each column a sign besides;
iq1_s and iq1_m move all entries of ``per_sign`` columns up or down by an eighth instead:

    w = d * factor(level) * sign * entry            iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s
    w = d * factor(level) * (entry + sign / 8)      iq1_s, iq1_m

iq2_xxs, iq2_xs and iq3_xxs store seven of eight signs; the eighth makes the number of negative ones even.  The grids are read
from the installed library by decoding blocks made for this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from mobe_gguf.core.errors import MobeError
from mobe_gguf.runtime import ggml

#: Columns of a block.
BLOCK = 256
#: iq1_s and iq1_m add this to the entries of a group or subtract it.
SHIFT = 0.125


@dataclass(frozen=True)
class Codebook:
    """What a type stores.  ``signs``: ``free``, ``even`` (an even number of eight is negative) or ``shift``."""

    name: str
    width: int
    entries: int
    per_level: int
    levels: int
    per_sign: int
    signs: str
    first: float
    step: float

    def factors(self) -> np.ndarray:
        """What ``d`` is multiplied by at each level, float32 ``[levels]``."""
        return (self.first + self.step * np.arange(self.levels)).astype(np.float32)


#: ``ggml-common.h`` and ``ggml-quants.c`` (dequantize_row_*) of the pinned tree; a test compares them with the library.
CODEBOOKS = {
    book.name: book
    for book in (
        Codebook("iq1_s", 8, 2048, 32, 8, 32, "shift", 1.0, 2.0),
        Codebook("iq1_m", 8, 2048, 16, 8, 8, "shift", 1.0, 2.0),
        Codebook("iq2_xxs", 8, 256, 32, 16, 1, "even", 0.125, 0.25),
        Codebook("iq2_xs", 8, 512, 16, 16, 1, "even", 0.125, 0.25),
        Codebook("iq2_s", 8, 1024, 16, 16, 1, "free", 0.125, 0.25),
        Codebook("iq3_xxs", 4, 256, 32, 16, 1, "even", 0.25, 0.5),
        Codebook("iq3_s", 4, 512, 32, 16, 1, "free", 1.0, 2.0),
    )
}


@dataclass
class Codes:
    """Rows of n columns, taken apart.

    ``d`` float16 ``[rows, n/256]``; ``level`` uint8 ``[rows, n/per_level]``; ``index`` int16 ``[rows, n/width]``; ``negative``
    bool ``[rows, n/per_sign]``.
    """

    d: np.ndarray
    level: np.ndarray
    index: np.ndarray
    negative: np.ndarray


def codebook(type_name: str) -> Codebook:
    """The codebook type of this name.  Raises ``MobeError`` for a type that has no codebook."""
    if type_name not in CODEBOOKS:
        raise MobeError(f"type {type_name} has no codebook; expected one of {', '.join(CODEBOOKS)}")
    return CODEBOOKS[type_name]


def unpack(type_name: str, data: np.ndarray, n: int) -> Codes:
    """Codes of rows of ``n`` columns: uint8 ``data`` ``[rows, row_bytes(n)]``.

    Raises ``MobeError`` if the type has no codebook, or rows are of another size.
    """
    book = codebook(type_name)
    info = ggml.type_info(type_name)
    rows = data.shape[0]
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] != info.row_bytes(n):
        raise MobeError(
            f"rows of {n} values of type {type_name} take {info.row_bytes(n)} bytes, got {list(data.shape)} {data.dtype}"
        )
    d, level, index, negative = _FORMS[type_name][0](np.ascontiguousarray(data).reshape(-1, info.bytes))
    if book.signs == "even":
        negative = np.concatenate([negative, negative.sum(-1, keepdims=True) % 2 == 1], -1)
    return Codes(
        d.reshape(rows, -1),
        level.reshape(rows, -1).astype(np.uint8),
        index.reshape(rows, -1).astype(np.int16),
        negative.reshape(rows, -1).astype(bool),
    )


def pack(type_name: str, codes: Codes) -> np.ndarray:
    """The rows as libggml stores them: uint8 ``[rows, row_bytes(n)]``; the inverse of :func:`unpack`.

    Raises ``MobeError`` for codes that the type cannot hold: too large, or an odd number of signs where it is even.
    """
    book = codebook(type_name)
    rows, blocks = codes.d.shape
    n = blocks * BLOCK
    for what, array, per, limit in (
        ("level", codes.level, book.per_level, book.levels),
        ("index", codes.index, book.width, book.entries),
        ("negative", codes.negative, book.per_sign, 2),
    ):
        if array.shape != (rows, n // per) or array.min(initial=0) < 0 or array.max(initial=0) >= limit:
            raise MobeError(
                f"{type_name}: {what} has shape {list(array.shape)} and values to {array.max(initial=0)}, expected "
                f"{[rows, n // per]} and at most {limit - 1}"
            )
    negative: np.ndarray = codes.negative.reshape(rows * blocks, -1).astype(np.uint8)
    if book.signs == "even":
        negative = negative.reshape(rows * blocks, -1, 8)
        if (negative.sum(-1) % 2).any():
            raise MobeError(
                f"{type_name}: an odd number of eight signs is negative, and the type holds even ones"
            )
        negative = negative[..., :7]
    out = _FORMS[type_name][1](
        np.ascontiguousarray(codes.d, np.float16).reshape(-1, 1),
        codes.level.reshape(rows * blocks, -1).astype(np.uint32),
        codes.index.reshape(rows * blocks, -1).astype(np.uint32),
        negative,
    )
    return np.concatenate([_bytes(part) for part in out], -1).reshape(rows, -1)


def decode(type_name: str, codes: Codes) -> np.ndarray:
    """The values of the codes, float32 ``[rows, n]``, exactly as libggml decodes their blocks.

    (All products of a float16, a factor and an entry are exact in float32, so their order does not matter.)
    """
    book = codebook(type_name)
    scale = np.repeat(codes.d.astype(np.float32), BLOCK // book.per_level, -1) * book.factors()[codes.level]
    entries = grid(type_name)[codes.index].reshape(len(scale), -1)
    sign = np.where(codes.negative, np.float32(-1), np.float32(1))
    if book.signs == "shift":
        entries = entries + np.float32(SHIFT) * np.repeat(sign, book.per_sign, -1)
    else:
        entries = entries * sign
    return np.repeat(scale, book.per_level, -1) * entries


@cache
def grid(type_name: str) -> np.ndarray:
    """The type's entries, float32 ``[entries, width]``: sizes where columns have signs, else -1, 0 and 1.

    Decoded by the installed library from a row that holds every entry once, unscaled.
    """
    book = codebook(type_name)
    n = book.entries * book.width
    codes = Codes(
        np.ones((1, n // BLOCK), np.float16),
        np.zeros((1, n // book.per_level), np.uint8),
        np.arange(book.entries, dtype=np.int16)[None],
        np.zeros((1, n // book.per_sign), bool),
    )
    values = ggml.dequantize(pack(type_name, codes), type_name, n, threads=1).reshape(
        book.entries, book.width
    )
    values = values / np.float32(book.first)
    values = values - np.float32(SHIFT) if book.signs == "shift" else values
    values.setflags(write=False)
    return values


def _bytes(array: np.ndarray) -> np.ndarray:
    """Little-endian bytes of ``[blocks, k]``."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)


def _fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """``count`` numbers of ``bits`` bits out of each word, lowest first: ``[blocks, k]`` -> ``[blocks, k, count]``."""
    shifts = (bits * np.arange(count)).astype(np.uint32)
    return (words[..., None].astype(np.uint32) >> shifts) & np.uint32((1 << bits) - 1)


def _words(fields: np.ndarray, bits: int, count: int, dtype: type) -> np.ndarray:
    """The inverse of :func:`_fields`: ``[blocks, k * count]`` -> ``[blocks, k]``."""
    shifts = (bits * np.arange(count)).astype(np.uint32)
    grouped = fields.astype(np.uint32).reshape(len(fields), -1, count)
    return np.bitwise_or.reduce(grouped << shifts, axis=-1).astype(dtype)


def _split(blocks: np.ndarray, *parts: tuple[int, type]) -> list[np.ndarray]:
    """Arrays of the given byte counts and types, in the order of the struct."""
    ends = np.cumsum([size for size, _ in parts])
    return [
        np.ascontiguousarray(blocks[:, end - size : end]).view(dtype)
        for end, (size, dtype) in zip(ends, parts, strict=True)
    ]


def _unpack_with_words(per_word: int, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """iq2_xxs and iq3_xxs: a 32-bit word for each 32 columns holds four times seven signs and the level."""
    if per_word == 4:
        d, rest = _split(blocks, (2, np.float16), (64, np.uint8))
        rest = rest.reshape(-1, 8, 8)
        index, word = (
            rest[..., :4].reshape(-1, 32),
            np.ascontiguousarray(rest[..., 4:]).view(np.uint32)[..., 0],
        )
    else:
        d, index, word = _split(blocks, (2, np.float16), (64, np.uint8), (32, np.uint32))
    return d, word >> 28, index, _fields(_fields(word, 7, 4), 1, 7)


def _pack_with_words(
    per_word: int, d: np.ndarray, level: np.ndarray, index: np.ndarray, negative: np.ndarray
) -> list[np.ndarray]:
    signs = _words(negative.reshape(len(d), -1), 1, 7, np.uint32)
    word = _words(signs, 7, 4, np.uint32) | (level << np.uint32(28))
    index = index.astype(np.uint8)
    if per_word == 8:
        return [d, index, word]
    return [
        d,
        np.concatenate([index.reshape(-1, 8, 4), word.view(np.uint8).reshape(-1, 8, 4)], -1).reshape(
            len(d), -1
        ),
    ]


def _unpack_iq2_xs(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    d, words, levels = _split(blocks, (2, np.float16), (64, np.uint16), (8, np.uint8))
    return d, _fields(levels, 4, 2), words & 511, _fields(words >> 9, 1, 7)


def _pack_iq2_xs(
    d: np.ndarray, level: np.ndarray, index: np.ndarray, negative: np.ndarray
) -> list[np.ndarray]:
    signs = _words(negative.reshape(len(d), -1), 1, 7, np.uint32)
    return [d, (index | signs << np.uint32(9)).astype(np.uint16), _words(level, 4, 2, np.uint8)]


def _unpack_iq2_s(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    d, low, signs, high, levels = _split(
        blocks, (2, np.float16), (32, np.uint8), (32, np.uint8), (8, np.uint8), (8, np.uint8)
    )
    index = low | _fields(high, 2, 4).reshape(len(d), -1) << np.uint32(8)
    return d, _fields(levels, 4, 2), index, _fields(signs, 1, 8)


def _pack_iq2_s(
    d: np.ndarray, level: np.ndarray, index: np.ndarray, negative: np.ndarray
) -> list[np.ndarray]:
    low, high = (index & 255).astype(np.uint8), _words(index >> 8, 2, 4, np.uint8)
    return [d, low, _words(negative, 1, 8, np.uint8), high, _words(level, 4, 2, np.uint8)]


def _unpack_iq3_s(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    d, low, high, signs, levels = _split(
        blocks, (2, np.float16), (64, np.uint8), (8, np.uint8), (32, np.uint8), (4, np.uint8)
    )
    index = low | _fields(high, 1, 8).reshape(len(d), -1) << np.uint32(8)
    return d, _fields(levels, 4, 2), index, _fields(signs, 1, 8)


def _pack_iq3_s(
    d: np.ndarray, level: np.ndarray, index: np.ndarray, negative: np.ndarray
) -> list[np.ndarray]:
    low, high = (index & 255).astype(np.uint8), _words(index >> 8, 1, 8, np.uint8)
    return [d, low, high, _words(negative, 1, 8, np.uint8), _words(level, 4, 2, np.uint8)]


def _unpack_iq1_s(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    d, low, high = _split(blocks, (2, np.float16), (32, np.uint8), (16, np.uint16))
    index = low | _fields(high, 3, 4).reshape(len(d), -1) << np.uint32(8)
    return d, (high >> 12) & 7, index, high >> 15


def _pack_iq1_s(
    d: np.ndarray, level: np.ndarray, index: np.ndarray, negative: np.ndarray
) -> list[np.ndarray]:
    high = (
        _words(index >> 8, 3, 4, np.uint32)
        | level << np.uint32(12)
        | negative.astype(np.uint32) << np.uint32(15)
    )
    return [d, (index & 255).astype(np.uint8), high.astype(np.uint16)]


def _unpack_iq1_m(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    low, high, words = _split(blocks, (32, np.uint8), (16, np.uint8), (8, np.uint16))
    d = _words(words >> 12, 4, 4, np.uint16).view(np.float16)  # four bits at the top of each word
    high = _fields(high, 4, 2).reshape(len(d), -1)
    return d, _fields(words, 3, 4), low | (high & 7) << np.uint32(8), high >> 3


def _pack_iq1_m(
    d: np.ndarray, level: np.ndarray, index: np.ndarray, negative: np.ndarray
) -> list[np.ndarray]:
    high = _words(index >> 8 | negative.astype(np.uint32) << np.uint32(3), 4, 2, np.uint8)
    words = _words(level, 3, 4, np.uint32) | _fields(d.view(np.uint16)[:, 0], 4, 4) << np.uint32(12)
    return [(index & 255).astype(np.uint8), high, words.astype(np.uint16)]


_Form = tuple[Callable[..., tuple[np.ndarray, ...]], Callable[..., list[np.ndarray]]]
_FORMS: dict[str, _Form] = {
    "iq1_s": (_unpack_iq1_s, _pack_iq1_s),
    "iq1_m": (_unpack_iq1_m, _pack_iq1_m),
    "iq2_xxs": (lambda b: _unpack_with_words(4, b), lambda *c: _pack_with_words(4, *c)),
    "iq2_xs": (_unpack_iq2_xs, _pack_iq2_xs),
    "iq2_s": (_unpack_iq2_s, _pack_iq2_s),
    "iq3_xxs": (lambda b: _unpack_with_words(8, b), lambda *c: _pack_with_words(8, *c)),
    "iq3_s": (_unpack_iq3_s, _pack_iq3_s),
}
