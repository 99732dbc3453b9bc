"""The cache of formed matrices: speed of one layer's experts, token by token, by budget and number of mixing terms.

    python bench/cache.py [--shape qwen3-30b] [--quant q4_k] [--terms 0,4] [--budgets 0,0.125,0.25,0.5] [--threads 2]

ggml computes the layer as in the model's graph (gate and up through the operator, products with A, down), on random
weights. Which experts a token uses comes from a trace with the locality measured on large models: a least-recently-used
cache of 1/8 of the experts serves 2/3 of the lookups, one of 1/4 serves 80 %.

Milliseconds are means over the trace's tokens, medians of --rounds in turns.  Beside each time stand what the misses
and hits move and multiply, the limit that follows from the machine's peaks (see peaks.py; the mean of the tokens'
limits), and the share reached.  The last two columns are computed, not run: the ratio of the uncompressed layer's limit
to this one's, with 8 and 16 such cores and memory of 80 GB/s.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peaks
import synthetic
from llama_bench import Speeds
from rich.console import Console
from rich.table import Table

from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.core.progress import console
from mobe_gguf.runtime import ggml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "native"))
import ggml_graph
from ggml_graph import F32, I8, I32

ffi = ggml_graph.ffi

#: Position of a lookup's expert in the list of experts, last used first: (share of the list, share of lookups found
#: within it).
LOCALITY = ((1 / 8, 2 / 3), (1 / 4, 0.8), (1.0, 1.0))


def trace(n: int, k: int, tokens: int, seed: int = 0) -> np.ndarray:
    """``[tokens, k]``: k different experts for each token, drawn by :data:`LOCALITY`."""
    rng = np.random.default_rng(seed)
    stack = list(rng.permutation(n))
    edges = [0, *(round(share * n) for share, _ in LOCALITY)]
    chances = np.diff([0.0, *(upto for _, upto in LOCALITY)])
    out = np.empty((tokens, k), np.int32)
    for t in range(tokens):
        chosen: list[int] = []
        while len(chosen) < k:
            part = rng.choice(len(chances), p=chances)
            # only from the part that was drawn, so that each part has its share of the lookups
            left = [expert for expert in stack[edges[part] : edges[part + 1]] if expert not in chosen]
            if left:
                chosen.append(left[rng.integers(len(left))])
        for expert in chosen:
            stack.remove(expert)
        stack[:0] = chosen[::-1]
        out[t] = chosen
    return out


class Layer:
    """One layer's experts as a ggml graph, computed for one token at a time."""

    def __init__(self, shape: synthetic.Shape, quant: str, slots: int | None, threads: int):
        """``slots``: matrices kept of each projection; None for the uncompressed layer, 0 for no cache."""
        self.lib = ggml_graph.library()
        self.threads = threads
        lib, s = self.lib, shape
        self.ctx = lib.ggml_init(
            [64 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead(), ffi.NULL, True]
        )
        self.fill: list[tuple] = []
        self.caches: list = []
        x = lib.ggml_new_tensor_3d(self.ctx, F32, s.d, 1, 1)
        ids = lib.ggml_new_tensor_2d(self.ctx, I32, s.k, 1)
        self.x, self.ids = x, ids
        gate, up = (self.project(s, quant, slots, x, ids) for _ in range(2))
        h = lib.ggml_mul(self.ctx, lib.ggml_silu(self.ctx, gate), up)
        down = self.matrix(quant, s.p, s.d, s.n)
        self.out = lib.ggml_mul_mat_id(self.ctx, down, h, ids)
        self.graph = lib.ggml_new_graph(self.ctx)
        lib.ggml_build_forward_expand(self.graph, self.out)
        self.backend = ggml_graph.cpu_backend(threads)
        self.buffer = lib.ggml_backend_alloc_ctx_tensors(self.ctx, self.backend)
        lib.ggml_backend_buffer_clear(self.buffer, 0)
        for tensor, data, copies in self.fill:
            for i in range(copies):
                lib.ggml_backend_tensor_set(tensor, ffi.from_buffer(data), i * data.nbytes, data.nbytes)

    def project(self, s: synthetic.Shape, quant: str, slots: int | None, x, ids):
        lib = self.lib
        if slots is None:
            return lib.ggml_mul_mat_id(self.ctx, self.matrix(quant, s.d, s.p, s.n), x, ids)
        basis = self.matrix(quant, s.d, s.p, s.m)
        mix = lib.ggml_new_tensor_2d(self.ctx, F32, s.m, s.n)
        rng = np.random.default_rng(1)
        alpha = rng.standard_normal((s.n, s.m), dtype=np.float32)
        if s.terms:
            for row in alpha:
                row[rng.permutation(s.m)[s.terms :]] = 0.0
        self.fill.append((mix, alpha, 1))
        if slots:
            sizes = ffi.new("ggml_mobe_shape *", [s.d, s.p, s.m, s.m, s.n, s.k, 1, 1, False])
            size = lib.ggml_mobe_cache_size(sizes, slots)
            cache = lib.ggml_new_tensor_1d(self.ctx, I8, size)
            self.caches.append(cache)
            z = lib.ggml_mobe_proj_cached(self.ctx, basis, mix, x, ids, 2, cache)
        else:
            z = lib.ggml_mobe_proj(self.ctx, basis, mix, x, ids, 2)
        return lib.ggml_mul_mat_id(self.ctx, self.matrix(quant, s.p, s.p, s.n), z, ids)

    def matrix(self, quant: str, row: int, rows: int, copies: int):
        """A tensor of ``copies`` equal random matrices, with values of size 1 after a product."""
        info = ggml.type_info(synthetic.fitting_type(quant, row))
        tensor = self.lib.ggml_new_tensor_3d(self.ctx, info.id, row, rows, copies)
        values = np.random.default_rng(row + rows).standard_normal((rows, row), dtype=np.float32) / row**0.5
        self.fill.append((tensor, ggml.quantize(values, info.name), copies))
        return tensor

    def run(self, tokens: np.ndarray) -> Iterator[float]:
        """Seconds of each token ``[k]``, beginning with an empty cache."""
        for cache in self.caches:
            empty = np.zeros(self.lib.ggml_nbytes(cache), np.uint8)
            self.lib.ggml_backend_tensor_set(cache, ffi.from_buffer(empty), 0, empty.nbytes)
        rng = np.random.default_rng(2)
        for chosen in tokens:
            x = rng.standard_normal(self.lib.ggml_nbytes(self.x) // 4, dtype=np.float32)
            self.lib.ggml_backend_tensor_set(self.x, ffi.from_buffer(x), 0, x.nbytes)
            self.lib.ggml_backend_tensor_set(self.ids, ffi.from_buffer(chosen), 0, chosen.nbytes)
            begin = time.perf_counter()
            assert self.lib.ggml_backend_graph_compute(self.backend, self.graph) == 0
            yield time.perf_counter() - begin

    def found(self) -> list[tuple[int, int]]:
        """Lookups and hits that each cache counted in the last run (struct mobe_cache_head)."""
        head = np.empty(3, np.uint64)
        counts = []
        for cache in self.caches:
            self.lib.ggml_backend_tensor_get(cache, ffi.from_buffer(head), 0, head.nbytes)
            counts.append((int(head[1]), int(head[2])))
        return counts

    def close(self) -> None:
        self.lib.ggml_backend_buffer_free(self.buffer)
        self.lib.ggml_backend_free(self.backend)
        self.lib.ggml_free(self.ctx)


def missed(tokens: np.ndarray, slots: int) -> Iterator[list[int]]:
    """The experts of each token ``[tokens, k]`` that a cache of ``slots`` lacks; it begins empty, 0 is no cache.

    The rule is that of mobe-cache.c: first, experts in the cache are marked as used.  Then each missed expert takes the
    slot that was unused longest, unless the same token uses it.
    """
    used: dict[int, int] = {}
    clock = 0
    for chosen in tokens:
        before, lacking = clock, []
        for expert in chosen:
            if expert in used:
                used[expert] = clock = clock + 1
            else:
                lacking.append(int(expert))
        for expert in lacking:
            if len(used) >= slots:
                oldest = min(used, key=used.__getitem__, default=None)
                if oldest is None or used[oldest] > before:
                    break
                del used[oldest]
            used[expert] = clock = clock + 1
        yield lacking


def misses(tokens: np.ndarray, slots: int) -> np.ndarray:
    """How many experts each token misses."""
    return np.array([len(lacking) for lacking in missed(tokens, slots)])


def works(s: synthetic.Shape, quant: str, slots: int | None, lacking: np.ndarray) -> list[synthetic.Work]:
    """The work of each token."""
    if slots is None or slots == 0:
        return [s.work(slots == 0, quant)] * len(lacking)
    return [s.cached(quant, int(count)) for count in lacking]


def mean_limit(machine: peaks.Peaks, work: list[synthetic.Work], quant: str) -> float:
    """The limit in seconds per token, mean over ``work``."""
    return statistics.fmean(machine.limit(each, quant) for each in work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=synthetic.SHAPES, default="qwen3-30b")
    parser.add_argument("--quant", default="q4_k")
    parser.add_argument("--terms", default="0,4", help="non-zero coefficients an expert; 0 for all")
    parser.add_argument("--budgets", default="0,0.125,0.25,0.5", help="shares of the experts")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--warm", type=int, default=50, help="tokens before those that are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    base = synthetic.SHAPES[options.shape]
    tokens = trace(base.n, base.k, options.warm + options.tokens)
    machine = peaks.measure(options.threads, rounding=True)
    out = Console(width=130 if not sys.stdout.isatty() else None)
    out.print(str(machine), highlight=False)
    contenders: list[tuple[synthetic.Shape, int | None]] = [(base, None)]
    for terms in options.terms.split(","):
        shape = synthetic.replace(base, terms=int(terms) or None)
        contenders += [(shape, round(float(share) * base.n)) for share in options.budgets.split(",")]
    layers = [Layer(shape, options.quant, slots, options.threads) for shape, slots in contenders]
    times = [Speeds() for _ in layers]
    for turn in range(options.rounds):
        console.print(f"round {turn + 1} of {options.rounds}")
        for layer, time_of in zip(layers, times, strict=True):
            time_of.values.append(1e3 * statistics.fmean(list(layer.run(tokens))[options.warm :]))
    table = Table(
        title=f"one layer of {options.shape}, {options.quant}, one token at a time, {options.threads} threads"
    )
    for column in (
        "terms", "kept", "found", "ms", "of plain", "MB", "M mult-adds", "M of f", "limit, ms", "reached",
        "of plain, 8 cores", "16 cores",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    several = [machine.on(cores, 80e9) for cores in (8, 16)]
    plain = works(base, options.quant, None, tokens)
    for (shape, slots), layer, time_of in zip(contenders, layers, times, strict=True):
        lacking = misses(tokens, slots or 0)
        if any(count != (tokens.size, tokens.size - lacking.sum()) for count in layer.found()):
            raise MobeError(f"the cache of {slots} counted other hits than it should have: {layer.found()}")
        lacking = lacking[options.warm :]
        work = works(shape, options.quant, slots, lacking)
        limit = mean_limit(machine, work, options.quant)
        ratios = [mean_limit(m, plain, options.quant) / mean_limit(m, work, options.quant) for m in several]
        table.add_row(
            "plain" if slots is None else str(shape.terms or shape.m),
            "-" if slots is None else str(slots),
            f"{1 - lacking.sum() / (len(lacking) * base.k):.0%}" if slots else "-",
            str(time_of), f"{times[0].median / time_of.median:.2f}",
            f"{statistics.fmean(w.moved for w in work) / 1e6:.1f}",
            f"{statistics.fmean(w.multiply_adds for w in work) / 1e6:.0f}",
            f"{statistics.fmean(w.evaluate for w in work) / 1e6:.1f}",
            f"{1e3 * limit:.3f}", f"{1e3 * limit / time_of.median:.0%}",
            *(f"{ratio:.2f}" for ratio in ratios),
        )  # fmt: skip
        layer.close()
    out.print(table)


if __name__ == "__main__":
    run_program(main)
