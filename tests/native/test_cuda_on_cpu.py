"""The CUDA kernels' own source, run by a C++ compiler's fibers (cuda_shim), against the operator's formula.

What this shows without a GPU: indices, dequantization, fragments, zero terms, groups, ragged sizes.  What it
cannot: races, the speed, and the approximate tanh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cffi
import numpy as np
import pytest
import torch

from mobe_gguf import names
from mobe_gguf.formula import activate, combine_groups
from mobe_gguf.runtime import ggml

from . import cuda_tree
from .ggml_graph import library, pointer, reference
from .test_operator import nmse, operands

SHIM = Path(__file__).with_name("cuda_shim")

#: The shim's numbers of the kernels, and the normalized squared error allowed.
PLAIN, DECODE, DECODE_MANY, FORM = 0, 1, 4, 5
LIMIT = {
    PLAIN: 1e-11,  # float32 sums
    DECODE: 2e-6,  # bases rounded to f16, and for q4_k scale and minimum as well: 2^-12 each
    DECODE_MANY: 2e-6,
    FORM: 2e-6,
}

#: Compiled and run; with MOBE_CUDA_ALL_TYPES=1 in the environment (a minute or two) all that the kernels know.
ALL_TYPES = bool(os.environ.get("MOBE_CUDA_ALL_TYPES"))
TYPES = ["f16", "q8_0", "q4_k", "iq4_xs"]
if ALL_TYPES:
    TYPES += [
        "f32",
        "bf16",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q2_k",
        "q3_k",
        "q5_k",
        "q6_k",
        "iq4_nl",
        "mxfp4",
    ]
    TYPES += ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"]

#: What the kernels' source says for the compiler of CUDA only, and what stands there for the shim.
REPLACED = {
    "mobe-cuda-combine.cuh": {
        "extern __shared__ __align__(16) char shared[];": "char * const shared = shim_shared;",
        "mobe_combine<type, NT, FORM><<<dim3(tiles, runs), 32*MOBE_WARPS, mobe_combine_shared<NT>(a.m), stream>>>(a);": (
            "GGML_ASSERT(mobe_combine_shared<NT>(a.m) <= sizeof(char[48*1024]));"
            "shim_launch(dim3(tiles, runs), 32*MOBE_WARPS, [&] { mobe_combine<type, NT, FORM>(a); });"
        ),
    },
    "mobe-cuda-plain.cuh": {
        "mobe_proj_plain<TYPE><<<grid, MOBE_PLAIN_THREADS, 0, stream>>>(a);": (
            "shim_launch(grid, MOBE_PLAIN_THREADS, [&] { mobe_proj_plain<TYPE>(a); });"
        ),
    },
    "mobe-cuda-read.cuh": {},
}

ffi = cffi.FFI()
ffi.cdef("""
int mobe_shim(int kernel, int type, const char * basis, int64_t row_bytes, const float * mix, const float * x,
    int64_t x_slot, int64_t x_token, const int32_t * ids, int64_t ids_token, void * out,
    int d, int r, int m, int m_group, int n, int k, int n_use, int row_mix, int activation, int n_sm);
""")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    toolkit, tree = cuda_tree.toolkit(), cuda_tree.ggml()
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("g++ is not installed")
    work = tmp_path_factory.mktemp("shim")
    for name, replaced in REPLACED.items():
        text = (cuda_tree.KERNELS / name).read_text()
        for old, new in replaced.items():
            assert text.count(old) == 1, f"{name} no longer says {old!r}: change REPLACED with it"
            text = text.replace(old, new)
        (work / name).write_text(text)
    for path in [
        *SHIM.iterdir(),
        *(tree / "src/ggml-cuda" / name for name in ("dequantize.cuh", "convert.cuh")),
    ]:
        shutil.copy(path, work)
    folders = [work, cuda_tree.KERNELS, tree / "include", tree / "src", toolkit / "include"]
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-w",
            "-shared",
            "-fPIC",
            *(() if ALL_TYPES else ("-DMOBE_CUDA_FEW_TYPES",)),
        ]
        + [*(f"-I{f}" for f in folders)]
        + [str(work / "shim.cpp"), "-o", str(work / "shim.so")],
        check=True,
    )
    library()  # libggml-base, whose symbols the shim uses, is loaded with it
    return ffi.dlopen(str(work / "shim.so"))


def run(
    shim, kernel: int, basis_type: str, data: np.ndarray, shape, mix, x, ids, activation: str
) -> np.ndarray:
    """z [T, k, r], or for FORM the combinations [T, k, r, d]; shapes as in test_operator."""
    m, r, d = shape
    t, k = ids.shape
    padded = np.full((t, k + 3), -1, np.int32)  # a router's choice is a view into longer rows
    padded[:, :k] = ids
    out = (
        np.full((t, k, r, d), np.nan, np.float16)
        if kernel == FORM
        else np.full((t, k, r), np.nan, np.float32)
    )
    data, x, mix = (np.ascontiguousarray(a) for a in (data, x, mix))
    known = shim.mobe_shim(
        kernel, ggml.type_info(basis_type).id, pointer(data, "char *"), data.nbytes // (m * r),
        pointer(mix, "float *"), pointer(x, "float *"), 0 if x.shape[1] == 1 else d, x.shape[1] * d,
        pointer(padded, "int32_t *"), k + 3, pointer(out, "void *"),
        d, r, m, mix.shape[1], mix.shape[0], k, t * k, mix.ndim == 3, names.ACTIVATIONS.index(activation), 1,
    )  # fmt: skip
    assert known, f"the shim was compiled without {basis_type}"
    return out


def check(shim, kernel, basis_type, activation, n_group, operands):
    basis, mix, x, ids = operands
    m, r, d = basis.shape
    importance = np.ones(d, np.float32) if ggml.type_info(basis_type).requires_imatrix else None
    data = ggml.quantize(basis.reshape(m * r, d), basis_type, importance)
    basis = ggml.dequantize(data, basis_type, d).reshape(m, r, d)
    got = run(shim, kernel, basis_type, data, (m, r, d), mix, x, ids, activation)
    if kernel == FORM:
        formed = activate(
            combine_groups(torch.from_numpy(mix).double(), torch.from_numpy(basis).double(), n_group),
            activation,
        )
        truth = formed[torch.from_numpy(ids).long()].numpy()
    else:
        truth = reference(basis, mix, x, ids, activation)
    error = nmse(truth, got)
    assert error < LIMIT[kernel], f"{error:.2e}"


@pytest.mark.parametrize(
    "kernel", [PLAIN, DECODE, DECODE_MANY, FORM], ids=["plain", "decode", "many", "form"]
)
@pytest.mark.parametrize("basis_type", TYPES)
def test_types(shim, kernel, basis_type):
    rng = np.random.default_rng(1)
    check(shim, kernel, basis_type, "tanh", 1, operands(rng, d=512, r=3, m=5, n=16, k=4, t=3))


@pytest.mark.parametrize(
    "kernel", [PLAIN, DECODE, DECODE_MANY, FORM], ids=["plain", "decode", "many", "form"]
)
@pytest.mark.parametrize("row_mix", [False, True], ids=["scalar", "rows"])
@pytest.mark.parametrize("activation", names.ACTIVATIONS)
def test_forms(shim, kernel, activation, row_mix):
    """Groups, sparse coefficients, an input for each expert, more bases than a fragment, more rows than a block keeps."""
    rng = np.random.default_rng(2)
    shape = dict(d=256, r=19, m=40, n=8, k=3, t=4, n_group=2, row_mix=row_mix, x_experts=3, terms=9)
    check(shim, kernel, "q4_k", activation, 2, operands(rng, **shape))


@pytest.mark.parametrize(
    "kernel", [PLAIN, DECODE, DECODE_MANY, FORM], ids=["plain", "decode", "many", "form"]
)
@pytest.mark.parametrize("d", [32, 96, 288, 416])
def test_rows_that_end_inside_a_stretch(shim, kernel, d):
    rng = np.random.default_rng(d)
    check(shim, kernel, "q8_0", "silu", 1, operands(rng, d=d, r=2, m=3, n=7, k=7, t=1))
    check(shim, kernel, "f16", "silu", 1, operands(rng, d=d, r=1, m=1, n=9, k=9, t=4))
