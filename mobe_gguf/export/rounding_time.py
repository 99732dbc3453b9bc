"""How long rounding by moments will take on this machine, from a trial on some rows of each type and row length.

The rates are kept in the cache folder by processor, number of threads, type and row length, so that a second estimate is
immediate.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mobe_gguf.core.atomic import write_json
from mobe_gguf.core.records import plain, record
from mobe_gguf.export.rounding import ByMoments, MomentsEncoder, matrix
from mobe_gguf.export.source import chunks
from mobe_gguf.export.write import Encoded
from mobe_gguf.quant.rounding.rounder import Rounder
from mobe_gguf.runtime.compile import processor
from mobe_gguf.runtime.source import cache_dir

#: Rows of a trial.
ROWS = 512


@dataclass(frozen=True)
class Rate:
    """Seconds: to prepare a matrix (its moments), and for each of its rows."""

    matrix: float
    row: float


def expected_seconds(encoded: Iterable[Encoded], rounding: ByMoments) -> float:
    """Seconds of rounding for the tensors among ``encoded`` that moments round; without what is solved for again."""
    found = [tensor for tensor in encoded if isinstance(tensor.encoder, MomentsEncoder)]
    path, here = cache_dir() / "rounding.json", f"{processor()} x{torch.get_num_threads()}"
    try:
        known = record(dict[str, Rate], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        known = {}
    total, new = 0.0, False
    for tensor in found:
        *matrices, rows, columns = tensor.tensor.source.shape
        key = f"{here}, {tensor.type}, {columns}"
        if key not in known:
            known[key], new = _trial(tensor, rounding), True
        n = math.prod(matrices)
        total += n * (known[key].matrix + rows * known[key].row)
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, plain(known))
    return total


def _trial(tensor: Encoded, rounding: ByMoments) -> Rate:
    """Round the first rows of ``tensor``."""
    roots, tokens = rounding.moments.find(tensor.tensor.name), rounding.moments.tokens(tensor.tensor.name)
    assert roots is not None, tensor.tensor.name
    rows = next(iter(chunks(tensor.tensor.source, within=tensor.tensor.source.shape[-2])))[1]
    rows = rows.reshape(-1, rows.shape[-1])[:ROWS]
    Rounder(matrix(roots, 0, tokens)).encode(rows[:1], tensor.type)  # loads and compiles what is needed
    began = time.perf_counter()
    rounder = Rounder(matrix(roots, 0, tokens))
    prepared = time.perf_counter()
    rounder.encode(rows, tensor.type)
    return Rate(prepared - began, (time.perf_counter() - prepared) / len(rows))
