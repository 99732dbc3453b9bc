"""Speed of ordinary files on the patched build and on an unpatched build of the same source, in turns.

    python bench/stock_speed.py [--stock DIR] [--rounds 7] [--threads 1,all] [--layers 6]

DIR holds llama-bench and the libraries of an unpatched build.  This makes one with the installed runtime's options, in
the place where this script looks for it:

    cd tests && python -c "from stock.record import build_stock; build_stock()"

(options: mobe_gguf/runtime/compile.py).  Files: the shipped model in q4_k and f16, and a synthetic one of Qwen3-30B's
shapes in q4_k (see synthetic.py), kept in --dir.  In each round the two builds run one after the other and take turns
in being first.  The table has the median of the rounds' ratios, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import llama_bench
import synthetic
from llama_bench import Contender, Speeds
from rich.console import Console
from rich.table import Table

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.core.progress import console
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.runtime import source
from mobe_gguf.runtime.install import Environment

#: (tokens at once, tokens of a run) of each file's runs: decoding, and a prompt
TESTS = {"tiny-moe": ((1, 512), (512, 2048)), "qwen3-30b": ((1, 64), (512, 512))}


def unpatched(directory: Path | None) -> Path:
    """Path of the unpatched build's llama-bench.  MobeError if there is none, or if it is patched."""
    directory = directory or Environment.at(source.cache_dir() / "stock-runtime").lib
    program = directory / "llama-bench"
    if not program.is_file():
        raise MobeError(
            f"{program} is not there: name an unpatched build with --stock DIR, or make one: "
            'cd tests && python -c "from stock.record import build_stock; build_stock()"'
        )
    library = directory / "libggml-base.so"
    if library.is_file() and b"MOBE_PROJ" in library.read_bytes():
        raise MobeError(f"{program} is a patched build: {library} knows MOBE_PROJ. Name an unpatched one")
    return program


def files(directory: Path, layers: int) -> list[tuple[str, Path]]:
    """``(label, file)`` pairs; each label begins with a name in TESTS."""
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    for quant in ("q4_k", "f16"):
        path = directory / f"tiny-moe-{quant}.gguf"
        if not path.exists():
            recipe = Recipe(parse_quant(quant))
            export(resources.path("models") / "tiny-moe", path, recipe, allow_dense=True, quiet=True)
        found.append((f"tiny-moe {quant}", path))
    plain = synthetic.pair(directory, "qwen3-30b", "q4_k", layers)[0]
    return [*found, (f"qwen3-30b q4_k, {layers} layers", plain)]


def ratios(patched: Speeds, stock: Speeds) -> list[float]:
    """Speed of the patched build over that of the unpatched one, for each round."""
    return [ours / theirs for ours, theirs in zip(patched.values, stock.values, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stock", type=Path, metavar="DIR", help="of an unpatched build")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", default="1,all")
    parser.add_argument("--layers", type=int, default=6, help="of the synthetic file")
    parser.add_argument("--dir", type=Path, default=Path("synthetic"), help="where the models are kept")
    options = parser.parse_args()
    llama_bench.require_runtime()
    program = unpatched(options.stock)
    for name, path in (("patched", runtime.tool("llama-bench")), ("unpatched", program)):
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        version = (done.stdout + done.stderr).strip().splitlines() or ["no version"]
        console.print(f"{name}: {path}: {version[0]}", highlight=False, soft_wrap=True)
    table = Table(title="ordinary files, tokens/s")
    for column in ("file", "threads", "tokens at once", "unpatched", "patched", "ratio", "lowest to highest"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for label, file in files(options.dir, options.layers):
        contenders = [Contender("patched", file), Contender("unpatched", file, program=program)]
        for threads in llama_bench.threads_of(os.cpu_count() or 1, options.threads):
            for batch, tokens in TESTS[label.split()[0]]:
                console.print(f"{label}: {threads} threads, {batch} at once")
                speeds = llama_bench.compare(contenders, batch, tokens, options.rounds, ("-t", str(threads)))
                found = ratios(speeds["patched"], speeds["unpatched"])
                table.add_row(
                    label, str(threads), str(batch), str(speeds["unpatched"]), str(speeds["patched"]),
                    f"{statistics.median(found):.3f}", f"{min(found):.3f} to {max(found):.3f}",
                )  # fmt: skip
    Console(width=120 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    run_program(main)
