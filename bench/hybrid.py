"""GPU and CPU together: a factorized model with its bases on the GPU against the uncompressed one, in three fair ways.

    python bench/hybrid.py [--shapes qwen3-30b,deepseek-v3] [--quant q4_k] [--layers 12] [--device CUDA0]

(a) both with --cpu-moe: the experts' matrices in system memory, everything else, bases included, on the GPU;
(b) equal GPU memory: the uncompressed model keeps as many layers' experts there as the bases take (--n-cpu-moe);
(c) equal file size: the uncompressed model in fewer bits, with --cpu-moe.

Models are synthetic (see synthetic.py); the factorized one has few wide bases without an activation, which ggml's own
operators compute on any backend.  Decoding and a prompt of 512 tokens; medians of --rounds runs taken in turns.
``--rpc HOST:PORT`` uses a ggml-rpc-server as the device.  This shows the placement on a machine without a GPU; its
speeds mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import llama_bench
import synthetic
from llama_bench import Contender
from rich.console import Console
from rich.table import Table

from mobe_gguf.core.errors import run_program
from mobe_gguf.core.progress import console

#: Labels of the factorized model and its rivals.
MOBE, SAME_PLACE, SAME_MEMORY, SAME_SIZE = "mobe, --cpu-moe", "(a) plain", "(b) plain", "(c) plain"


def layers_as_bases(shape: synthetic.Shape, layers: int) -> int:
    """How many layers' plain experts fit in the memory that the bases of all layers take (same type)."""
    bases = 2 * shape.m * shape.r * shape.d * layers
    return bases // (3 * shape.n * shape.p * shape.d)


def contenders(name: str, quant: str, layers: int, directory: Path, published: bool) -> list[Contender]:
    """The factorized model and its rivals, in this order."""
    changes = {} if published else synthetic.WIDE[name]
    plain, mobe = synthetic.pair(directory, name, quant, layers, **changes)
    shape = replace(synthetic.SHAPES[name], **changes)
    on_gpu = layers_as_bases(shape, layers)
    smaller = synthetic.fewer_bits(mobe, plain, quant)
    small = synthetic.pair(directory, name, smaller, layers)[0]

    def on_cpu(count: int) -> tuple[str, ...]:
        return "-ngl", "99", "-ncmoe", str(count)

    return [
        Contender(MOBE, mobe, on_cpu(layers)),
        Contender(SAME_PLACE, plain, on_cpu(layers)),
        Contender(f"{SAME_MEMORY}, {on_gpu} of {layers} layers on the GPU", plain, on_cpu(layers - on_gpu)),
        Contender(f"{SAME_SIZE}, {smaller}", small, on_cpu(layers)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3-30b,deepseek-v3")
    parser.add_argument("--quant", default="q4_k")
    parser.add_argument(
        "--published", action="store_true", help="the paper's form, which needs the CUDA operator"
    )
    parser.add_argument("--layers", type=int, default=12, help="of qwen3-30b; a quarter of it of deepseek-v3")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="generated in a run")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", help="of llama-bench --list-devices  [default: the first GPU]")
    where.add_argument("--rpc", help="HOST:PORT of a ggml-rpc-server")
    parser.add_argument("--dir", type=Path, default=Path("synthetic"), help="where the models are kept")
    options = parser.parse_args()
    llama_bench.require_runtime()
    extra = ["-t", str(options.threads)]
    if options.device:
        extra += ["-dev", options.device]
    if options.rpc:
        extra += ["-rpc", options.rpc]
    for name in options.shapes.split(","):
        layers = max(1, options.layers // 4) if name == "deepseek-v3" else options.layers
        models = contenders(name, options.quant, layers, options.dir, options.published)
        table = Table(title=f"{name}, {layers} layers, {options.quant}, {options.threads} threads")
        for column in ("", "file MB", "decoding tokens/s", "mobe / this", "prompt tokens/s", "mobe / this "):
            table.add_column(column, justify="right" if column else "left")
        speeds = []
        for batch, tokens in ((1, options.tokens), (options.prompt, options.prompt)):
            console.print(f"{name}: {'decoding' if batch == 1 else 'prompt'}")
            speeds.append(llama_bench.compare(models, batch, tokens, options.rounds, extra))
        for model in models:
            row = [model.label, f"{model.file.stat().st_size / 1e6:.0f}"]
            for found in speeds:
                ratio = found[MOBE].median / found[model.label].median
                row += [str(found[model.label]), f"{ratio:.2f}"]
            table.add_row(*row)
        Console(width=120 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    run_program(main)
