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

SHIM, STUB = Path(__file__).with_name("cuda_shim"), Path(__file__).with_name("cuda_stub")

#: The shim's numbers of the kernels, and the normalized squared error allowed.
PLAIN, DECODE, DECODE_WRITTEN, DECODE_MANY, FORM, PROMPT = 0, 1, 2, 4, 5, 6
LIMIT = {
    PLAIN: 1e-11,  # float32 sums
    # bases rounded to f16, and for q4_k scale and minimum as well: 2^-12 each. Found up to 2e-6; few results may by chance be
    # small beside what they are sums of
    DECODE: 5e-6,
    DECODE_WRITTEN: 5e-6,
    DECODE_MANY: 5e-6,
    FORM: 5e-6,
    PROMPT: 5e-6,
}

#: Shared memory that a block can have, by compute capability: room for 4, 3 and 2 slots of a warp's ring.
H100, A100, RTX_3090 = 227 * 1024, 163 * 1024, 99 * 1024

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
        "nvfp4",
        "q1_0",
        "q2_0",
    ]
    TYPES += ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"]

#: What the kernels' source says for the compiler of CUDA only, and what stands there for the shim.
REPLACED = {
    "mobe-cuda-combine.cuh": {
        "extern __shared__ __align__(16) char shared[];": "char * const shared = shim_shared;",
        "ggml_cuda_kernel_launch(mobe_combine<type, NT, FORM>, "
        "ggml_cuda_kernel_launch_params(grid, 32*MOBE_WARPS, shared, stream), a);": (
            "GGML_ASSERT(shared <= sizeof(shim_shared));"
            "shim_launch(grid, 32*MOBE_WARPS, [&] { mobe_combine<type, NT, FORM>(a); });"
        ),
    },
    "mobe-cuda-plain.cuh": {
        "mobe_proj_plain<TYPE><<<grid, MOBE_PLAIN_THREADS, 0, stream>>>(a);": (
            "shim_launch(grid, MOBE_PLAIN_THREADS, [&] { mobe_proj_plain<TYPE>(a); });"
        ),
    },
    "mobe-cuda-prompt.cu": {
        "mobe_gather_x<<<dim3(n_column, (a.d + 511)/512), 256, 0, stream>>>(a, uses, x16.get());": (
            "shim_launch(dim3(n_column, (a.d + 511)/512), 256, [&] { mobe_gather_x(a, uses, x16.get()); });"
        ),
        "mobe_scatter_z<<<dim3(n_column, (a.r + 255)/256), 256, 0, stream>>>(a, uses, sorted.get());": (
            "shim_launch(dim3(n_column, (a.r + 255)/256), 256, [&] { mobe_scatter_z(a, uses, sorted.get()); });"
        ),
        "#define MOBE_FORMED_BYTES (512ll*1024*1024)": "#define MOBE_FORMED_BYTES 1ll",  # 32 experts at a time
    },
    "mobe-cuda-prompt.cuh": {},
    "mobe-cuda-mix.cuh": {},
    "mobe-cuda-read.cuh": {},
    "mobe-cuda-ring.cuh": {},
}

ffi = cffi.FFI()
ffi.cdef("""
int mobe_shim(int kernel, int type, const char * basis, int64_t row_bytes, const float * mix, const float * x,
    int64_t x_slot, int64_t x_token, const int32_t * ids, int64_t ids_token, void * out,
    int d, int r, int m, int m_group, int n, int k, int n_use, int row_mix, int activation, int n_sm, int64_t shared);
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
    folders = [work, STUB, cuda_tree.KERNELS, tree / "include", tree / "src", toolkit / "include"]
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
    shim, kernel: int, basis_type: str, data: np.ndarray, shape, mix, x, ids, activation: str, shared: int
) -> np.ndarray:
    """z [T, k, r], or for FORM the combinations [T, k, r, d]; shapes as in test_operator, shared memory in bytes."""
    m, r, d = shape
    t, k = ids.shape
    padded = np.full((t, k + 3), -1, np.int32)  # a router's choice is a view into longer rows
    padded[:, :k] = ids
    t, each, _ = x.shape  # and the input one into other rows
    rows = np.full((t, each + 1, d + 8), np.nan, np.float32)
    rows[:, :each, :d] = x
    out = (
        np.full((t, k, r, d), np.nan, np.float16)
        if kernel == FORM
        else np.full((t, k, r), np.nan, np.float32)
    )
    data, mix = (np.ascontiguousarray(a) for a in (data, mix))
    known = shim.mobe_shim(
        kernel, ggml.type_info(basis_type).id, pointer(data, "char *"), data.nbytes // (m * r),
        pointer(mix, "float *"), pointer(rows, "float *"), 0 if each == 1 else d + 8, (each + 1) * (d + 8),
        pointer(padded, "int32_t *"), k + 3, pointer(out, "void *"),
        d, r, m, mix.shape[1], mix.shape[0], k, t * k, mix.ndim == 3, names.ACTIVATIONS.index(activation), 1, shared,
    )  # fmt: skip
    assert known, f"the shim was compiled without {basis_type}"
    return out


def check(shim, kernel, basis_type, activation, n_group, operands, shared=H100, spoil=None):
    """``spoil``: a basis that is overwritten with NaNs in the kernel's copy."""
    basis, mix, x, ids = operands
    m, r, d = basis.shape
    importance = np.ones(d, np.float32) if ggml.type_info(basis_type).requires_imatrix else None
    data = ggml.quantize(basis.reshape(m * r, d), basis_type, importance)
    basis = ggml.dequantize(data, basis_type, d).reshape(m, r, d)
    if spoil is not None:
        data = data.copy()
        data.reshape(m, -1)[spoil] = 0xFF
    got = run(shim, kernel, basis_type, data, (m, r, d), mix, x, ids, activation, shared)
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


@pytest.mark.parametrize("shared", [H100, A100, RTX_3090], ids=["4 slots", "3 slots", "2 slots"])
@pytest.mark.parametrize("row_mix", [False, True], ids=["scalar", "rows"])
def test_ring(shim, shared, row_mix):
    """More and fewer blocks than slots and warps, a basis that nobody mixes (copied before that is known), no basis at all."""
    rng = np.random.default_rng(0)
    shape = dict(r=9, n=6, k=2, t=1, row_mix=row_mix)
    check(shim, DECODE, "q4_k", "tanh", 1, operands(rng, d=768, m=16, **shape), shared)
    basis, mix, x, ids = operands(rng, d=2304, m=40, **shape)
    check(shim, DECODE, "q4_k", "silu", 1, (basis, mix, x, ids), shared)
    check(shim, DECODE_WRITTEN, "q4_k", "silu", 1, (basis, mix, x, ids), shared)
    mix[:, 3] = 0
    check(shim, DECODE, "q4_k", "tanh", 1, (basis, mix, x, ids), shared, spoil=3)
    mix[:] = 0
    check(shim, DECODE, "q4_k", "none", 1, (basis, mix, x, ids), shared)


@pytest.mark.parametrize("row_mix", [False, True], ids=["scalar", "rows"])
@pytest.mark.parametrize("own_x", [False, True], ids=["x of the token", "x of the use"])
@pytest.mark.parametrize(("k", "t", "together"), [(3, 25, False), (24, 12, True)])
def test_prompt(shim, row_mix, own_x, k, t, together):
    """What the host does about it, too: uses in order of their experts, multiplied one by one or all at once, in batches."""
    rng = np.random.default_rng(1)
    shape = dict(r=5, m=6, n=48, k=k, t=t, n_group=2, row_mix=row_mix, x_experts=k if own_x else 1)
    given = operands(rng, d=288, **shape)
    counts = np.bincount(given[3].flat)
    assert counts.astype(bool).sum() > 32, "more experts than are formed at a time"
    assert (counts.astype(bool).sum() * counts.max() <= 2 * k * t) == together
    check(shim, PROMPT, "q8_0", "tanh", 2, given)
    check(shim, PROMPT, "q4_k", "silu", 2, operands(rng, d=512, **shape))


def test_as_many_bases_as_supported(shim):
    """On the smallest device that has the kernel, they leave room for two slots."""
    rng = np.random.default_rng(3)
    check(shim, DECODE, "q4_k", "tanh", 1, operands(rng, d=256, r=1, m=1024, n=3, k=2, t=1), RTX_3090)
