"""Compare the speed and memory that `mobe-gguf plan` expects with those of the runtime.

    python bench/plan_speed.py [--shapes qwen3-30b,deepseek-v2-lite,deepseek-v3] [--quants q4_k,q3_k] [--layers 2] [--dir synthetic]

Files have real shapes and random weights (see synthetic.py): plain ones, and for the first shape one with four bases
and no activation.  The machine's rates are measured in every round, too: on a shared machine they change within
seconds.  Speed: llama-bench, generation.  The medians of all rounds count.  Memory: the peak resident memory of llama-bench for a prompt of --ctx tokens, without mapped files, the program
itself included.  Exit code 1 if one is off by more than 25 % (speed) or 5 % (memory).
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import llama_bench
import synthetic
from rich.console import Console
from rich.table import Table

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.core.progress import console
from mobe_gguf.formats.gguf import read_model
from mobe_gguf.plan import cost, machine, memory
from mobe_gguf.plan.forms import Form
from mobe_gguf.plan.layout import Layout, read_layout

#: A DeepSeek-V3 layer has 6 GB; with fewer experts it is smaller, but a token reads as much.
FEWER = {"deepseek-v3": {"n": 32}}
SPEED, MEMORY = 0.25, 0.05


def form_of(path: Path) -> Form:
    """The form of an existing file."""
    file = read_model(path)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    types = {name: info.type for name, info in file.tensors.items()}
    bases = next((shape[0] for name, shape in shapes.items() if "_basis.weight" in name), 0)
    return Form(path.stem, "", shapes, types, file.size, bases=bases)


def files(options: argparse.Namespace) -> list[Path]:
    """The files; missing ones are written."""
    directory, layers = options.dir, options.layers
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    for name in options.shapes.split(","):
        shape = replace(synthetic.SHAPES[name], **FEWER.get(name, {}))
        for quant in options.quants.split(","):
            stem = f"{name}-n{shape.n}-{layers}l-{quant}"
            found.append(synthetic.write(directory / f"{stem}.gguf", shape, quant, layers, factorized=False))
    first, quant = options.shapes.split(",")[0], options.quants.split(",")[0]
    linear = replace(synthetic.SHAPES[first], m=4, activation="none", **FEWER.get(first, {}))
    found.append(
        synthetic.write(
            directory / f"{first}-{layers}l-{quant}-linear-m4.gguf", linear, quant, layers, factorized=True
        )
    )
    return found


def alone(path: Path, tokens: int, rounds: int) -> float:
    """Tokens per second of CPU time, on one thread, so that other programs do not count.  From runs of two lengths, so
    that loading does not count either; the fastest of some rounds each."""
    spent = {tokens: math.inf, 3 * tokens: math.inf}
    for _ in range(rounds):
        for count in spent:
            usage = finished(path, ("-t", "1", "-p", "0", "-n", str(count), "-r", "1", "--no-warmup"))
            spent[count] = min(spent[count], usage.ru_utime + usage.ru_stime)
    return 2 * tokens / (spent[3 * tokens] - spent[tokens])


def resident(path: Path, ctx: int, threads: int) -> int:
    """Peak memory in bytes of llama-bench for a prompt of ``ctx`` tokens, which fills cache and buffers."""
    more = ("-t", str(threads), "-p", str(ctx), "-n", "0", "-r", "1", "--no-warmup", "-lm", "none")
    return finished(path, more).ru_maxrss * 1024


def finished(path: Path, more: tuple[str, ...]) -> resource.struct_rusage:
    """Resources that a run of llama-bench used; MobeError if it fails."""
    command = [str(runtime.tool("llama-bench")), "-m", str(path), *more]
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=nothing, stderr=nothing)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise MobeError(f"{' '.join(command)} failed: exit code {process.returncode}")
    return usage


def expected(path: Path, layout: Layout, here: machine.Machine, ctx: int) -> cost.Cost:
    return cost.cost(layout, form_of(path), here, memory.beside_weights(layout, ctx))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3-30b,deepseek-v2-lite,deepseek-v3")
    parser.add_argument("--quants", default="q4_k,q3_k")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the processor's time of one thread: right on a busy machine, too",
    )
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write-only", action="store_true", help="write the files, measure nothing")
    parser.add_argument("--dir", type=Path, default=Path("synthetic"), help="where the models are kept")
    options = parser.parse_args()
    llama_bench.require_runtime()
    paths = files(options)
    if options.write_only:
        return 0
    kinds = {kind for path in paths for kind in form_of(path).types.values()}
    with tempfile.TemporaryDirectory() as folder:
        if options.cpu_time:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one thread, in what is measured as well
        here = replace(machine.this_machine((), Path(folder) / "machine.json"), vram=0)
    threads = 1 if options.cpu_time else options.threads
    measured = [machine.measured(sorted(kinds), threads, 1)]
    contenders = [llama_bench.Contender(path.stem, path) for path in paths]
    best: dict[str, float] = {}
    if options.no_speed:
        pass
    elif options.cpu_time:
        best = {path.stem: alone(path, options.tokens, options.rounds) for path in paths}
    else:
        runs: dict[str, list[float]] = {path.stem: [] for path in paths}
        for _ in range(options.rounds):
            for one in contenders:
                speeds = llama_bench.run(one, (1,), options.tokens, ("-t", str(threads)))
                runs[one.label].append(speeds[1])
            measured.append(machine.measured(sorted(kinds), threads, 1))
        best = {label: median(found) for label, found in runs.items()}
    here = replace(here, rates={kind: median(one[kind] for one in measured) for kind in kinds})
    rates = ", ".join(f"{kind} {rate / 1e9:.2f}" for kind, rate in sorted(here.rates.items()))
    console.print(f"GB/s: {rates}; node {here.node * 1e6:.2f} us", highlight=False)
    table = Table(
        title=f"plan and runtime, {options.layers} layers, {threads} threads, context {options.ctx}"
    )
    for column in ("file", "tokens/s", "planned", "off", "resident MB", "planned", "off"):
        table.add_column(column, justify="left" if column == "file" else "right")
    wrong = []
    for path in paths:
        found = expected(path, read_layout(path), here, options.ctx)
        cells = [path.stem, "", "", ""]
        if path.stem in best:
            speed = best[path.stem]
            off = found.tokens_per_second / speed - 1
            cells = [path.stem, f"{speed:.2f}", f"{found.tokens_per_second:.2f}", f"{off:+.0%}"]
            wrong += [f"{path.stem}: speed {off:+.0%}"] * (abs(off) > SPEED)
        if not options.no_memory:
            taken = resident(path, options.ctx, options.threads)
            more = found.ram / taken - 1
            cells += [f"{taken / 1e6:.0f}", f"{found.ram / 1e6:.0f}", f"{more:+.1%}"]
            wrong += [f"{path.stem}: memory {more:+.1%}"] * (abs(more) > MEMORY)
        table.add_row(*cells)
    Console(width=120 if not sys.stdout.isatty() else None).print(table)
    for line in wrong:
        console.print(f"off: {line}", highlight=False)
    return int(bool(wrong))


if __name__ == "__main__":
    run_program(main)
