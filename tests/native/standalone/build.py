"""Compile and run the CPU kernels as programs of their own (operator.c, rows16.c), for other processors or with sanitizers.

PYTHONPATH=tests python -m native.standalone.build --sanitize     what `make sanitize` runs
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.core import resources
from mobe_gguf.runtime import source

HERE = Path(__file__).parent
KERNELS = resources.path("native") / "ggml_mobe"

#: Flags of ggml's CPU variants that differ in what the kernel does with them, and flags of /proc/cpuinfo that running them takes.
_AVX2 = "-mavx -mavx2 -mfma -mf16c -mbmi2"
_AVX512 = f"{_AVX2} -mavx512f -mavx512cd -mavx512vl -mavx512dq -mavx512bw"
VARIANTS = {
    "sse42": ("-msse4.2", "sse4_2"),
    "sandybridge": ("-msse4.2 -mavx", "avx"),
    "haswell": (_AVX2, "avx2 fma f16c bmi2"),
    "alderlake": (f"{_AVX2} -mavxvnni", "avx2 fma f16c bmi2 avx_vnni"),
    "skylakex": (_AVX512, "avx512f avx512bw avx512dq avx512vl"),
    "icelake": (f"{_AVX512} -mavx512vbmi -mavx512vnni", "avx512_vnni avx512vbmi"),
}


def tree() -> Path | None:
    """``ggml`` of an unpacked, patched runtime source; None where none was built."""
    found = sorted(source.cache_dir().glob("*/src/vendor/llama.cpp/ggml"), key=lambda p: p.stat().st_mtime)
    found = [
        path for path in found if "-stock-" not in str(path) and "MOBE" in _text(path / "include/ggml.h")
    ]
    return found[-1] if found else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@dataclass(frozen=True)
class Program:
    """What came of compiling: ``path`` to run, with ``before`` in front (an emulator)."""

    path: Path
    before: tuple[str, ...] = ()

    def run(self, whole: bool = False, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """All cases, or a part, with all types among them."""
        command = [*self.before, self.path, *([] if whole else ["few"])]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


#: Program -> the kernels that it runs.
PROGRAMS = {"operator": "mobe-[!r]*.c", "rows16": "mobe-rows16*.c"}


def compile_program(
    ggml: Path, out: Path, flags: str, compiler: str = "gcc", program: str = "operator"
) -> None:
    """Compile a program with its kernels and the two files of ggml that they need.  Raises CalledProcessError."""
    sources = [HERE / f"{program}.c", *sorted(KERNELS.glob(PROGRAMS[program])), KERNELS / "ggml-mobe.c"]
    sources += [ggml / "src/ggml.c", ggml / "src/ggml-quants.c"]
    (out.parent / "ggml-version.h").write_text('#define GGML_VERSION "0"\n#define GGML_COMMIT "0"\n')
    folders = [out.parent, KERNELS, ggml / "include", ggml / "src", ggml / "src/ggml-cpu"]
    command = [compiler, "-std=gnu11", "-D_GNU_SOURCE", "-w", "-ffunction-sections", "-Wl,--gc-sections"]
    command += [*flags.split(), *(f"-I{folder}" for folder in folders), *map(str, sources)]
    subprocess.run([*command, "-o", str(out), "-lm", "-lpthread"], check=True)


SANITIZERS = {
    "ThreadSanitizer": "-fsanitize=thread",
    "AddressSanitizer and UndefinedBehaviorSanitizer": "-fsanitize=address,undefined -fno-sanitize-recover=all",
}


def sanitize() -> int:
    """Build and run with each sanitizer; 0 when all are clean."""
    ggml = tree()
    if ggml is None:
        print("no patched llama.cpp source in the cache: run mobe-gguf build", file=sys.stderr)
        return 1
    if shutil.which("gcc") is None:
        print("gcc is not installed: apt install gcc", file=sys.stderr)
        return 1
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in SANITIZERS.items():
            for program in PROGRAMS:
                print(f"{name}: compiling, then running the cases of {program}", file=sys.stderr)
                path = Path(folder, program)
                compile_program(ggml, path, f"-O1 -g -march=native {flags}", program=program)
                done = Program(path).run(timeout=3600)
                clean = done.returncode == 0
                print(f"{name}, {program}: {'clean' if clean else 'FAILED'}")
                print((done.stdout + done.stderr)[-5000:])
                failed += not clean
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:] != ["--sanitize"]:
        sys.exit(f"usage: {__doc__}")
    sys.exit(sanitize())
