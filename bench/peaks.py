"""The machine's peak rate for each kind of work, measured by a loop that does nothing else, and the time limits that
follow.

    peaks = measure(threads)        as many processes as threads, at the same time (bench/op.c, `peaks`)
    peaks.limit(work, "q4_k")       least seconds that the work takes

The limit is the larger of two times: that of moving the bytes at the rate at which all threads together read memory,
and that of the arithmetic.  Kinds of arithmetic share the core's ports, so their times add up, each at its own peak:

    mix        multiply-adds of the combination of bases: products of bytes; with bases in q8_0 coefficients have two
               bytes, twice the work; with bases of floats, multiply-adds of floats
    evaluate   evaluations of f: tanh by the kernel's own approximation
    project    multiply-adds of formed rows with inputs: floats
    prompt     the same in a prompt: of bytes when bases are quantized
    multiply   ggml's own products: of bytes for quantized matrices, of bf16 for bf16
               matrices, else of floats

Unpacking of quantized numbers, loads and stores, and synchronization of threads are not counted, so no kernel reaches
the limit.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from synthetic import Work

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.runtime import ggml

#: Each peak is the best of this many runs.
RUNS = 3


@dataclass(frozen=True)
class Peaks:
    """``rates``: units per second of ``threads`` cores together, by the names that op.c prints (``read``: bytes)."""

    threads: int
    rates: dict[str, float]

    def first(self, *names: str) -> float:
        """The rate of the first of ``names`` that this processor has."""
        return next(self.rates[name] for name in names if name in self.rates)

    def limits(self, work: Work, quant: str) -> tuple[float, float]:
        """Seconds for moving the bytes of ``work`` and for its arithmetic, with matrices of the type ``quant``."""
        floats = self.rates["fma"]
        mix = prompt = products = floats
        if ggml.type_info(quant).quantized:
            mix = prompt = products = self.first("int8", "fma")
            if quant.lower() == "q8_0" and "int8" in self.rates:
                mix /= 2
        elif quant.lower() == "bf16":
            products = self.first("bf16", "fma")
        arithmetic = work.mix / mix + work.project / floats + work.prompt / prompt + work.multiply / products
        arithmetic += work.evaluate / self.rates["tanh"]
        return work.moved / self.rates["read"], arithmetic

    def limit(self, work: Work, quant: str) -> float:
        """Least seconds that ``work`` takes."""
        return max(self.limits(work, quant))

    def on(self, cores: int, read: float) -> Peaks:
        """Peaks of ``cores`` such cores with memory that gives ``read`` bytes per second."""
        rates = {name: rate / self.threads * cores for name, rate in self.rates.items()}
        return Peaks(cores, {**rates, "read": read})

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in self.rates.items())
        return f"Peaks of {self.threads} threads, G/s (read: bytes): {rates}"


def build(out: Path) -> Path:
    """Compile op.c against the installed libraries, with this machine's instructions."""
    lib, kernels = runtime.lib_dir(), resources.path("native") / "ggml_mobe"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise MobeError("no C compiler found: apt install gcc")
    command = [compiler, "-std=gnu11", "-O3", "-march=native", "-w", str(Path(__file__).with_name("op.c"))]
    command += [f"-I{runtime.source_tree() / 'ggml/include'}", f"-I{kernels}", "-o", str(out / "op")]
    command += [f"-L{lib}", "-l:libggml.so", "-l:libggml-base.so", f"-Wl,-rpath,{lib}", "-lm"]
    subprocess.run(command, check=True)
    return out / "op"


def measure(threads: int) -> Peaks:
    """The best of RUNS runs of each loop, summed over ``threads`` processes that run at the same time.
    MobeError without a compiler.
    """
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for _ in range(RUNS):
            for name, rate in together(program, threads).items():
                best[name] = max(best.get(name, 0.0), rate)
    return Peaks(threads, best)


def together(program: Path, threads: int) -> dict[str, float]:
    """One run of ``program peaks`` in each of ``threads`` processes, summed by name."""
    running = [
        subprocess.Popen([program, "peaks"], stdout=subprocess.PIPE, text=True) for _ in range(threads)
    ]
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise MobeError(f"{program} peaks failed")
    return summed(text.splitlines() for text in printed)


def summed(outputs: Iterable[Iterable[str]]) -> dict[str, float]:
    """Rates by name from ``name rate`` lines of several processes; rates of the same name are added."""
    rates: dict[str, float] = {}
    for lines in outputs:
        for line in lines:
            name, rate = line.split()
            rates[name] = rates.get(name, 0.0) + float(rate)
    return rates
