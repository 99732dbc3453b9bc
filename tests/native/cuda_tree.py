"""Where the CUDA tests find what they compile against: nvcc or its headers, and the patched llama.cpp's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mobe_gguf.core import resources
from mobe_gguf.runtime import source

KERNELS = resources.path("native") / "ggml_mobe"


def toolkit() -> Path:
    """The CUDA toolkit's folder (bin/nvcc, include); skips where there is none."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in homes:
        if home and Path(home, "bin/nvcc").is_file() and Path(home, "include/cuda_runtime_api.h").is_file():
            return Path(home)
    pytest.skip("no CUDA toolkit with nvcc and headers: the CUDA source cannot be compiled")


def ggml() -> Path:
    """``ggml`` of an unpacked runtime source; skips where none was built."""
    found = sorted(source.cache_dir().glob("*/src/vendor/llama.cpp/ggml/src/ggml-cuda/dequantize.cuh"))
    found = [path for path in found if "-stock-" not in str(path)] or found
    if not found:
        pytest.skip("no llama.cpp source in the cache: run mobe-gguf build")
    return found[0].parents[2]
