"""Tokens per second of a factorized model against the uncompressed one in the same quantization: one token at a time, and
several at once as parallel slots decode them.

    python bench/decode.py [--shapes qwen3-30b,...] [--quants q4_k,...] [--batches 1,2,4,8] [--threads 1,all]

Models are synthetic (see synthetic.py) and kept in --dir.  Beside each speed: what a token reads and multiplies in the
experts, and the share of the limit that these and the machine's peaks set (see peaks.py).
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

from mobe_gguf.errors import MobeError
from mobe_gguf.progress import console
from mobe_gguf.runtime import ggml

#: A forward pass of the few layers takes so many tokens at least, per run.
TOKENS = {1: 32, 2: 64, 4: 64, 8: 64}


def forms(name: str, quant: str, layers: int, directory: Path, wanted: list[str]) -> dict[str, tuple]:
    """``label: (file, shape, factorized)``."""
    base = synthetic.SHAPES[name]
    found = {}
    for form in wanted:
        if form == "plain":
            found[form] = (synthetic.pair(directory, name, quant, layers)[0], base, False)
            continue
        changes = {"dense": {}, "none": {"activation": "none"}}.get(form)
        if changes is None:
            changes = {"terms": int(form.removeprefix("terms"))}
        file = synthetic.pair(directory, name, quant, layers, **changes)[1]
        found[form] = (file, replace(base, **changes), True)
    return found


def limits(shape: synthetic.Shape, factorized: bool, quant: str, tokens: int) -> tuple[float, float]:
    """Megabytes read and million multiply-adds a token in the experts of one layer, with ``tokens`` at once."""
    bits = ggml.type_info(quant).bits
    read = shape.weights_read(factorized, tokens) * bits / 8e6
    return read, shape.multiply_adds(factorized, tokens) / 1e6


def measure(options: argparse.Namespace, batches: list[int], tokens: dict[int, int], title: str) -> None:
    """Print one table for each shape and quantization."""
    llama_bench.require_runtime()
    for name in options.shapes.split(","):
        layers = options.layers or (1 if name == "deepseek-v3" else 4)
        for quant in options.quants.split(","):
            files = forms(name, quant, layers, options.dir, options.forms.split(","))
            table = Table(title=f"{title}: {name}, {layers} layers, {quant}")
            for column in ("threads", "tokens at once", "form", "tokens/s", "of plain", "MB", "M mult-adds"):
                table.add_column(column, justify="right")
            contenders = [Contender(label, file) for label, (file, *_) in files.items()]
            for threads in llama_bench.threads_of(os.cpu_count() or 1, options.threads):
                for batch in batches:
                    console.print(f"{name} {quant}: {threads} threads, {batch} at once")
                    speeds = llama_bench.compare(
                        contenders, batch, tokens.get(batch, batch), options.rounds, ("-t", str(threads))
                    )
                    plain = speeds.get("plain")
                    for label, (_, shape, factorized) in files.items():
                        read, multiplied = limits(shape, factorized, quant, batch)
                        ratio = f"{speeds[label].median / plain.median:.2f}" if plain else "-"
                        table.add_row(
                            str(threads), str(batch), label, str(speeds[label]), ratio,
                            f"{read:.1f}", f"{multiplied:.0f}",
                        )  # fmt: skip
            Console(width=110 if not sys.stdout.isatty() else None).print(table)


def arguments(description: str, **defaults: str) -> argparse.ArgumentParser:
    """The options that this and prompt.py share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=defaults.get("shapes", "qwen3-30b,deepseek-v2-lite,deepseek-v3"))
    parser.add_argument("--quants", default="q4_k,q8_0,iq4_xs")
    parser.add_argument("--forms", default="plain,dense,terms4,none", help="plain, dense, termsS, none")
    parser.add_argument("--layers", type=int, help="[default: 4; 1 of deepseek-v3]")
    parser.add_argument("--threads", default="1,all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default=defaults["batches"], help="tokens at once")
    parser.add_argument("--dir", type=Path, default=Path("synthetic"), help="where the models are kept")
    return parser


def main() -> None:
    options = arguments(__doc__, batches="1,2,4,8").parse_args()
    measure(options, [int(b) for b in options.batches.split(",")], TOKENS, "decoding")


if __name__ == "__main__":
    try:
        main()
    except MobeError as e:
        sys.exit(f"Error: {e.message}")
