"""The operator with a cache of formed matrices: what it gives does not depend on what the cache holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobe_gguf.core import names
from mobe_gguf.runtime import ggml

from .ggml_graph import F32, I8, I32, cpu_backend, ffi, library, reference
from .test_operator import nmse, operands


class Cached:
    """One node, computed again and again with other inputs and the same cache of ``slots`` matrices."""

    def __init__(
        self, basis_type: str, data: np.ndarray, basis, mix, k: int, activation: str, slots: int, threads=1
    ):
        lib = self.lib = library()
        m, r, d = basis.shape
        self.k, self.r = k, r
        self.ctx = lib.ggml_init([16 * lib.ggml_tensor_overhead(), ffi.NULL, True])
        self.basis = lib.ggml_new_tensor_3d(self.ctx, ggml.types()[basis_type].id, d, r, m)
        if mix.ndim == 3:
            self.mix = lib.ggml_new_tensor_3d(self.ctx, F32, mix.shape[2], mix.shape[1], mix.shape[0])
        else:
            self.mix = lib.ggml_new_tensor_2d(self.ctx, F32, mix.shape[1], mix.shape[0])
        shape = ffi.new("ggml_mobe_shape *", [d, r, m, mix.shape[1], mix.shape[0], k, 1, 1, mix.ndim == 3])
        size = lib.ggml_mobe_cache_size(shape, slots)
        assert lib.ggml_mobe_cache_slots(shape, size) == slots == lib.ggml_mobe_cache_slots(shape, size + 1)
        assert lib.ggml_mobe_cache_slots(shape, size - 1) == slots - 1
        self.cache = lib.ggml_new_tensor_1d(self.ctx, I8, size)
        self.activation = names.ACTIVATIONS.index(activation)
        self.backend = cpu_backend(threads)
        self.buffer = lib.ggml_backend_alloc_ctx_tensors(self.ctx, self.backend)
        lib.ggml_backend_buffer_clear(self.buffer, 0)
        self.put(self.basis, data)
        self.put(self.mix, mix)

    def put(self, tensor, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        assert array.nbytes == self.lib.ggml_nbytes(tensor)
        self.lib.ggml_backend_tensor_set(tensor, ffi.from_buffer(array), 0, array.nbytes)

    def __call__(self, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """z [T, k, r] for x [T, 1|k, d] and ids [T, k]."""
        lib = self.lib
        ctx = lib.ggml_init([16 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead(), ffi.NULL, True])
        tx = lib.ggml_new_tensor_3d(ctx, F32, x.shape[2], x.shape[1], x.shape[0])
        tids = lib.ggml_new_tensor_2d(ctx, I32, ids.shape[1], ids.shape[0])
        out = lib.ggml_mobe_proj_cached(ctx, self.basis, self.mix, tx, tids, self.activation, self.cache)
        graph = lib.ggml_new_graph(ctx)
        lib.ggml_build_forward_expand(graph, out)
        buffer = lib.ggml_backend_alloc_ctx_tensors(ctx, self.backend)
        try:
            self.put(tx, x)
            self.put(tids, ids)
            z = np.full((*ids.shape, self.r), np.nan, np.float32)
            lib.ggml_backend_tensor_set(out, ffi.from_buffer(z), 0, z.nbytes)
            assert lib.ggml_backend_graph_compute(self.backend, graph) == 0
            lib.ggml_backend_tensor_get(out, ffi.from_buffer(z), 0, z.nbytes)
            return z
        finally:
            lib.ggml_backend_buffer_free(buffer)
            lib.ggml_free(ctx)

    def counts(self) -> tuple[int, int]:
        """Lookups and hits so far."""
        head = np.zeros(3, np.uint64)
        self.lib.ggml_backend_tensor_get(self.cache, ffi.from_buffer(head), 0, head.nbytes)
        return int(head[1]), int(head[2])

    def __del__(self):
        self.lib.ggml_backend_buffer_free(self.buffer)
        self.lib.ggml_backend_free(self.backend)
        self.lib.ggml_free(self.ctx)


def least_recently_used(calls: Sequence[np.ndarray], slots: int) -> tuple[int, int]:
    """Lookups and hits that a cache of so many slots has; an expert counts once a call."""
    order: list[int] = []
    lookups = hits = 0
    for ids in calls:
        experts = list(dict.fromkeys(ids.ravel().tolist()))
        found = [e for e in experts if e in order]
        lookups, hits = lookups + len(experts), hits + len(found)
        missed = [e for e in experts if e not in order]
        kept = [e for e in order if e not in found]
        room = slots - len(found)
        stay = max(0, room - len(missed))
        order = kept[max(0, len(kept) - stay) :]
        order += found + missed[:room]
    return lookups, hits


def calls(rng, n: int, k: int, count: int, most_tokens: int = 3) -> list[np.ndarray]:
    """Routing that prefers few experts."""
    likely = 1.0 / np.arange(1, n + 1)
    likely /= likely.sum()
    return [
        np.stack(
            [rng.choice(n, k, replace=False, p=likely) for _ in range(rng.integers(1, most_tokens + 1))]
        ).astype(np.int32)
        for _ in range(count)
    ]


def make(rng, basis_type: str, **sizes):
    basis, mix, _, _ = operands(rng, t=1, **sizes)
    m, r, d = basis.shape
    data = ggml.quantize(basis.reshape(m * r, d), basis_type)
    return data, ggml.dequantize(data, basis_type, d).reshape(m, r, d), mix


@pytest.mark.parametrize("activation", names.ACTIVATIONS)
@pytest.mark.parametrize(
    ("basis_type", "sizes"),
    [
        ("q4_k", dict(d=512, r=9, m=4, n=12, k=3)),
        ("q4_0", dict(d=96, r=7, m=6, n=12, k=4, n_group=2)),
        ("q8_0", dict(d=288, r=5, m=4, n=8, k=2, row_mix=True)),
        ("f32", dict(d=50, r=6, m=3, n=8, k=2)),  # rows that 32 does not divide are kept in f16
        ("q5_0", dict(d=64, r=11, m=6, n=9, k=3, terms=2)),
    ],
    ids=str,
)
def test_no_size_changes_the_result(activation, basis_type, sizes):
    rng = np.random.default_rng(0)
    data, basis, mix = make(rng, basis_type, **sizes)
    n, k, d = sizes["n"], sizes["k"], sizes["d"]
    caches = {
        slots: Cached(basis_type, data, basis, mix, k, activation, slots, 1 + slots % 3)
        for slots in (1, 2, n // 2, n)
    }
    done = calls(rng, n, k, 30)
    truth, got = [], []
    for ids in done:
        x = rng.standard_normal((len(ids), 1, d), dtype=np.float32) / np.float32(d**0.5)
        found = [cache(x, ids) for cache in caches.values()]
        assert all(np.array_equal(found[0], other) for other in found[1:])
        truth.append(reference(basis, mix, x, ids, activation).ravel())
        got.append(found[0].ravel())
    # rows and inputs are rounded to 8 bits, or rows to 11
    assert nmse(np.concatenate(truth), np.concatenate(got)) < (2e-4 if d % 32 == 0 else 1e-6)
    for slots, cache in caches.items():
        assert cache.counts() == least_recently_used(done, slots)


def test_each_expert_may_have_its_own_input():
    rng = np.random.default_rng(1)
    data, basis, mix = make(rng, "q4_0", d=64, r=80, m=4, n=8, k=3)
    small, whole = (Cached("q4_0", data, basis, mix, 3, "tanh", slots) for slots in (2, 8))
    for ids in calls(rng, 8, 3, 12):
        x = rng.standard_normal((len(ids), 3, 64), dtype=np.float32)
        z = small(x, ids)
        assert np.array_equal(z, whole(x, ids))
        assert nmse(reference(basis, mix, x, ids, "tanh"), z) < 1e-3


def test_many_tokens_do_without_and_leave_the_cache_alone():
    """A prompt forms each matrix for all of its tokens at once; it must not push out what decoding uses."""
    rng = np.random.default_rng(2)
    data, basis, mix = make(rng, "q4_0", d=64, r=8, m=4, n=8, k=2)
    cache = Cached("q4_0", data, basis, mix, 2, "tanh", 4)
    few = calls(rng, 8, 2, 1, most_tokens=1)[0]
    cache(rng.standard_normal((1, 1, 64), dtype=np.float32), few)
    before = cache.counts()
    ids = np.stack([rng.permutation(8)[:2] for _ in range(40)]).astype(np.int32)
    x = rng.standard_normal((40, 1, 64), dtype=np.float32)
    assert nmse(reference(basis, mix, x, ids, "tanh"), cache(x, ids)) < 2e-4
    assert cache.counts() == before


def test_missed_experts_read_only_what_they_mix():
    """NaN in bases that no expert in use mixes must not reach the result, nor what is kept."""
    rng = np.random.default_rng(3)
    basis, mix, _, _ = operands(rng, d=64, r=4, m=6, n=6, k=2, t=1, terms=2)
    basis[~(mix[[1, 4]] != 0).any(0)] = np.nan
    cache = Cached("f32", basis, basis, mix, 2, "silu", 3)
    ids = np.array([[1, 4]], np.int32)
    for _ in range(2):
        x = rng.standard_normal((1, 1, 64), dtype=np.float32)
        assert nmse(reference(np.nan_to_num(basis), mix, x, ids, "silu"), cache(x, ids)) < 1e-3


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_shape_and_size(data):
    n_group = data.draw(st.sampled_from([1, 1, 2]))
    n = n_group * data.draw(st.integers(2, 8))
    k = data.draw(st.integers(1, n))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    d = data.draw(st.integers(1, 400))
    sizes = dict(
        d=d,
        r=data.draw(st.integers(1, 9)),
        m=n_group * data.draw(st.integers(1, 5)),
        n=n,
        k=k,
        n_group=n_group,
    )
    bytes_, basis, mix = make(rng, "f32", **sizes, row_mix=data.draw(st.booleans()))
    slots = data.draw(st.integers(1, n))
    threads = data.draw(st.integers(1, 3))
    small, whole = (Cached("f32", bytes_, basis, mix, k, "tanh", s, threads) for s in (slots, n))
    done = calls(rng, n, k, 6, most_tokens=data.draw(st.sampled_from([1, 4, 16])))
    for ids in done:
        x = rng.standard_normal((len(ids), 1, d), dtype=np.float32)
        z = small(x, ids)
        assert np.array_equal(z, whole(x, ids))
    assert small.counts() == least_recently_used(done, slots)
