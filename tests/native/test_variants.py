"""The CPU kernels compiled for each instruction set that they have code for, run here or in an emulator, against plain sums."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from .standalone import build


@pytest.fixture(scope="module")
def ggml() -> Path:
    found = build.tree()
    if found is None:
        pytest.skip("no patched llama.cpp source in the cache: run mobe-gguf build")
    return found


def check(program: build.Program, whole: bool = False) -> None:
    done = program.run(whole)
    assert done.returncode == 0 and "all good" in done.stdout, (done.stdout + done.stderr)[-3000:]


def flags_here(name: str) -> str:
    """Those of a variant; the test is skipped where they cannot run."""
    flags, needed = build.VARIANTS[name]
    if platform.machine() != "x86_64" or shutil.which("gcc") is None:
        pytest.skip("needs gcc on x86-64")
    have = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    missing = [feature for feature in needed.split() if feature not in have]
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    return flags


@pytest.mark.parametrize("name", build.VARIANTS)
def test_x86(ggml, tmp_path, name):
    build.compile_program(ggml, tmp_path / "operator", f"-O3 {flags_here(name)}")
    check(build.Program(tmp_path / "operator"))


#: Types that mobe-rows16.c multiplies: none without AVX2, and tq1_0 where bytes are looked up in 128.
ROWS16 = {"sse42": 0, "haswell": 3, "icelake": 4}


@pytest.mark.parametrize("name", ROWS16)
def test_rows16(ggml, tmp_path, name):
    build.compile_program(ggml, tmp_path / "rows16", f"-O2 {flags_here(name)}", program="rows16")
    done = build.Program(tmp_path / "rows16").run()
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert f"all good, {ROWS16[name]} types" in done.stdout


def test_every_case_here(ggml, tmp_path):
    """With the flags of the installed library: compilers choose other instructions at -O3."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    build.compile_program(ggml, tmp_path / "operator", "-O3 -march=native")
    check(build.Program(tmp_path / "operator"), whole=True)


@pytest.mark.parametrize("flags", ["", "-march=armv8.2-a+dotprod"], ids=["neon", "dotprod"])
def test_aarch64(ggml, tmp_path, flags):
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip(
            "needs aarch64-linux-gnu-gcc and qemu-user: apt install gcc-aarch64-linux-gnu qemu-user-static"
        )
    build.compile_program(ggml, tmp_path / "operator", f"-O3 -static {flags}", compiler)
    check(build.Program(tmp_path / "operator", (emulator,)))
