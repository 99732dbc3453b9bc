"""Weights that llama.cpp keeps in another order on a CPU: products of many rows against those of the plain order.

Both round the inputs to the same 8 bits, so they differ by the order of sums alone.  Types that this processor does not
repack are skipped.
"""

from __future__ import annotations

import numpy as np
import pytest

from mobe_gguf.runtime import ggml
from native.ggml_graph import CPU, F32, I32, cpu_backend, ffi, library, pointer

#: Type and rows of a matrix: as many as lie together, and no more.
TYPES = {
    **dict.fromkeys(("q4_0", "q4_K", "q2_K", "iq4_nl", "mxfp4", "q8_0", "q5_K", "q6_K"), 72),
    **dict.fromkeys(("q1_0", "q2_0", "tq1_0", "tq2_0"), 80),
}
D, EXPERTS, USED = 512, 5, 3


def repack_buffers() -> object:
    """The buffer type whose weights are repacked; the test is skipped where there is none."""
    lib = library()
    register = lib.ggml_backend_dev_backend_reg(lib.ggml_backend_dev_by_type(CPU))
    address = lib.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
    found = ffi.cast("void ** (*)(void *)", address)(lib.ggml_backend_dev_by_type(CPU))
    index = 0
    while found[index] != ffi.NULL:
        if b"REPACK" in ffi.string(lib.ggml_backend_buft_name(found[index])):
            return found[index]
        index += 1
    pytest.skip("this build repacks nothing")


class Product:
    """One product with ``weight`` [experts or 1, rows, D] of ``type``, repacked or not."""

    def __init__(self, type_: str, weight: np.ndarray, repacked: bool) -> None:
        self.lib = library()
        experts, rows, columns = self.shape = weight.shape
        self.weights = self.context()
        code = ggml.type_info(type_).id
        self.weight = (
            self.lib.ggml_new_tensor_3d(self.weights, code, columns, rows, experts)
            if experts > 1
            else self.lib.ggml_new_tensor_2d(self.weights, code, columns, rows)
        )
        self.backend = cpu_backend(1)
        if repacked:
            self.buffer = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(self.weights, repack_buffers())
            if not self.is_taken(columns):
                pytest.skip(f"this processor does not repack {type_}")
        else:
            self.buffer = self.lib.ggml_backend_alloc_ctx_tensors(self.weights, self.backend)
        data = ggml.quantize(weight.reshape(-1, columns), type_, name="w")
        data = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        self.lib.ggml_backend_tensor_set(self.weight, pointer(data, "void *"), 0, data.nbytes)

    def is_taken(self, columns: int) -> bool:
        """As llama.cpp's loader asks before it chooses the buffer."""
        context = self.context()
        ids = self.lib.ggml_new_tensor_2d(context, I32, 1, 1)
        x = self.lib.ggml_new_tensor_3d(context, F32, columns, 1, 1)
        node = self.lib.ggml_mul_mat(context, self.weight, x) if self.shape[0] == 1 else (
            self.lib.ggml_mul_mat_id(context, self.weight, x, ids)
        )  # fmt: skip
        taken = self.lib.ggml_backend_dev_supports_op(self.lib.ggml_backend_dev_by_type(CPU), node)
        self.lib.ggml_free(context)
        return bool(taken)

    def context(self):
        return self.lib.ggml_init(ffi.new("ggml_init_params *", (1 << 20, ffi.NULL, True))[0])

    def __call__(self, x: np.ndarray, ids: np.ndarray | None, n_threads: int) -> np.ndarray:
        register = self.lib.ggml_backend_dev_backend_reg(self.lib.ggml_backend_dev_by_type(CPU))
        address = self.lib.ggml_backend_reg_get_proc_address(register, b"ggml_backend_set_n_threads")
        ffi.cast("void (*)(void *, int)", address)(self.backend, n_threads)
        context = self.context()
        inputs = self.lib.ggml_new_tensor_3d(context, F32, *x.shape[::-1])
        if ids is None:
            out, shape = self.lib.ggml_mul_mat(context, self.weight, inputs), (*x.shape[:2], self.shape[1])
        else:
            chosen = self.lib.ggml_new_tensor_2d(context, I32, *ids.shape[::-1])
            out, shape = (
                self.lib.ggml_mul_mat_id(context, self.weight, inputs, chosen),
                (*ids.shape, self.shape[1]),
            )
        graph = self.lib.ggml_new_graph(context)
        self.lib.ggml_build_forward_expand(graph, out)
        buffer = self.lib.ggml_backend_alloc_ctx_tensors(context, self.backend)
        self.lib.ggml_backend_tensor_set(inputs, pointer(x, "void *"), 0, x.nbytes)
        if ids is not None:
            self.lib.ggml_backend_tensor_set(chosen, pointer(ids, "void *"), 0, ids.nbytes)
        assert self.lib.ggml_backend_graph_compute(self.backend, graph) == 0
        result = np.empty(shape, np.float32)
        self.lib.ggml_backend_tensor_get(out, pointer(result, "void *"), 0, result.nbytes)
        self.lib.ggml_backend_buffer_free(buffer)
        self.lib.ggml_free(context)
        return result

    def close(self) -> None:
        self.lib.ggml_backend_buffer_free(self.buffer)
        self.lib.ggml_free(self.weights)
        self.lib.ggml_backend_free(self.backend)


def error(truth: np.ndarray, got: np.ndarray) -> float:
    return float(np.abs(truth - got).max() / np.abs(truth).max())


@pytest.mark.parametrize("type_", TYPES)
def test_experts(type_: str) -> None:
    """Of 1 to 41 tokens: experts with no row, with fewer than are multiplied together, with a remainder, with all rows."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((EXPERTS, TYPES[type_], D), dtype=np.float32)
    plain, repacked = Product(type_, weight, False), Product(type_, weight, True)
    for tokens in (1, 3, 4, 5, 9, 16, 41):
        for inputs in (1, USED):
            x = rng.standard_normal((tokens, inputs, D), dtype=np.float32)
            ids = np.stack([rng.permutation(EXPERTS)[:USED] for _ in range(tokens)]).astype(np.int32)
            if tokens in (9, 41):  # one expert has all rows, and one has none
                ids = np.stack(
                    [np.append([1], rng.permutation([0, 2, 3])[:2]) for _ in range(tokens)]
                ).astype(np.int32)
            truth = plain(x, ids, 1)
            for n_threads in (1, 2, 3):
                assert error(truth, repacked(x, ids, n_threads)) < 3e-6, (tokens, inputs, n_threads)
    plain.close()
    repacked.close()


@pytest.mark.parametrize("type_", TYPES)
def test_matrices(type_: str) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((1, TYPES[type_], D), dtype=np.float32)
    plain, repacked = Product(type_, weight, False), Product(type_, weight, True)
    for batch, tokens in ((1, 1), (1, 7), (1, 16), (1, 17), (1, 300), (3, 19)):
        x = rng.standard_normal((batch, tokens, D), dtype=np.float32)
        truth = plain(x, None, 1)
        for n_threads in (1, 2, 3):
            assert error(truth, repacked(x, None, n_threads)) < 3e-6, (batch, tokens, n_threads)
    plain.close()
    repacked.close()
