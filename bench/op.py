"""The operator on one CPU core of this machine: time, arithmetic and bytes per second, compared with the core's peaks.

    python bench/op.py [--types q4_K,q8_0] [--tokens 1,4,16,64,512] [--shape d,r,m,n,k] [--terms S] [--repetitions N]

Times are CPU times (the machine may be busy): medians, with the fastest and slowest.

The limit is the time of the operations that the kernel cannot avoid, each at the peak of a loop that does nothing else
(bench/op.c): multiply-adds of the combination at the rate of byte products (for floats, of multiply-adds), evaluations
of tanh, multiply-adds with the inputs.  If reading the bases from memory takes longer, that is the limit.  Unpacking of
quantized numbers, loads and stores are left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median

from peaks import Peaks, build, together
from synthetic import Work, is_prompt

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.runtime import ggml

QWEN3_30B = "2048,768,32,128,8"


def run(program: Path, *arguments: object) -> list[str]:
    env = {**os.environ, "MOBE_LIB": str(runtime.lib_dir())}
    done = subprocess.run(
        [program, *map(str, arguments)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise MobeError(f"{program} {' '.join(map(str, arguments))} failed: {done.stderr[-500:]}")
    return done.stdout.split("\n")[:-1]


def measure(program: Path, peak: Peaks, kind: str, shape: list[int], tokens: int, options):
    """Run the program once; returns one row of the table."""
    d, r, m, n, k = shape
    found = run(program, kind, *shape, tokens, options.terms, options.repetitions)
    seconds = sorted(float(line) for line in found if line[:1].isdigit())
    info = ggml.type_info(kind)
    in_use = len({(i * (n // k) + t * 5 + t * t % 7) % n for t in range(tokens) for i in range(k)})
    mix, inputs = in_use * (options.terms or m) * r * d, tokens * k * r * d
    prompt = is_prompt(tokens, k, in_use)
    work = Work(
        m * r * info.row_bytes(d),
        mix=mix,
        evaluate=in_use * r * d,
        project=0 if prompt else inputs,
        prompt=inputs if prompt else 0,
    )
    read, compute = peak.limits(work, kind)
    took, bound = median(seconds), max(compute, read)
    what = "memory" if read > compute else "arithmetic"
    return [
        kind, str(tokens), f"{1e3 * took:.2f}", f"{1e3 * seconds[0]:.2f} to {1e3 * seconds[-1]:.2f}",
        f"{(mix + inputs) / took / 1e9:.0f}", f"{m * r * info.row_bytes(d) / took / 1e9:.1f}",
        f"{1e3 * bound:.2f}", what, f"{100 * bound / took:.0f} %",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default="q4_K,q8_0,iq4_xs,q6_K,f16")
    parser.add_argument("--tokens", default="1,4,16,64,512")
    parser.add_argument("--shape", default=QWEN3_30B, help="d,r,m,n,k (default: Qwen3-30B, %(default)s)")
    parser.add_argument("--terms", type=int, default=0, help="non-zero coefficients an expert (default: all)")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        peak = Peaks(1, together(program, 1))
        print(
            "One core: "
            + ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in peak.rates.items())
            + "\n"
        )
        print("| type | T | CPU ms, median | fastest to slowest | GMAC/s | GB/s | limit, ms | of | reached |")
        print("|---|---|---|---|---|---|---|---|---|")
        shape = [int(size) for size in options.shape.split(",")]
        for kind in options.types.split(","):
            for tokens in map(int, options.tokens.split(",")):
                row = measure(program, peak, kind, shape, tokens, options)
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    run_program(main)
