"""One ordinary file under several builds in turns: this project's llama.cpp, an unpatched one, and ik_llama.cpp.

    pip install --no-deps --target IK ik-llama-cpp-python==0.1.5
    python bench/builds.py --ik IK [--stock LIB] [--threads 1,all] [--rounds 5]

Each build is called by its own Python package with that package's defaults, in a process of its own: a prompt of 512
tokens, then 64 tokens one by one, of a synthetic file (synthetic.py).  ``--stock``: the libraries of an unpatched build
(see stock_speed.py).  Ratios are of each round; the table has their medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_bench
import stock_speed
import synthetic
from llama_bench import Speeds
from rich.console import Console
from rich.table import Table

from mobe_gguf.core.errors import run_program
from mobe_gguf.core.progress import console

PROMPT, WRITTEN, CONTEXT = 512, 64, 1024
TASKS = ("prompt", "writing")
PATCHED = "patched"


def opened(package: str, file: Path, threads: int) -> tuple[Any, Any, Callable[[], None]]:
    """The package's ctypes module, a context with its defaults, and a function that empties the context."""
    if package == "ik_llama_cpp":
        api = importlib.import_module("ik_llama_cpp._ctypes_api")
        model = importlib.import_module(package).Llama(
            str(file), n_ctx=CONTEXT, n_threads=threads, verbose=False
        )
        context = model._context._ctx
        clear = lambda: api.llama_kv_cache_clear(context)  # noqa: E731
    else:
        api = importlib.import_module("llama_cpp.llama_cpp")
        model = importlib.import_module(package).Llama(
            str(file), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        context = model.ctx
        clear = lambda: api.llama_memory_clear(api.llama_get_memory(context), True)  # noqa: E731
    opened.kept = model  # type: ignore[attr-defined]  # its context ends with it
    return api, context, clear


def decode(api: Any, context: Any, batch: Any, tokens: range, position: int) -> None:
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = position + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = i == len(tokens) - 1
    if api.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")


def time_one(package: str, file: Path, threads: int) -> dict[str, float]:
    """Tokens per second of each task; a first prompt, which loads the weights, is not counted."""
    api, context, clear = opened(package, file, threads)
    batch = api.llama_batch_init(PROMPT, 0, 1)
    prompt = range(300, 300 + PROMPT)
    decode(api, context, batch, prompt, 0)
    clear()
    start = time.perf_counter()
    decode(api, context, batch, prompt, 0)
    read = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(WRITTEN):
        decode(api, context, batch, range(1000 + 7 * i, 1001 + 7 * i), PROMPT + i)
    return {"prompt": PROMPT / read, "writing": WRITTEN / (time.perf_counter() - start)}


def run(package: str, extra: dict[str, str], file: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", package, str(file), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | extra)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ik", type=Path, metavar="DIR", help="where ik-llama-cpp-python is installed")
    parser.add_argument("--stock", type=Path, metavar="DIR", help="libraries of an unpatched build")
    parser.add_argument("--shape", choices=synthetic.SHAPES, default="qwen3-30b")
    parser.add_argument("--quant", default="q4_k")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", default="1,all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path("synthetic"), help="where the models are kept")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        package, file, threads = options.one
        print(json.dumps(time_one(package, Path(file), int(threads))))
        return
    llama_bench.require_runtime()
    builds: dict[str, tuple[str, dict[str, str]]] = {PATCHED: ("llama_cpp", {})}
    stock = stock_speed.unpatched(options.stock).parent
    builds["unpatched"] = ("llama_cpp", {"LLAMA_CPP_LIB_PATH": str(stock)})
    if options.ik:
        builds["ik_llama.cpp"] = ("ik_llama_cpp", {"PYTHONPATH": str(options.ik.resolve())})
    file = synthetic.pair(options.dir, options.shape, options.quant, options.layers)[0]
    table = Table(title=f"{options.shape}, {options.layers} layers, {options.quant}, tokens/s")
    for column in ("threads", "build", *(c for task in TASKS for c in (task, "patched / this"))):
        table.add_column(column, justify="right")
    for threads in llama_bench.threads_of(os.cpu_count() or 1, options.threads):
        speeds = {name: {task: Speeds() for task in TASKS} for name in builds}
        for turn in range(options.rounds):
            console.print(f"{threads} threads, round {turn + 1}")
            order = [*builds][turn % len(builds) :] + [*builds][: turn % len(builds)]
            for name in order:
                for task, speed in run(*builds[name], file, threads).items():
                    speeds[name][task].values.append(speed)
        for name, found in speeds.items():
            row = [str(threads), name]
            for task in TASKS:
                ratios = stock_speed.ratios(speeds[PATCHED][task], found[task])
                row += [str(found[task]), f"{statistics.median(ratios):.2f}"]
            table.add_row(*row)
    Console(width=120 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    run_program(main)
