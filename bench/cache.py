"""The cache of formed matrices: one layer's experts, token by token, against budget and number of mixing terms.

    python bench/cache.py [--shape qwen3-30b] [--quant q4_k] [--terms 0,4] [--budgets 0,0.125,0.25,0.5] [--threads 2]

The layer is computed by ggml as the model's graph has it (gate and up through the operator, products with A, down), on random
weights.  Which experts a token uses comes from a trace with the locality that has been measured of large models: a
least-recently-used cache of 1/8 of the experts serves 2/3 of the lookups, one of 1/4 serves 80 %.  Beside each time: what the
misses and hits read and multiply, and the same of the uncompressed layer in the same run.
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
import synthetic
from rich.console import Console
from rich.table import Table

from mobe_gguf.progress import console
from mobe_gguf.runtime import ggml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "native"))
import ggml_graph
from ggml_graph import CPU, F32, I8, I32

ffi = ggml_graph.ffi

#: Where in the list of experts, last used first, a lookup finds its own: shares of the lookups up to shares of the list.
LOCALITY = ((1 / 8, 2 / 3), (1 / 4, 0.8), (1.0, 1.0))


def trace(n: int, k: int, tokens: int, seed: int = 0) -> np.ndarray:
    """``[tokens, k]`` different experts a token, by the model of :data:`LOCALITY`."""
    rng = np.random.default_rng(seed)
    stack = list(rng.permutation(n))
    edges = [0, *(round(share * n) for share, _ in LOCALITY)]
    chances = np.diff([0.0, *(upto for _, upto in LOCALITY)])
    out = np.empty((tokens, k), np.int32)
    for t in range(tokens):
        chosen: list[int] = []
        while len(chosen) < k:
            part = rng.choice(len(chances), p=chances)
            expert = stack[rng.integers(edges[part], edges[part + 1])]
            if expert not in chosen:
                chosen.append(expert)
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
        x = lib.ggml_new_tensor_3d(self.ctx, F32, s.d, 1, 1)
        ids = lib.ggml_new_tensor_2d(self.ctx, I32, s.k, 1)
        self.x, self.ids = x, ids
        gate, up = (self.project(s, quant, slots, x, ids) for _ in range(2))
        h = lib.ggml_mul(self.ctx, lib.ggml_silu(self.ctx, gate), up)
        down = self.matrix(quant, s.p, s.d, s.n)
        self.out = lib.ggml_mul_mat_id(self.ctx, down, h, ids)
        self.graph = lib.ggml_new_graph(self.ctx)
        lib.ggml_build_forward_expand(self.graph, self.out)
        self.backend = lib.ggml_backend_init_by_type(CPU, ffi.NULL)
        reg = lib.ggml_backend_dev_backend_reg(lib.ggml_backend_dev_by_type(CPU))
        setter = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_set_n_threads")
        ffi.cast("void (*)(void *, int)", setter)(self.backend, threads)
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
            z = lib.ggml_mobe_proj_cached(self.ctx, basis, mix, x, ids, 2, cache)
        else:
            z = lib.ggml_mobe_proj(self.ctx, basis, mix, x, ids, 2)
        return lib.ggml_mul_mat_id(self.ctx, self.matrix(quant, s.p, s.p, s.n), z, ids)

    def matrix(self, quant: str, row: int, rows: int, copies: int):
        """A tensor of ``copies`` equal random matrices, with values of size 1 after a product."""
        info = ggml.type_info(synthetic.fit(quant, row))
        tensor = self.lib.ggml_new_tensor_3d(self.ctx, info.id, row, rows, copies)
        values = np.random.default_rng(row + rows).standard_normal((rows, row), dtype=np.float32) / row**0.5
        self.fill.append((tensor, ggml.quantize(values, info.name), copies))
        return tensor

    def run(self, tokens: np.ndarray) -> Iterator[float]:
        """Seconds of each token ``[k]``."""
        rng = np.random.default_rng(2)
        for chosen in tokens:
            x = rng.standard_normal(self.lib.ggml_nbytes(self.x) // 4, dtype=np.float32)
            self.lib.ggml_backend_tensor_set(self.x, ffi.from_buffer(x), 0, x.nbytes)
            self.lib.ggml_backend_tensor_set(self.ids, ffi.from_buffer(chosen), 0, chosen.nbytes)
            begin = time.perf_counter()
            assert self.lib.ggml_backend_graph_compute(self.backend, self.graph) == 0
            yield time.perf_counter() - begin

    def close(self) -> None:
        self.lib.ggml_backend_buffer_free(self.buffer)
        self.lib.ggml_backend_free(self.backend)
        self.lib.ggml_free(self.ctx)


def hit_rate(tokens: np.ndarray, slots: int, warm: int) -> float:
    """Of a least-recently-used cache, counted from token ``warm`` on."""
    order: list[int] = []
    hits = lookups = 0
    for t, chosen in enumerate(tokens):
        for expert in chosen:
            found = expert in order
            if t >= warm:
                lookups, hits = lookups + 1, hits + found
            if found:
                order.remove(expert)
            order.append(expert)
        del order[: max(0, len(order) - slots)]
    return hits / lookups


def work(s: synthetic.Shape, quant: str, rate: float) -> tuple[float, float]:
    """Megabytes and million multiply-adds a token when ``rate`` of the matrices are found; rate 0 and no cache are alike."""
    bits, kept = ggml.type_info(quant).bits, ggml.type_info("q8_0").bits
    missed = s.k * (1 - rate)
    each, terms = s.p * s.d, s.terms or s.m
    bases = min(s.m, missed * terms)
    read = 2 * (bases * each * bits + s.k * rate * each * kept + s.k * s.p * s.p * bits) + s.k * each * bits
    multiplied = 2 * (missed * terms * each + s.k * each + s.k * s.p * s.p) + s.k * each
    return read / 8e6, multiplied / 1e6


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
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    base = synthetic.SHAPES[options.shape]
    tokens = trace(base.n, base.k, options.warm + options.tokens)
    table = Table(
        title=f"one layer of {options.shape}, {options.quant}, one token at a time, {options.threads} threads"
    )
    for column in ("experts", "terms", "kept", "found", "ms", "spread", "of plain", "MB", "M mult-adds"):
        table.add_column(column, justify="right" if column != "experts" else "left")
    contenders: list[tuple[str, synthetic.Shape, int | None]] = [("plain", base, None)]
    for terms in options.terms.split(","):
        shape = synthetic.replace(base, terms=int(terms) or None)
        for share in options.budgets.split(","):
            contenders.append(("factorized", shape, round(float(share) * base.n)))
    plain = None
    for label, shape, slots in contenders:
        console.print(f"{label}, terms {shape.terms or 'all'}, {slots} kept")
        layer = Layer(shape, options.quant, slots, options.threads)
        times = list(layer.run(tokens))[options.warm :]
        layer.close()
        median = statistics.median(times)
        quarters = statistics.quantiles(times, n=4)
        plain = plain or median
        rate = hit_rate(tokens, slots, options.warm) if slots else 0.0
        if slots is None:
            bits = ggml.type_info(options.quant).bits
            read, multiplied = shape.weights_read(False) * bits / 8e6, shape.multiply_adds(False) / 1e6
        else:
            read, multiplied = work(shape, options.quant, rate)
        table.add_row(
            label, "-" if slots is None else str(shape.terms or shape.m), "-" if slots is None else str(slots),
            f"{rate:.0%}" if slots else "-", f"{median * 1e3:.2f}", f"{(quarters[2] - quarters[0]) / median:.0%}",
            f"{plain / median:.2f}", f"{read:.1f}", f"{multiplied:.0f}",
        )  # fmt: skip
    Console(width=110 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    main()
