"""Speed of files and of builds against each other in one run, in turns of a tenth of a second.

    python bench/builds.py [--shape qwen3-30b] [--forms plain,wide,smaller] [--threads 1,all] [--rounds 40]
    python bench/builds.py --forms plain --build unpatched=LIB --ik IK      # the plain file under other builds as well
    pip install --no-deps --target IK ik-llama-cpp-python==0.1.5

Forms are those of decode.py, wide-tanh, and plain ones with experts of another type (``experts=q1_0``); their files are synthetic (synthetic.py).  Builds are this project's llama.cpp,
others by the directory of their libraries (``--build``; stock_speed.py says how to make an unpatched one), and
ik_llama.cpp (``--ik``).  Each contender is a process of its
own, which opens its file once through its package's defaults and then waits for its turn: a processor that changes its
speed does so for all alike.  A turn writes 16 tokens one by one, after one that is not
counted, or reads a prompt of 512.  Ratios are of each turn; the table has their medians and quartiles.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_bench
import synthetic
from rich.console import Console
from rich.table import Table

from mobe_gguf.core.errors import run_program
from mobe_gguf.core.progress import console

PROMPT, WRITTEN = 512, 16

#: Path of the file, module of the package, and environment of each contender's process.
Contender = tuple[Path, str, dict[str, str]]


def opened(package: str, file: str, threads: int) -> tuple[Any, Any, Callable[[], None]]:
    """The package's ctypes module, a context with its defaults, and a function that empties the context."""
    options: dict[str, Any] = {"n_ctx": PROMPT, "n_threads": threads, "verbose": False}
    if package == "ik_llama_cpp":
        api = importlib.import_module("ik_llama_cpp._ctypes_api")
        model = importlib.import_module(package).IkLlama(file, **options)
        context = model.ctx
        clear = lambda: api.llama_kv_cache_clear(context)  # noqa: E731
    else:
        api = importlib.import_module("llama_cpp.llama_cpp")
        model = importlib.import_module(package).Llama(file, n_threads_batch=threads, **options)
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
        batch.logits[i] = True  # or the last layer would be computed for the last token alone
    if api.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")


def serve(package: str, file: str, threads: int) -> None:
    """Answer each line of standard input, a task and a number of its first token, with tokens per second."""
    api, context, clear = opened(package, file, threads)
    batch = api.llama_batch_init(PROMPT, 0, 1)
    print("ready", flush=True)
    for line in sys.stdin:
        task, first = line.split()
        token = 300 + int(first) % 2000
        clear()
        if task == "prompt":
            start = time.perf_counter()
            decode(api, context, batch, range(token, token + PROMPT), 0)
            print(json.dumps(PROMPT / (time.perf_counter() - start)), flush=True)
            continue
        decode(api, context, batch, range(token, token + 1), 0)
        start = time.perf_counter()
        for i in range(1, WRITTEN + 1):
            decode(api, context, batch, range(token + 7 * i, token + 7 * i + 1), i)
        print(json.dumps(WRITTEN / (time.perf_counter() - start)), flush=True)


class Worker:
    """A process that runs :func:`serve`."""

    def __init__(self, contender: Contender, threads: int) -> None:
        file, package, extra = contender
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", package, str(file), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | extra,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line[0].isdigit() or line.startswith("ready"):
                return line
        raise SystemExit(f"{self.process.args!r} ended with {self.process.wait()}")

    def turn(self, task: str, token: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task} {token}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self.process.communicate()


def measure(
    contenders: dict[str, Contender], threads: int, turns: dict[str, int]
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each turn, by task and contender.

    Half of the turns are with files opened in the reverse order: the process that opens its file first is slower (by 4 to 5 %,
    the same build and file twice).
    """
    found: dict[str, dict[str, list[float]]] = {task: {label: [] for label in contenders} for task in turns}
    for labels in ([*contenders], [*reversed(contenders)]):
        workers = {label: Worker(contenders[label], threads) for label in labels}
        for task, count in turns.items():
            for turn in range(-1, -(-count // 2)):  # the first, which loads the weights, is not counted
                # none always follows the same other one, whose threads may still wait for work
                for label in random.Random(turn).sample(labels, len(labels)):
                    speed = workers[label].turn(task, 131 * turn + 131)
                    if turn >= 0:
                        found[task][label].append(speed)
        for worker in workers.values():
            worker.close()
        for row in rows(found, threads):  # a run that is stopped has shown this much
            console.print("  ".join(row), highlight=False)
    return found


def contenders(options: argparse.Namespace) -> dict[str, Contender]:
    """Each form under this build; the first form under the other builds."""
    found: dict[str, Contender] = {}
    wide = synthetic.WIDE[options.shape]
    for form in options.forms.split(","):
        quant = options.quant
        plain, factorized = synthetic.pair(options.dir, options.shape, quant, options.layers, **wide)
        if form.startswith("experts="):
            kind = form.partition("=")[2]
            plain = synthetic.plain(options.dir, options.shape, quant, options.layers, kind)
        if form == "smaller":
            quant = synthetic.fewer_bits(factorized, plain, quant)
            plain = synthetic.pair(options.dir, options.shape, quant, options.layers)[0]
        if form == "wide-tanh":
            tanh = wide | {"activation": "tanh"}
            factorized = synthetic.pair(options.dir, options.shape, quant, options.layers, **tanh)[1]
        file = factorized if form.startswith("wide") else plain
        found[f"{form}, {quant}, {file.stat().st_size / 1e6:.0f} MB"] = (file, "llama_cpp", {})
    file = next(iter(found.values()))[0]
    for build in options.build:
        name, _, lib = build.rpartition("=")
        found[name or lib] = (file, "llama_cpp", {"LLAMA_CPP_LIB_PATH": str(Path(lib).resolve())})
    if options.ik:
        found["ik_llama.cpp"] = (file, "ik_llama_cpp", {"PYTHONPATH": str(options.ik.resolve())})
    return found


def rows(found: dict[str, dict[str, list[float]]], threads: int) -> Iterator[list[str]]:
    for task, speeds in found.items():
        first = next(iter(speeds.values()))
        for label, values in speeds.items():
            ratios = [ours / theirs for ours, theirs in zip(values, first, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            speed = f"{statistics.median(values):.1f}"
            yield [str(threads), task, label, speed, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ik", type=Path, metavar="DIR", help="where ik-llama-cpp-python is installed")
    parser.add_argument(
        "--build", action="append", default=[], metavar="NAME=DIR", help="libraries of another build"
    )
    parser.add_argument("--shape", choices=synthetic.SHAPES, default="qwen3-30b")
    parser.add_argument(
        "--forms", default="plain,wide,smaller", help="of plain, wide, wide-tanh, smaller, experts=TYPE"
    )
    parser.add_argument("--quant", default="q4_k")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", default="1,all")
    parser.add_argument("--rounds", type=int, default=40, help="turns that write")
    parser.add_argument("--prompts", type=int, default=10, help="turns that read a prompt")
    parser.add_argument("--dir", type=Path, default=Path("synthetic"), help="where the models are kept")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        package, file, threads = options.serve
        serve(package, file, int(threads))
        return
    llama_bench.require_runtime()
    chosen = contenders(options)
    table = Table(title=f"{options.shape}, {options.layers} layers, {options.quant}")
    for column in ("threads", "task", "contender", "tokens/s", "of the first", "quartiles"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for threads in llama_bench.threads_of(os.cpu_count() or 1, options.threads):
        turns = {"writing": options.rounds, "prompt": options.prompts}
        for row in rows(measure(chosen, threads, turns), threads):
            table.add_row(*row)
    Console(width=120 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    run_program(main)
