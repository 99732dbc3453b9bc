"""The CUDA sources compile: nvcc alone, no linking, against the patched llama.cpp's headers, a few types each (20 s of one core)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from . import cuda_tree

STUB = Path(__file__).with_name("cuda_stub")


@pytest.mark.parametrize(("source", "arch"), [("mobe-cuda.cu", 90), ("mobe-cuda-prompt.cu", 80)])
def test_compiles_without_warnings(tmp_path: Path, source: str, arch: int):
    toolkit, tree = cuda_tree.toolkit(), cuda_tree.ggml()
    folders = [cuda_tree.KERNELS, tree / "include", tree / "src", tree / "src/ggml-cuda"]
    if not (toolkit / "include/cublas_v2.h").is_file():
        folders.append(STUB)
    done = subprocess.run(
        # ggml-cuda's own flags; MOBE_CUDA_FEW_TYPES keeps four types, one of each way to read them
        [toolkit / "bin/nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-use_fast_math", "-extended-lambda"]
        + ["-DMOBE_CUDA_FEW_TYPES", "-Werror", "all-warnings", "-Xptxas", "-v"]
        + [
            *(f"-I{folder}" for folder in folders),
            "-c",
            cuda_tree.KERNELS / source,
            "-o",
            tmp_path / "out.o",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stdout)]
    assert spills, "ptxas reports no kernel"
    # seen: 72 bytes (iq4_xs on sm_80), 28 for q4_k; an array that went to memory shows as hundreds
    assert max(spills) <= 128, (
        f"a kernel keeps {max(spills)} bytes of registers in memory: see nvcc -Xptxas -v"
    )
