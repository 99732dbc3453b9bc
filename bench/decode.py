"""Decoding speed of a factorized model against the uncompressed one in the same quantization: one token at a time, and
several at once, as parallel slots do.

    python bench/decode.py [--shapes qwen3-30b,...] [--quants q4_k,...] [--batches 1,2,4,8] [--threads 1,all]

Models are synthetic (see synthetic.py) and kept in --dir.  Beside each speed are figures for one token in the experts
of one layer: bytes read, multiply-adds, the limit that follows from the machine's peaks (see peaks.py), the time taken,
and the share of the limit reached.  That time leaves out attention, norms and output: it is the time of the model minus
that of a model with one small expert (the form "rest", 1.6 M weights a layer with Qwen3-30B's shapes, for which nothing
is corrected).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama_bench
import peaks
import synthetic
from llama_bench import Contender
from rich.console import Console
from rich.table import Table

from mobe_gguf.core.errors import run_program
from mobe_gguf.core.progress import console

#: Least number of tokens per run, by batch.
TOKENS = {1: 32, 2: 32, 4: 32, 8: 32}


COLUMNS = (
    "threads", "at once", "form", "tokens/s", "of plain", "MB", "M mult-adds", "limit, ms", "of", "experts, ms", "reached",
)  # fmt: skip


def forms(name: str, quant: str, layers: int, directory: Path, wanted: list[str]) -> dict[str, tuple]:
    """``label: (file, shape, factorized)``; the form "rest" is always there; it and "smaller" have no shape, for no limit is shown of them."""
    base = synthetic.SHAPES[name]
    found: dict[str, tuple] = {"rest": (synthetic.rest(directory, name, quant, layers), None, False)}
    plain = synthetic.pair(directory, name, quant, layers)[0]
    for form in wanted:
        if form == "plain":
            found[form] = (plain, base, False)
            continue
        if form == "smaller":
            wide = synthetic.pair(directory, name, quant, layers, **synthetic.WIDE[name])[1]
            type_name = synthetic.fewer_bits(wide, plain, quant)
            found[type_name] = (synthetic.pair(directory, name, type_name, layers)[0], None, False)
            continue
        mix = form.removesuffix("-down")
        changes = {"dense": {}, "none": {"activation": "none"}, "wide": synthetic.WIDE[name]}.get(mix)
        if changes is None:
            changes = {"terms": int(mix.removeprefix("terms"))}
        if form != mix:
            changes |= {"down": True}
        file = synthetic.pair(directory, name, quant, layers, **changes)[1]
        found[form] = (file, replace(base, **changes), True)
    return found


def rows(
    files: dict[str, tuple],
    speeds: dict[str, llama_bench.Speeds],
    layers: int,
    quant: str,
    batch: int,
    machine: peaks.Peaks,
) -> Iterator[list[str]]:
    """The row of each form, from the column with its name on."""
    plain = speeds.get("plain")
    for label, (_, shape, factorized) in files.items():
        ratio = f"{speeds[label].median / plain.median:.2f}" if plain else "-"
        if shape is None:
            yield [label, str(speeds[label]), ratio]
            continue
        seconds = (1 / speeds[label].median - 1 / speeds["rest"].median) / layers
        yield [
            label, str(speeds[label]), ratio, *cells(shape, factorized, quant, batch, machine, seconds)
        ]  # fmt: skip


def cells(
    shape: synthetic.Shape, factorized: bool, quant: str, batch: int, machine: peaks.Peaks, seconds: float
) -> list[str]:
    """The cells beside a speed; ``seconds``: of a token in the experts of one layer."""
    work = shape.work(factorized, quant, batch)
    read, arithmetic = machine.limits(work, quant)
    limit = max(read, arithmetic)
    reached = f"{limit / seconds:.0%}" if seconds > 0 else "-"
    return [
        f"{work.moved / 1e6:.1f}", f"{work.multiply_adds / 1e6:.0f}",
        f"{1e3 * limit:.3f}", "memory" if read > arithmetic else "arithmetic", f"{1e3 * seconds:.3f}", reached,
    ]  # fmt: skip


def measure(options: argparse.Namespace, batches: list[int], tokens: dict[int, int], title: str) -> None:
    """Print the machine's peaks, then one table for each shape and quantization."""
    llama_bench.require_runtime()
    machines = [
        peaks.measure(threads) for threads in llama_bench.threads_of(os.cpu_count() or 1, options.threads)
    ]
    out = Console(width=130 if not sys.stdout.isatty() else None)
    for machine in machines:
        out.print(str(machine), highlight=False)
    for name in options.shapes.split(","):
        layers = options.layers or (1 if name == "deepseek-v3" else 4)
        for quant in options.quants.split(","):
            files = forms(name, quant, layers, options.dir, options.forms.split(","))
            table = Table(title=f"{title}: {name}, {layers} layers, {quant}")
            for column in COLUMNS:
                table.add_column(column, justify="right")
            contenders = [Contender(label, file) for label, (file, *_) in files.items()]
            for machine in machines:
                extra = ("-t", str(machine.threads))
                for group, count in llama_bench.grouped(batches, tokens):
                    console.print(f"{name} {quant}: {machine.threads} threads, {group} at once")
                    found = llama_bench.compare_each(contenders, group, count, options.rounds, extra)
                    for batch, speeds in found.items():
                        for row in rows(files, speeds, layers, quant, batch, machine):
                            table.add_row(str(machine.threads), str(batch), *row)
            out.print(table)


def arguments(description: str, **defaults: str) -> argparse.ArgumentParser:
    """The options that this and prompt.py share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=defaults.get("shapes", "qwen3-30b,deepseek-v2-lite,deepseek-v3"))
    parser.add_argument("--quants", default="q4_k,q8_0,iq4_xs")
    parser.add_argument(
        "--forms",
        default="plain,wide,smaller",
        help="plain; smaller: plain in a type that gives wide's size; wide: few bases, no activation; dense: the paper's; "
        "termsS, none: the paper's with S terms, without an activation; all but plain and smaller also with -down behind",
    )
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
    run_program(main)
