"""``native/rounding/codebook.c``: codes of one span of columns, as ``codebook.solve_span`` chooses them in torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from mobe_gguf.quant.rounding.codebook_blocks import Codebook
from mobe_gguf.quant.rounding.codebook_search import UNIT, Table
from mobe_gguf.quant.rounding.native import library

#: Rows that are worth a thread.
_ROWS = 32
_SIGNS = {"free": 0, "even": 1, "shift": 2}
_COMMON_SHIFT = 3


def available(like: torch.Tensor) -> bool:
    """Whether the compiled kernel does it: float32 on the CPU, and there is a compiler."""
    return like.device.type == "cpu" and like.dtype == torch.float32 and library() is not None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


# wide: what the C function takes, in its order
def solve_span(
    t: Table,
    factors: torch.Tensor,
    h: torch.Tensor,
    inverse: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    codes: dict[str, torch.Tensor],
    reach: int,
    flips: int,
) -> None:
    """For E experts' R rows, in place: h ``[E, span, span]``; inverse ``[E, span / 8, 8, 8]``; b ``[E, R, span]``; d ``[E, R]``; ``codes``:
    ``level`` int64 ``[E, R]``, ``index`` int64 ``[E, R, span / width]``, ``sign`` and ``unit`` float32 ``[E, R, span]``, of which the last axis
    is contiguous.
    """
    ffi, lib = library() or (None, None)
    assert ffi is not None and lib is not None
    book: Codebook = t.book
    h, inverse, b = h.contiguous(), inverse.contiguous(), b.contiguous()
    experts, rows, span = b.shape
    common = book.signs == "shift" and book.per_sign > UNIT
    shared: dict[str, Any] = {
        "span": span,
        "width": book.width,
        "entries": book.entries,
        "signs": _COMMON_SHIFT if common else _SIGNS[book.signs],
        "levels": book.levels,
        "reach": reach,
        "flips": flips,
        "grid": ffi.cast("float *", t.columns.data_ptr()),
        "factors": ffi.cast("float *", factors.data_ptr()),
    }
    arrays = {"b": b, "d": d, **codes}
    threads = torch.get_num_threads()
    step = max(_ROWS, -(-rows // threads))

    def part(place: tuple[int, int]) -> int:
        e, first = place
        given = dict(
            shared,
            rows=min(step, rows - first),
            h=ffi.cast("float *", h[e].data_ptr()),
            inverse=ffi.cast("float *", inverse[e].data_ptr()),
        )
        for name, x in arrays.items():
            kind = "int64_t *" if x.dtype == torch.int64 else "float *"
            given[name] = ffi.cast(kind, x[e, first:].data_ptr())
            given["ld" + name] = x.stride(1)
        return lib.codebook_span(ffi.new("struct codebook_span *", given))

    parts = [(e, first) for e in range(experts) for first in range(0, rows, step)]
    run = map if threads == 1 or len(parts) == 1 else _pool(threads).map
    if any(list(run(part, parts))):
        raise MemoryError("no memory for the products of a grid")
