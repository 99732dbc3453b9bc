"""Rounding by second moments against libggml's encoder with their diagonal: CPU time side by side, errors and memory.

    python bench/rounding.py [--rows 768] [--columns 2048] [--experts 4] [--directions 256] [--types q3_k,q4_k]

Experts are random matrices of the given shape (Qwen3-30B's by default).  Moments have ``--directions`` directions and a
diagonal, as `mobe-gguf moments` stores them.  The timed work is that of export: S from its root, its factorization,
codes and scales.  llama-quantize calls the same libggml encoder for the same rows.  Both take turns, matrix by matrix;
the figures are the least of each over all experts, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from mobe_gguf.core.errors import run_program
from mobe_gguf.core.metric import Roots
from mobe_gguf.export.rounding import matrix
from mobe_gguf.quant.rounding.rounder import Outcome, Rounder
from mobe_gguf.runtime import ggml


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("rows", 768),
        ("columns", 2048),
        ("experts", 4),
        ("directions", 256),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--types", default="q3_k,q4_k,q2_k")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    n, p, d, k = options.experts, options.rows, options.columns, options.directions
    w = torch.randn(n, p, d, generator=generator) * 0.02
    root = torch.randn(n, d, k, generator=generator) * torch.arange(1, k + 1) ** -0.5
    roots = Roots(root, torch.rand(n, d, generator=generator) + 0.1)
    weights = [matrix(roots, e).diagonal().numpy().copy() for e in range(n)]
    print(f"{n} experts of {p} x {d}, {options.threads} threads, CPU seconds an expert")
    for type_name in options.types.split(","):
        plain, mine, whole = [], [], Outcome()
        for e in range(n):
            begun = time.process_time()
            ggml.quantize(w[e].numpy(), type_name, weights[e], threads=options.threads)
            plain.append(time.process_time() - begun)
            begun = time.process_time()
            rounder = Rounder(matrix(roots, e))
            for part in w[e].split(max(1, (1 << 20) // d)):
                whole.add(rounder.encode(part, type_name)[1])
            mine.append(time.process_time() - begun)
        assert np.isfinite(whole.after)
        print(
            f"{type_name:8} libggml {min(plain):.3f}, by moments {min(mine):.3f}: {min(mine) / min(plain):.1f} times; {whole}",
            flush=True,
        )


if __name__ == "__main__":
    run_program(main)
