"""Damaged GGUF files through the patched loader, built with AddressSanitizer, and through this package's reader.

    python tests/fuzz/run.py [--count 2000] [--seed 0] [--keep DIR] [--installed]

Whole small files of every kind of factors are changed in a few bytes of the head, in one number of it, or cut off.  Each is loaded,
and evaluated if it loads; a process loads 64, and one that crashes is loaded once more in a process of its own.  Exit code 1 if one crashes, hangs, reaches memory that is not its own,
or makes our reader raise anything but the error that users see.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.damage import damaged, whole
from parity.loader import Loader, Outcome

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.core.progress import bar, console
from mobe_gguf.evaluate.verify import verify
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.runtime import build, source
from mobe_gguf.runtime import compile as compiling


def sanitized(jobs: int) -> Path:
    """The directory of libllama and its libraries, compiled with AddressSanitizer; done again only after a change."""
    recipe = build.BuildRecipe.patched(compiling.BuildOptions())
    cache = source.cache_dir()
    work = cache / f"asan-{recipe.variant()}"
    env = compiling.environment()
    cache.mkdir(parents=True, exist_ok=True)
    with build.locked(cache) as lock:
        work.mkdir(exist_ok=True)
        log = work / "build.log"
        tree = build.patched_tree(recipe, work, env)
        build.copy_kernels(recipe, work, work / "ggml_mobe")
        values = recipe.definitions() | {
            "GGML_MOBE_DIR": str(work / "ggml_mobe"),
            "LLAMA_SANITIZE_ADDRESS": "ON",
            "GGML_SANITIZE_ADDRESS": "ON",
            "GGML_RPC": "OFF",
            "CMAKE_CXX_FLAGS_RELEASE": "-O1 -g1",
            "CMAKE_C_FLAGS_RELEASE": "-O1 -g1",
        }
        compiling.configure(tree / "vendor" / "llama.cpp", work / "build", values, env, log, lock)
        compiling.compile_targets(work / "build", ["llama", "mtmd"], jobs, env, log, lock)
    return work / "build" / "bin"


def cases(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        ready = []
        for name, file in whole().items():
            path = file.write(Path(folder) / "whole.gguf")
            end = min(tensor.offset for tensor in read_gguf(path).tensors.values())
            ready.append((name, path.read_bytes(), end))
    for name, content, _ in ready:
        yield f"{name}, whole", content
    for i in range(count):
        name, content, end = ready[i % len(ready)]
        yield f"{name}, change {i}", damaged(content, end, rng)


def asserted(outcome: Outcome) -> bool:
    """Whether llama.cpp stopped by itself, at a check of its own: so it treats some impossible hyper-parameters.  Plain
    assertions, as that a product is finite, are only in builds like this one."""
    found = re.search(r"(\S+):\d+: (?:GGML_ASSERT|.*Assertion .* failed)", outcome.stderr, re.DOTALL)
    return outcome.signal == "SIGABRT" and found is not None and "mobe" not in Path(found[1]).name


def fault_of(outcome: Outcome) -> str | None:
    """Why this is not how a file should be loaded or refused."""
    if "AddressSanitizer" in outcome.stderr:
        at = outcome.stderr.index("AddressSanitizer")
        return outcome.stderr[at : at + 1500]
    if outcome.signal == "SIGALRM":
        return "it took too long"
    if asserted(outcome):
        return None
    if outcome.signal is not None:
        return f"{outcome.signal}\n{outcome.stderr[-800:]}"
    return None


def library(name: str) -> str:
    """Path of one of the compiler's own libraries."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", "-j", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--installed",
        action="store_true",
        help="the installed runtime, without AddressSanitizer: crashes alone are seen",
    )
    parser.add_argument("--keep", type=Path, help="put files at fault here")
    options = parser.parse_args()
    libraries = runtime.lib_dir() if options.installed else sanitized(options.jobs)
    if not options.installed:
        # Python is not sanitized, so the runtime has to be there before it, and what throws has to be there before that looks
        os.environ["LD_PRELOAD"] = f"{library('libasan.so')} {library('libstdc++.so.6')}"
        # a size that no memory has is an ordinary failure
        os.environ["ASAN_OPTIONS"] = (
            "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1:max_allocation_size_mb=4096"
        )
    outcomes: Counter[str] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as folder, Loader(libraries, files=64) as loader:
        os.environ.pop("LD_PRELOAD", None)
        path = Path(folder) / "case.gguf"
        with bar("damaged files", options.count) as progress:
            for name, content in cases(options.count, options.seed):
                path.write_bytes(content)
                fault = reader_fault(path)
                outcome = loader.load(path)
                fault = fault or fault_of(outcome)
                if name.endswith("whole") and not outcome.loaded:
                    fault = fault or f"a whole file was refused: {outcome.errors}"
                stopped = "stopped by an assertion of llama.cpp" if asserted(outcome) else "refused"
                outcomes["fault" if fault else "loaded" if outcome.loaded else stopped] += 1
                if fault:
                    faults += 1
                    console.print(f"{name}: {fault}", markup=False, highlight=False)
                    if options.keep:
                        options.keep.mkdir(parents=True, exist_ok=True)
                        shutil.copy(path, options.keep / f"{name.replace(', ', '-').replace(' ', '-')}.gguf")
                progress.advance(1)
    print(", ".join(f"{count} {what}" for what, count in outcomes.most_common()))
    return 1 if faults else 0


def reader_fault(path: Path) -> str | None:
    """Anything but an answer, or the error that users see, from our own reader."""
    try:
        verify(path, quiet=True)
    except MobeError:
        return None
    except Exception as e:
        return f"our reader: {type(e).__name__}: {e}"
    return None


if __name__ == "__main__":
    run_program(main)
