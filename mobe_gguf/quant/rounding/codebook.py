"""Rounding to the codebook types by second moments S of each expert's inputs: minimise ``(w - q) S (w - q)^T`` for each row.

There are E experts with R rows of n columns each.  Initial scales are libggml's, with the diagonal of S as its imatrix.  Then

1. a pass with error feedback (GPTQ, arXiv 2210.17323), one span of columns at a time, from the last: codes of a span are chosen
   in the metric that remains of S when all columns before it adapt, and the error is added to those columns' targets;
2. sweeps of coordinate descent: codes, level and shift of each span given all other columns, then each block's ``d`` by least
   squares, until the error falls by less than ``GAIN``;
3. each row's ``d`` is scaled so that the outputs keep their size, ``q S q^T = w S w^T``.

A span is the smallest run of columns that share a level and signs: 16 or 32.  Time is O(E R n (n + entries)) per sweep, memory
O(E (n^2 + R n)).  Residuals are updated at once within blocks of 256 columns, and once per block for the rest of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from mobe_gguf.quant.rounding import codebook_native as native
from mobe_gguf.quant.rounding import codebook_search as search
from mobe_gguf.quant.rounding.codebook_blocks import BLOCK, SHIFT, Codebook, Codes, codebook, pack, unpack
from mobe_gguf.quant.rounding.codebook_search import UNIT, Pick, Table
from mobe_gguf.runtime import ggml

#: Most sweeps, and the least share of the cost that one must have taken off for another to follow.
SWEEPS = 3
GAIN = 0.01


@dataclass
class State:
    """Codes of E experts' rows, in the form that is computed with.

    ``d`` float32 ``[E, R, n/256]`` (values of float16), ``level`` int64 ``[E, R, n/per_level]``, ``index`` int64 ``[E, R, n/width]``,
    ``sign`` ``[E, R, n]``, ``unit`` ``[E, R, n]``: entries with signs or shift.
    """

    book: Codebook
    d: torch.Tensor
    level: torch.Tensor
    index: torch.Tensor
    sign: torch.Tensor
    unit: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def of(cls, type_name: str, data: np.ndarray, experts: int, n: int, device: torch.device | str) -> State:
        """Rows of all experts, one after the other, as libggml stores them."""
        codes, book = unpack(type_name, data, n), codebook(type_name)

        def shaped(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(array).to(device, dtype).view(experts, -1, array.shape[-1])

        sign = 1 - 2 * shaped(codes.negative, torch.float32).repeat_interleave(book.per_sign, -1)
        index = shaped(codes.index, torch.int64)
        entries = search.table(type_name, device).entries[index].flatten(-2)
        unit = entries + SHIFT * sign if book.signs == "shift" else entries * sign
        d, level = shaped(codes.d, torch.float32), shaped(codes.level, torch.int64)
        return cls(book, d, level, index, sign, unit, torch.from_numpy(book.factors()).to(device))

    def scaled(self) -> torch.Tensor:
        """What is decoded before ``d``: ``[E, R, n]``."""
        return self.unit * self.factors[self.level].repeat_interleave(self.book.per_level, -1)

    def values(self) -> torch.Tensor:
        return self.scaled() * self.d.repeat_interleave(BLOCK, -1)

    def data(self) -> np.ndarray:
        """uint8 ``[E * R, row_bytes(n)]``."""

        def rows(x: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
            return x.flatten(0, 1).to("cpu", dtype).numpy()

        codes = Codes(
            rows(self.d, torch.float16),
            rows(self.level, torch.uint8),
            rows(self.index, torch.int16),
            rows(self.sign[..., :: self.book.per_sign] < 0, torch.bool),
        )
        return pack(self.book.name, codes)


@dataclass
class RoundedCodes:
    """``data`` uint8 ``[E, R, row_bytes(n)]``; ``costs``, errors in the metric summed over rows: of libggml's codes, after the pass with
    feedback, after each sweep, and with the outputs' size kept; ``size``, what the cost of zeros would be."""

    data: np.ndarray
    costs: dict[str, float]
    size: float

    @property
    def errors(self) -> dict[str, float]:
        """The costs, relative to the size."""
        return {name: cost / self.size for name, cost in self.costs.items()}


@torch.no_grad()
def round_matrices(
    w: torch.Tensor,
    s: torch.Tensor,
    type_name: str,
    *,
    factor: torch.Tensor | None = None,
    sweeps: int = SWEEPS,
    reach: int = 1,
    keep_size: bool = True,
    name: str = "array",
) -> RoundedCodes:
    """Codes of ``w`` ``[E, R, n]`` float32 in the metric ``s`` ``[E, n, n]``, positive definite, ``factor`` its :func:`feedback`'s R.

    ``reach``: how many levels up and down are tried for each span.  Raises ``MobeError`` as :func:`ggml.quantize`, which the start is
    of.
    """
    experts, rows, n = w.shape
    factor = torch.linalg.cholesky(s, upper=True) if factor is None else factor
    state = State.of(type_name, _start(w, s, type_name, name), experts, n, w.device)
    sw = torch.bmm(w, s)
    size = (sw * w).sum(-1)
    costs = {"libggml": _cost(state.values(), s, sw, size)}
    before = _copy(state)
    feedback(w, factor, state, reach)
    costs["feedback"] = _cost(state.values(), s, sw, size)
    if costs["feedback"] > costs["libggml"]:
        state = before
    last = min(costs.values())
    for sweep in range(sweeps):
        descend(s, sw, state, reach)
        solve_scales(s, sw, state)
        cost = costs[f"sweep {sweep + 1}"] = _cost(state.values(), s, sw, size)
        if cost > last * (1 - GAIN):
            break
        last = cost
    if keep_size:
        _keep_size(s, size, state)
        costs["size kept"] = _cost(state.values(), s, sw, size)
    return RoundedCodes(state.data().reshape(experts, rows, -1), costs, float(size.double().sum()))


def _start(w: torch.Tensor, s: torch.Tensor, type_name: str, name: str) -> np.ndarray:
    """libggml's bytes with the diagonal as imatrix, all rows one after the other."""
    parts = []
    for matrix, metric in zip(w.cpu(), s.cpu(), strict=True):
        weights = metric.diagonal().clamp_min(1e-6).contiguous().numpy()
        values = matrix.contiguous().numpy()
        parts.append(ggml.quantize(values, type_name, weights, name=name, threads=torch.get_num_threads()))
    return np.concatenate(parts)


def _copy(state: State) -> State:
    changing = {x: getattr(state, x).clone() for x in ("d", "level", "index", "sign", "unit")}
    return replace(state, **changing)


def _cost(q: torch.Tensor, s: torch.Tensor, sw: torch.Tensor, size: torch.Tensor) -> float:
    """``(w - q) S (w - q)^T``, summed over all rows."""
    return float((size + ((torch.bmm(q, s) - 2 * sw) * q).sum(-1)).double().sum())


def _spans(book: Codebook, n: int) -> Iterator[slice]:
    step = max(book.per_level, book.per_sign, UNIT)
    return (slice(first, first + step) for first in range(0, n, step))


def feedback(w: torch.Tensor, factor: torch.Tensor, state: State, reach: int) -> None:
    """The pass with error feedback, in place, from the last columns to the first; ``factor`` ``[E, n, n]`` is R, upper triangular, with
    ``R^T R = S``.  Levels of a span are tried as in the descent, ``d`` stays.
    """
    n = w.shape[-1]
    t = search.table(state.book.name, w.device)
    error = torch.zeros_like(w)
    for begin in reversed(range(0, n, BLOCK)):
        block = slice(begin, begin + BLOCK)
        # what the columns behind the block leave over, in the coordinates of R
        left = torch.bmm(error[..., block.stop :], factor[:, block, block.stop :].mT)
        for span in reversed(list(_spans(state.book, BLOCK))):
            at = slice(begin + span.start, begin + span.stop)
            own = factor[:, at, at]
            pull = torch.bmm(torch.bmm(w[..., at], own.mT) + left[..., span], own)
            solve_span(t, torch.bmm(own.mT, own), pull, state, at, reach)
            error[..., at] = w[..., at] - _values(state, at)
            before = slice(begin, at.start)
            left[..., : span.start] += torch.bmm(error[..., at], factor[:, before, at].mT)


def descend(s: torch.Tensor, sw: torch.Tensor, state: State, reach: int) -> None:
    """One sweep over all spans, in place: each given all other columns."""
    t = search.table(state.book.name, s.device)
    values = state.values()
    residual = sw - torch.bmm(values, s)
    for begin in range(0, s.shape[-1], BLOCK):
        block = slice(begin, begin + BLOCK)
        near, metric = residual[..., block], s[:, block, block]
        for span in _spans(state.book, BLOCK):
            at = slice(begin + span.start, begin + span.stop)
            h, now = metric[:, span, span], values[..., at]
            solve_span(t, h, near[..., span] + torch.bmm(now, h), state, at, reach)
            near.baddbmm_(_values(state, at) - now, metric[:, span], alpha=-1)
        step = state.unit[..., block] * _scale(state, block) - values[..., block]
        residual[..., : block.start].baddbmm_(step, s[:, block, : block.start], alpha=-1)
        residual[..., block.stop :].baddbmm_(step, s[:, block, block.stop :], alpha=-1)


def solve_scales(s: torch.Tensor, sw: torch.Tensor, state: State) -> None:
    """Each block's ``d`` by least squares given the other blocks, rounded to float16, in place."""
    scaled = state.scaled()
    residual = sw - torch.bmm(scaled * state.d.repeat_interleave(BLOCK, -1), s)
    for number in range(state.d.shape[-1]):
        block = slice(number * BLOCK, (number + 1) * BLOCK)
        x, d = scaled[..., block], state.d[..., number]
        curve = (torch.bmm(x, s[:, block, block]) * x).sum(-1)
        pull = (residual[..., block] * x).sum(-1)
        new = torch.where(curve > 0, d + pull / curve.clamp_min(1e-30), d).half().float()
        state.d[..., number] = torch.where(new.isfinite(), new, d)
        residual.baddbmm_((state.d[..., number] - d)[..., None] * x, s[:, block], alpha=-1)


def _keep_size(s: torch.Tensor, size: torch.Tensor, state: State) -> None:
    q = state.values()
    now = (torch.bmm(q, s) * q).sum(-1)
    factor = torch.where(now > 0, (size / now.clamp_min(1e-30)).sqrt(), torch.ones_like(now))
    new = (state.d * factor[..., None]).half().float()
    state.d = torch.where(new.isfinite(), new, state.d)


def _scale(state: State, at: slice) -> torch.Tensor:
    """The scale of each column, ``[E, R, columns]``; ``at`` lies within a block."""
    per = state.book.per_level
    level = state.level[..., at.start // per : -(-at.stop // per)]
    scale = state.factors[level] * state.d[..., at.start // BLOCK, None]
    return scale.repeat_interleave(per, -1)[..., : at.stop - at.start]


def _values(state: State, at: slice) -> torch.Tensor:
    return state.unit[..., at] * _scale(state, at)


def solve_span(t: Table, h: torch.Tensor, b: torch.Tensor, state: State, at: slice, reach: int) -> None:
    """Codes and level of one span, in place: minimise ``q H q^T - 2 q b^T``, q the span's values.

    Every level within ``reach`` of the present one, and the other shift where a span shares one, are tried: its eights one after
    the other, each given the others.  What there is stays unless something is better.
    """
    book, spot = state.book, at.start // state.book.per_level
    d, level = state.d[..., at.start // BLOCK], state.level[..., spot]
    groups = slice(at.start // book.width, at.stop // book.width)
    now = Pick(state.index[..., groups], state.sign[..., at], state.unit[..., at])
    inverse = torch.linalg.inv(torch.stack([h[:, c, c] for c in _eights(at)], 1))
    if native.available(b):
        codes = {"level": level, "index": now.index, "sign": now.sign, "unit": now.unit}
        native.solve_span(t, state.factors, h, inverse, b, d, codes, reach, search.FLIPS)
        return
    best = search.objective(h, b, now.unit * (d * state.factors[level])[..., None])
    chosen, best_level = now, level
    common = now.sign[..., 0] if book.signs == "shift" and book.per_sign > UNIT else None
    tries = [(step, common) for step in range(-reach, reach + 1)]
    if common is not None:
        tries.append((0, -common))
    for step, shift in tries:
        tried = (level + step).clamp(0, book.levels - 1)
        scale = d * state.factors[tried]
        pick = _solve_eights(t, h, inverse, b, scale, now, shift)
        f = search.objective(h, b, pick.unit * scale[..., None])
        take = f < best
        best = torch.where(take, f, best)
        best_level = torch.where(take, tried, best_level)
        chosen = Pick(
            *(
                torch.where(take[..., None], getattr(pick, x), getattr(chosen, x))
                for x in ("index", "sign", "unit")
            )
        )
    state.level[..., spot] = best_level
    state.index[..., groups], state.sign[..., at], state.unit[..., at] = (
        chosen.index,
        chosen.sign,
        chosen.unit,
    )


def _eights(at: slice) -> list[slice]:
    return [slice(c, c + UNIT) for c in range(0, at.stop - at.start, UNIT)]


def _solve_eights(
    t: Table,
    h: torch.Tensor,
    inverse: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    now: Pick,
    shift: torch.Tensor | None,
) -> Pick:
    """The eights of a span at given scales, one after the other."""
    pick = Pick(now.index.clone(), now.sign.clone(), now.unit.clone())
    q = pick.unit * scale[..., None]
    pull = b - torch.bmm(q, h)
    per = UNIT // t.book.width
    for i, c in enumerate(_eights(slice(0, h.shape[-1]))):
        own = h[:, c, c]
        to = pull[..., c] + torch.bmm(q[..., c], own)
        groups = slice(i * per, (i + 1) * per)
        if shift is not None:
            new = search.choose_shifted(t, own, to, scale, shift)
        else:
            old = Pick(pick.index[..., groups], pick.sign[..., c], pick.unit[..., c])
            new = search.choose(t, own, inverse[:, i], to, scale, old)
        value = new.unit * scale[..., None]
        pull -= torch.bmm(value - q[..., c], h[:, c])
        q[..., c] = value
        pick.index[..., groups], pick.sign[..., c], pick.unit[..., c] = new.index, new.sign, new.unit
    return pick
