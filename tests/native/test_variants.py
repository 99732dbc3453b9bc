"""The CPU kernel compiled for each instruction set that it has code for, run here or in an emulator, against its reference."""

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


@pytest.mark.parametrize("name", build.VARIANTS)
def test_x86(ggml, tmp_path, name):
    flags, needed = build.VARIANTS[name]
    if platform.machine() != "x86_64" or shutil.which("gcc") is None:
        pytest.skip("needs gcc on x86-64")
    have = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    missing = [feature for feature in needed.split() if feature not in have]
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    build.compile_program(ggml, tmp_path / "operator", f"-O3 {flags}")
    check(build.Program(tmp_path / "operator"))


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
