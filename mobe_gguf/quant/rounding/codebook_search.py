"""The entry of a grid, with signs, of least error in a metric: the inner step of rounding to codebook types.

Eight columns of a row at a time, for many rows at once (E experts with R rows each, each expert with its own metric): minimise

    f(q) = q H q^T - 2 q b^T,      q = s * sign * entry  (or s * (entry +- 1/8))

over entries and signs.  H ``[E, 8, 8]`` is the metric, b ``[E, R, 8]`` the linear term, s ``[E, R]`` the scale.
:func:`choose` is exact over entries for a few patterns of signs, and exact for types without signs.  :func:`exhaustive` tries
everything; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from mobe_gguf.quant.rounding.codebook_blocks import CODEBOOKS, SHIFT, Codebook, grid

#: Columns whose signs or entries are stored together in every type.
UNIT = 8
#: Maximum number of sign flips after the entries are chosen.
FLIPS = 2
#: Rows whose products with the grid are computed at a time, few enough for the cache.
CHUNK = 512


@dataclass(frozen=True)
class Table:
    """A grid, prepared for matrix products.

    ``entries`` ``[n, width]``, scaled as stored.  ``products`` ``[width + width (width + 1) / 2, n]``: each entry, then the
    pairwise products of its values, doubled for two different ones (``first`` and ``second`` say which).  ``columns``
    ``[width, n]``.
    """

    book: Codebook
    entries: torch.Tensor
    products: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    columns: torch.Tensor


@cache
def table(type_name: str, device: torch.device | str = "cpu") -> Table:
    book = CODEBOOKS[type_name]
    entries = torch.from_numpy(np.array(grid(type_name)))
    first, second = torch.triu_indices(book.width, book.width)
    pairs = entries[:, first] * entries[:, second] * torch.where(first == second, 1.0, 2.0)
    return Table(
        book,
        entries.to(device),
        torch.cat([entries, pairs], 1).T.contiguous().to(device),
        first.to(device),
        second.to(device),
        entries.T.contiguous().to(device),
    )


@dataclass
class Pick:
    """Codes of eight columns: ``index`` int64 ``[E, R, 8 / width]``, ``sign`` ``[E, R, 8]`` (1 or -1; where signs shift the entries
    all eight are the same), ``unit`` ``[E, R, 8]``: what they stand for, unscaled."""

    index: torch.Tensor
    sign: torch.Tensor
    unit: torch.Tensor


def objective(h: torch.Tensor, b: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``q H q^T - 2 q b^T`` ``[E, R]``."""
    return ((q @ h - 2 * b) * q).sum(-1)


def choose(
    t: Table,
    h: torch.Tensor,
    inverse: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    now: Pick,
    flips: int = FLIPS,
) -> Pick:
    """The best codes found, never worse than ``now``.  ``inverse``: of H.

    With signs: the best entries for the signs of the unconstrained optimum and for those of ``now``, then up to ``flips`` times the
    best flip of one sign, or of two where their number must stay even.
    """
    if t.book.signs == "shift":
        both = [_shifted(t, h, b, s, sign) for sign in (-1.0, 1.0)]
        return _better(h, b, s, *both)
    target = torch.bmm(b, inverse)
    sign = _wanted_signs(t.book, h, target, s)
    free = (target / torch.where(s == 0, 1.0, s)[..., None] * sign).clamp_min(0) * sign
    found = _better(h, b, s, now, _signed(t, h, b, s, sign, Pick(now.index, sign, free)))
    found = _better(h, b, s, found, _signed(t, h, b, s, now.sign, now))
    for _ in range(flips):
        found = _flipped(t.book, h, b, s, found)
    return found


def choose_shifted(t: Table, h: torch.Tensor, b: torch.Tensor, s: torch.Tensor, sign: torch.Tensor) -> Pick:
    """The best entries where each row's shift ``sign`` ``[E, R]`` is settled."""
    q = (t.entries @ h) * t.entries.unsqueeze(0)
    q = q.sum(-1)  # [E, n]: e H e
    moved = SHIFT * (h.sum(-1) @ t.entries.T)  # e H 1/8
    s2 = s.square()[..., None]
    left = torch.cat([s2, 2 * s2 * sign[..., None], -2 * s[..., None] * b], -1)
    right = torch.cat([q[:, None], moved[:, None], t.entries.T.expand(len(h), -1, -1)], 1)
    index = torch.bmm(left, right).argmin(-1)
    sign = sign[..., None].expand(*sign.shape, UNIT)
    return Pick(index[..., None], sign, F.embedding(index, t.entries) + SHIFT * sign)


def _shifted(t: Table, h: torch.Tensor, b: torch.Tensor, s: torch.Tensor, sign: float) -> Pick:
    return choose_shifted(t, h, b, s, torch.full_like(s, sign))


def _better(h: torch.Tensor, b: torch.Tensor, s: torch.Tensor, one: Pick, other: Pick) -> Pick:
    """For each row the one with the smaller objective; ``one`` if they are equal."""
    scale = s[..., None]
    take = (objective(h, b, scale * other.unit) < objective(h, b, scale * one.unit))[..., None]
    return Pick(
        torch.where(take, other.index, one.index),
        torch.where(take, other.sign, one.sign),
        torch.where(take, other.unit, one.unit),
    )


def _wanted_signs(book: Codebook, h: torch.Tensor, target: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Signs of the target ``[E, R, 8]``; where the number of negative ones must be even, the cheapest sign is flipped if needed."""
    signed = target * s[..., None]
    sign = torch.where(signed < 0, -1.0, 1.0)
    if book.signs == "even":
        odd = sign.prod(-1, keepdim=True) < 0
        cost = target.abs() * h.diagonal(dim1=1, dim2=2).sqrt()[:, None]
        weakest = torch.zeros_like(sign).scatter_(-1, cost.argmin(-1, keepdim=True), 1.0)
        sign = torch.where(odd & (weakest > 0), -sign, sign)
    return sign


def _signed(
    t: Table, h: torch.Tensor, b: torch.Tensor, s: torch.Tensor, sign: torch.Tensor, now: Pick
) -> Pick:
    """The best entries for given signs: in grids of eight exactly; in grids of four each half in turn, given the other, which is
    ``now``'s at first."""
    width = t.book.width
    if width == UNIT:
        index = _best_entries(t, h, b, s, sign)
        return Pick(index[..., None], sign, F.embedding(index, t.entries) * sign)
    unit = now.unit.clone()
    index = now.index.clone()
    for half in (0, 1, 0):
        mine, other = slice(half * width, (half + 1) * width), slice((1 - half) * width, (2 - half) * width)
        pull = b[..., mine] - (s[..., None] * unit[..., other]) @ h[:, other, mine]
        index[..., half] = _best_entries(t, h[:, mine, mine], pull, s, sign[..., mine])
        unit[..., mine] = F.embedding(index[..., half], t.entries) * sign[..., mine]
    return Pick(index, sign, unit)


def _best_entries(
    t: Table, h: torch.Tensor, b: torch.Tensor, s: torch.Tensor, sign: torch.Tensor
) -> torch.Tensor:
    """Number of the entry of least objective for given signs, int64 ``[E, R]``: one product of matrices for all entries.

    The objective is linear in an entry's values and their products two by two.
    """
    pairs = sign.index_select(-1, t.first) * sign.index_select(-1, t.second)
    metric = h.flatten(1).index_select(-1, t.first * h.shape[-1] + t.second)
    row = torch.cat([(-2 * sign) * b, pairs * (metric[:, None] * s[..., None])], -1)
    row = (row * torch.where(s < 0, -1.0, 1.0)[..., None]).flatten(0, 1)  # divided by |s|
    index = torch.empty(len(row), dtype=torch.int64, device=row.device)
    for first in range(0, len(row), CHUNK):
        torch.argmin(row[first : first + CHUNK] @ t.products, -1, out=index[first : first + CHUNK])
    return index.view(s.shape)


def _flipped(book: Codebook, h: torch.Tensor, b: torch.Tensor, s: torch.Tensor, now: Pick) -> Pick:
    q = s[..., None] * now.unit
    cost = 4 * q * (b - q @ h + q * h.diagonal(dim1=1, dim2=2)[:, None])
    if book.signs == "free":
        least, place = cost.min(-1, keepdim=True)
        turn = torch.zeros_like(q).scatter_(-1, place, 1.0)
    else:
        i, j = torch.triu_indices(UNIT, UNIT, 1, device=q.device)
        pair = cost[..., i] + cost[..., j] + 8 * q[..., i] * q[..., j] * h[:, None, i, j]
        least, place = pair.min(-1, keepdim=True)
        turn = torch.zeros_like(q).scatter_(-1, i[place], 1.0).scatter_(-1, j[place], 1.0)
    factor = torch.where((least < 0) & (turn > 0), -1.0, 1.0)
    return Pick(now.index, now.sign * factor, now.unit * factor)


def exhaustive(type_name: str, h: torch.Tensor, b: torch.Tensor, s: float) -> float:
    """Least objective of all codes for eight columns of one row: H ``[8, 8]``, b ``[8]``.  Slow: the reference of the others."""
    book = CODEBOOKS[type_name]
    entries = torch.from_numpy(np.array(grid(type_name))).double()
    h, b = h.double(), b.double()
    if book.signs == "shift":
        patterns = torch.tensor([[-1.0], [1.0]]).double().expand(2, UNIT)
    else:
        negative = torch.arange(1 << UNIT)[:, None] >> torch.arange(UNIT) & 1
        if book.signs == "even":
            negative = negative[negative.sum(1) % 2 == 0]
        patterns = 1 - 2 * negative.double()
    best = float("inf")
    for sign in patterns:
        if book.width == UNIT:
            q = s * (entries + SHIFT * sign if book.signs == "shift" else entries * sign)
            f = objective(h, b, q)
        else:  # every entry of the one half with every entry of the other
            one, other = s * entries * sign[:4], s * entries * sign[4:]
            f = objective(h[:4, :4], b[:4], one)[:, None] + objective(h[4:, 4:], b[4:], other)
            f += 2 * (one @ h[:4, 4:]) @ other.T
        best = min(best, float(f.min()))
    return best
