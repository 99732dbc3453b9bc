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

from mobe_gguf.core import names
from mobe_gguf.runtime import ggml

from . import cuda_tree
from .ggml_graph import Graph, library, reference
from .test_operator import nmse, operands

SHIM, STUB = Path(__file__).with_name("cuda_shim"), Path(__file__).with_name("cuda_stub")

#: The ways through the operator, in the order of mobe_path (mobe-cuda.cu), and the normalized squared error allowed.
LIMIT = {
    "plain": 1e-11,  # float32 sums
    # bases rounded to f16, and for q4_k scale and minimum as well: 2^-12 each. Found up to 2e-6; few results may by chance be
    # small beside what they are sums of
    "decode": 5e-6,
    "prompt": 5e-6,
}
WAYS = list(LIMIT)

#: Compute capability, and shared memory that a block can have: for decoding, room for 4, 3 and 2 slots of a warp's ring.
H100, A100, RTX_3090 = (900, 227 * 1024), (800, 163 * 1024), (860, 99 * 1024)
RTX_2080 = (750, 64 * 1024)

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
    "mobe-cuda.cu": {
        "static const char * const asked = [": "const char * const asked = [",
        'getenv("GGML_CUDA_MOBE")': "shim_way",
    },
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
ffi.cdef("int mobe_shim(void * dst, const char * way, int cc, int64_t shared);")


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


def check(
    shim,
    way,
    basis_type,
    activation,
    n_group,
    operands,
    device=H100,
    *,
    expect=None,
    spoil=None,
    basis_is_view=False,
):
    """``spoil``: a basis that is overwritten with NaNs in the kernel's copy; ``expect``: the way that "auto" takes."""
    basis, mix, x, ids = operands
    m, r, d = basis.shape
    importance = np.ones(d, np.float32) if ggml.type_info(basis_type).requires_imatrix else None
    data = ggml.quantize(basis.reshape(m * r, d), basis_type, importance)
    basis = ggml.dequantize(data, basis_type, d).reshape(m, r, d)
    if spoil is not None:
        data = data.copy()
        data.reshape(m, -1)[spoil] = 0xFF
    graph = Graph(basis_type, data, (m, r, d), mix, x, ids, activation, basis_is_view=basis_is_view)
    taken = []
    z = graph.compute(
        1, lambda node: taken.append(shim.mobe_shim(node, way.encode(), *device)) or taken[0] >= 0
    )
    assert WAYS[taken[0]] == (expect or way)
    error = nmse(reference(basis, mix, x, ids, activation), z)
    assert error < LIMIT[WAYS[taken[0]]], f"{error:.2e}"


@pytest.mark.parametrize("n_tokens", [2, 7], ids=["tiles of 8 uses", "of 32"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("basis_type", TYPES)
def test_types(shim, way, basis_type, n_tokens):
    rng = np.random.default_rng(1)
    check(shim, way, basis_type, "tanh", 1, operands(rng, d=512, r=3, m=5, n=16, k=4, t=n_tokens))


@pytest.mark.parametrize("n_tokens", [4, 9], ids=["tiles of 8 uses", "of 32"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row_mix", [False, True], ids=["scalar", "rows"])
@pytest.mark.parametrize("activation", names.ACTIVATIONS)
def test_forms(shim, way, activation, row_mix, n_tokens):
    """Groups, sparse coefficients, an input for each expert, more bases than a fragment, more rows than a block keeps."""
    rng = np.random.default_rng(2)
    shape = dict(d=256, r=19, m=40, n=8, k=3, t=n_tokens, n_group=2, row_mix=row_mix, x_experts=3, terms=9)
    check(shim, way, "q4_k", activation, 2, operands(rng, **shape))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("d", [32, 96, 288, 416])
def test_rows_that_end_inside_a_stretch(shim, way, d):
    rng = np.random.default_rng(d)
    check(shim, way, "q8_0", "silu", 1, operands(rng, d=d, r=2, m=3, n=7, k=7, t=1))
    check(shim, way, "f16", "silu", 1, operands(rng, d=d, r=1, m=1, n=9, k=9, t=4))


@pytest.mark.parametrize("device", [H100, A100, RTX_3090], ids=["4 slots", "3 slots", "2 slots"])
@pytest.mark.parametrize("row_mix", [False, True], ids=["scalar", "rows"])
def test_ring(shim, device, row_mix):
    """More and fewer blocks than slots and warps, a basis that nobody mixes (copied before that is known), no basis at all."""
    rng = np.random.default_rng(0)
    shape = dict(r=9, n=6, k=2, t=1, row_mix=row_mix)
    check(shim, "decode", "q4_k", "tanh", 1, operands(rng, d=768, m=16, **shape), device)
    basis, mix, x, ids = operands(rng, d=2304, m=40, **shape)
    check(shim, "decode", "q4_k", "silu", 1, (basis, mix, x, ids), device)
    check(shim, "decode", "q4_k", "silu", 1, (basis, mix, x, ids), device, basis_is_view=True)
    mix[:, 3] = 0
    check(shim, "decode", "q4_k", "tanh", 1, (basis, mix, x, ids), device, spoil=3)
    mix[:] = 0
    check(shim, "decode", "q4_k", "none", 1, (basis, mix, x, ids), device)


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
    check(shim, "prompt", "q8_0", "tanh", 2, given)
    check(shim, "prompt", "q4_k", "silu", 2, operands(rng, d=512, **shape))


def test_as_many_bases_as_supported(shim):
    """On the smallest device that has the kernel, they leave room for two slots."""
    rng = np.random.default_rng(3)
    given = operands(rng, d=256, r=1, m=1024, n=3, k=2, t=1)
    check(shim, "decode", "q4_k", "tanh", 1, given, RTX_3090)
    check(shim, "prompt", "q4_k", "tanh", 1, given, RTX_3090, expect="decode")


@pytest.mark.parametrize(
    ("n_tokens", "device", "way"),
    [
        (1, H100, "decode"),
        (11, H100, "decode"),
        (12, H100, "prompt"),
        (12, A100, "prompt"),
        (12, RTX_2080, "plain"),
    ],
)
def test_way_that_is_chosen(shim, n_tokens, device, way):
    """Experts are formed once where each has four uses."""
    rng = np.random.default_rng(4)
    check(
        shim,
        "auto",
        "q8_0",
        "tanh",
        1,
        operands(rng, d=64, r=2, m=3, n=6, k=2, t=n_tokens),
        device,
        expect=way,
    )


@pytest.mark.parametrize(
    ("change", "way"),
    [
        ({}, None),  # not asked for: it has not run on a GPU
        ({}, b"prompts"),
        ({"basis_type": "tq1_0"}, b"auto"),
        ({"d": 48}, b"auto"),
        ({"m": 1025}, b"auto"),
    ],
    ids=["not asked for", "not a way", "type", "row of half a unit", "bases"],
)
def test_what_is_left_to_the_cpu(shim, change, way):
    shape = dict(d=256, r=2, m=3, n=4, k=2, t=1) | {
        name: n for name, n in change.items() if name != "basis_type"
    }
    basis, mix, x, ids = operands(np.random.default_rng(5), **shape)
    basis_type = change.get("basis_type", "f16")
    data = ggml.quantize(basis.reshape(-1, basis.shape[2]), basis_type)
    graph = Graph(basis_type, data, basis.shape, mix, x, ids, "tanh")
    seen = []
    graph.compute(1, lambda node: seen.append(shim.mobe_shim(node, way or ffi.NULL, *H100)) or True)
    assert seen == [-1]
