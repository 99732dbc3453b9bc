"""The operator against truth: torch formula -> C reference -> CPU kernel, through a ggml graph of the built library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formula import combine_groups
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobe_gguf.core import names
from mobe_gguf.core.formula import activate
from mobe_gguf.runtime import ggml

from .ggml_graph import Graph, reference

#: Normalized squared error allowed between two levels.
LIMIT = {
    "formula -> reference": 1e-13,  # the reference sums in double and rounds once to float32 (2^-24 squared: 4e-15)
    "reference -> kernel": 1e-11,  # float32 sums of d terms; tanh to 5e-7
    # coefficients of 8 bits, in a prompt formed rows and inputs too, tanh to 1.1e-4: 4e-5 to 1.4e-4 found
    "reference -> kernel, quantized": 4e-4,
}


def nmse(truth: np.ndarray, got: np.ndarray) -> float:
    assert np.isfinite(got).all()
    truth = truth.astype(np.float64)
    return float(((got - truth) ** 2).sum() / max((truth**2).sum(), 1e-300))


def formula(basis, mix, x, ids, n_group: int, activation: str) -> np.ndarray:
    """z [T, k, r] in float64, straight from the definition."""
    basis, mix, x = (torch.from_numpy(a).double() for a in (basis, mix, x))
    formed = activate(combine_groups(mix, basis, n_group), activation)  # [n, r, d]
    chosen = formed[torch.from_numpy(ids).long()]  # [T, k, r, d]
    return torch.einsum("tkrd,tkd->tkr", chosen, x.expand(-1, ids.shape[1], -1)).numpy()


def operands(rng, d, r, m, n, k, t, n_group=1, row_mix=False, x_experts=1, terms=None):
    """Random operands; ``terms`` keeps that many non-zero coefficients an expert."""
    basis = rng.standard_normal((m, r, d), dtype=np.float32)
    mix = rng.standard_normal((n, m // n_group, r) if row_mix else (n, m // n_group), dtype=np.float32)
    if terms is not None:
        for row in mix:
            row[rng.permutation(m // n_group)[terms:]] = 0
    x = rng.standard_normal((t, x_experts, d), dtype=np.float32) / np.float32(d**0.5)
    ids = np.stack([rng.permutation(n)[:k] for _ in range(t)]).astype(np.int32)
    return basis, mix, x, ids


def check(rng, basis_type, activation, n_group, operands, n_threads=2):
    basis, mix, x, ids = operands
    m, r, d = basis.shape
    data = ggml.quantize(basis.reshape(m * r, d), basis_type)
    basis = ggml.dequantize(data, basis_type, d).reshape(m, r, d)

    ref = reference(basis, mix, x, ids, activation)
    assert nmse(formula(basis, mix, x, ids, n_group, activation), ref) < LIMIT["formula -> reference"]

    z = Graph(basis_type, data, (m, r, d), mix, x, ids, activation).compute(n_threads)
    quantized = ", quantized" if ggml.type_info(basis_type).quantized else ""
    assert nmse(ref, z) < LIMIT["reference -> kernel" + quantized]
    return z


@pytest.mark.parametrize("activation", names.ACTIVATIONS)
@pytest.mark.parametrize("n_group", [1, 2])
@pytest.mark.parametrize("row_mix", [False, True], ids=["scalar", "row"])
@pytest.mark.parametrize("n_tokens", [1, 2, 33, 512])
def test_grid(activation, n_group, row_mix, n_tokens):
    rng = np.random.default_rng(0)
    ops = operands(
        rng,
        d=64 if n_tokens == 512 else 288,
        r=9,
        m=4,
        n=12,
        k=3,
        t=n_tokens,
        n_group=n_group,
        row_mix=row_mix,
    )
    check(rng, "f32", activation, n_group, ops)


def readable_types() -> list[str]:
    """Every type libggml can both write (without an imatrix) and read back.

    Without two whose search tables take half a minute to make; test-backend-ops has cases of them.
    """
    found = [name for name, t in ggml.types().items() if t.encodes and t.decodes and not t.requires_imatrix]
    return [name for name in found if name not in ("iq2_s", "iq1_m")]


@pytest.mark.parametrize("n_tokens", [1, 33])
def test_every_type(n_tokens):
    rng = np.random.default_rng(1)
    types = readable_types()
    assert {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q6_k", "iq4_xs"} <= set(types)
    for name in types:
        check(rng, name, "tanh", 1, operands(rng, d=512, r=5, m=3, n=8, k=2, t=n_tokens))


@pytest.mark.parametrize("m", [256, 257, 512, 513, 640])
@pytest.mark.parametrize("basis_type", ["q8_0", "q4_1", "q5_1", "q5_k", "iq4_xs"])
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_sums_do_not_overflow(basis_type, m, n_tokens):
    """All bases and coefficients the same, which makes the sums as large as they can be."""
    x = np.random.default_rng(0).standard_normal((n_tokens, 1, 256), dtype=np.float32)
    ids = np.zeros((n_tokens, 1), np.int32)
    for value in (1.0, -1.0):
        basis = np.full((m, 3, 256), value, np.float32)
        check(None, basis_type, "none", 1, (basis, np.ones((2, m), np.float32), x, ids))


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_do_not_change_the_result(n_threads):
    ops = operands(np.random.default_rng(2), d=320, r=13, m=8, n=16, k=4, t=40)
    one = check(None, "q8_0", "silu", 1, ops, n_threads=1)
    assert np.array_equal(one, check(None, "q8_0", "silu", 1, ops, n_threads=n_threads))


@pytest.mark.parametrize("n_tokens", [1, 5, 70])
@pytest.mark.parametrize("row_mix", [False, True], ids=["scalar", "row"])
@pytest.mark.parametrize("basis_type", ["f32", "q5_0"])
def test_each_expert_may_have_its_own_input(n_tokens, row_mix, basis_type):
    """As down has it: decoding, a few tokens, a prompt; more rows than columns."""
    rng = np.random.default_rng(3)
    shape = dict(d=96, r=130, m=4, n=6, k=3, t=n_tokens, n_group=2, x_experts=3)
    check(rng, basis_type, "tanh", 2, operands(rng, **shape, row_mix=row_mix))


@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_bases_with_zero_coefficients_are_not_read(terms, n_tokens):
    """NaN in bases that nobody mixes must not reach the result."""
    rng = np.random.default_rng(4)
    basis, mix, x, ids = operands(rng, d=256, r=6, m=8, n=5, k=2, t=n_tokens, terms=terms)
    used = (mix[np.unique(ids)] != 0).any(0)
    basis[~used] = np.nan
    z = Graph("f32", basis, basis.shape, mix, x, ids, "silu").compute()
    assert nmse(formula(np.nan_to_num(basis), mix, x, ids, 1, "silu"), z) < LIMIT["reference -> kernel"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_shape(data):
    n_group = data.draw(st.sampled_from([1, 1, 2, 3]))
    n = n_group * data.draw(st.integers(2 if n_group == 1 else 1, 9))
    k = data.draw(st.integers(1, n))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ops = operands(
        rng,
        d=data.draw(st.integers(1, 600)),
        r=data.draw(st.integers(1, 12)),
        m=n_group * data.draw(st.integers(1, 6)),
        n=n,
        k=k,
        t=data.draw(st.integers(1, 40)),
        n_group=n_group,
        row_mix=data.draw(st.booleans()),
        x_experts=data.draw(st.sampled_from([1, k])),
    )
    check(
        rng,
        "f32",
        data.draw(st.sampled_from(names.ACTIVATIONS)),
        n_group,
        ops,
        n_threads=data.draw(st.integers(1, 3)),
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (dict(mix=(6, 3)), "groups of mix's size"),
        (dict(mix=(5, 2)), "experts do not divide"),
        (dict(mix=(6, 4, 7)), "row-wise mix"),
        (dict(x=(2, 1, 96)), "as long as a row"),
        (dict(x=(2, 3, 64)), "1 or k"),
        (dict(x=(3, 1, 64)), "1 or k"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, fault):
    shapes = dict(basis=(4, 8, 64), mix=(6, 4), x=(2, 1, 64), ids=(2, 2)) | change
    arrays = {k: np.zeros(v, np.int32 if k == "ids" else np.float32) for k, v in shapes.items()}
    graph = Graph("f32", arrays["basis"], shapes["basis"], arrays["mix"], arrays["x"], arrays["ids"], "tanh")
    assert fault in graph.fault()


def test_supports_op_takes_what_it_computes():
    rng = np.random.default_rng(5)
    basis, mix, x, ids = operands(rng, d=256, r=4, m=4, n=6, k=3, t=5)
    for name in readable_types():
        assert Graph(name, basis, basis.shape, mix, x, ids, "tanh").supported(), name
    assert not Graph("i8", basis, basis.shape, mix, x, ids, "tanh").supported()
