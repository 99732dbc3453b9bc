"""One ggml graph of one ``mobe_proj`` node, computed by the installed library's CPU backend, and the C reference."""

from __future__ import annotations

import ctypes  # only to load libraries whose symbols depend on each other globally
from collections.abc import Callable
from functools import cache

import cffi
import numpy as np

from mobe_gguf import runtime
from mobe_gguf.core import names
from mobe_gguf.runtime import ggml

ffi = cffi.FFI()
ffi.cdef("""
typedef struct { size_t mem_size; void * mem_buffer; bool no_alloc; } ggml_init_params;
typedef struct { int64_t d, r, m, m_group, n, k, T; int64_t x_experts; bool row_mix; } ggml_mobe_shape;

void * ggml_init(ggml_init_params params);
void   ggml_free(void * ctx);
void * ggml_new_tensor_1d(void * ctx, int type, int64_t ne0);
void * ggml_new_tensor_2d(void * ctx, int type, int64_t ne0, int64_t ne1);
void * ggml_new_tensor_3d(void * ctx, int type, int64_t ne0, int64_t ne1, int64_t ne2);
void * ggml_view_2d(void * ctx, void * a, int64_t ne0, int64_t ne1, size_t nb1, size_t offset);
void * ggml_view_3d(void * ctx, void * a, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb1, size_t nb2, size_t offset);
size_t ggml_nbytes(const void * tensor);
void * ggml_mul_mat(void * ctx, void * a, void * b);
void * ggml_mul_mat_id(void * ctx, void * as, void * b, void * ids);
void * ggml_mul(void * ctx, void * a, void * b);
void * ggml_silu(void * ctx, void * a);
void * ggml_new_graph(void * ctx);
void   ggml_build_forward_expand(void * graph, void * tensor);
size_t ggml_tensor_overhead(void);
size_t ggml_graph_overhead(void);

const char * ggml_mobe_proj_check(const void * basis, const void * mix, const void * x, const void * ids);
bool   ggml_mobe_proj_is_sound(const void * node);
void * ggml_mobe_proj(void * ctx, void * basis, void * mix, void * x, void * ids, int activation);
void   ggml_mobe_proj_ref(const ggml_mobe_shape * shape, int activation, const float * basis, const float * mix,
                          const float * x, const int32_t * ids, float * z);

void * ggml_backend_init_by_type(int type, const char * params);
void   ggml_backend_free(void * backend);
void * ggml_backend_alloc_ctx_tensors(void * ctx, void * backend);
void * ggml_backend_alloc_ctx_tensors_from_buft(void * ctx, void * buft);
const char * ggml_backend_buft_name(void * buft);
void   ggml_backend_buffer_free(void * buffer);
void   ggml_backend_buffer_clear(void * buffer, uint8_t value);
void   ggml_backend_tensor_set(void * tensor, const void * data, size_t offset, size_t size);
void   ggml_backend_tensor_get(const void * tensor, void * data, size_t offset, size_t size);
int    ggml_backend_graph_compute(void * backend, void * graph);
void   ggml_backend_load_all_from_path(const char * path);
void * ggml_backend_dev_by_type(int type);
void * ggml_backend_dev_backend_reg(void * device);
void * ggml_backend_reg_get_proc_address(void * reg, const char * name);
bool   ggml_backend_dev_supports_op(void * device, const void * op);
""")

F32, I8, I32, CPU = 0, 24, 26, 0


@cache
def library():
    """libggml with its dependencies, backends loaded."""
    folder = runtime.lib_dir()
    ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    lib = ffi.dlopen(str(folder / "libggml.so"), ffi.RTLD_GLOBAL | ffi.RTLD_NOW)
    lib.ggml_backend_load_all_from_path(str(folder).encode())
    return lib


def pointer(array: np.ndarray, ctype: str):
    assert array.flags.c_contiguous
    return ffi.cast(ctype, array.ctypes.data)


def shape_of(basis, mix, x, ids):
    """basis [m, r, d], mix [n, m/g] or [n, m/g, r], x [T, 1|k, d], ids [T, k] (C order)."""
    m, r, d = basis.shape
    t, k = ids.shape
    return ffi.new(
        "ggml_mobe_shape *", [d, r, m, mix.shape[1], mix.shape[0], k, t, x.shape[1], mix.ndim == 3]
    )


def reference(basis, mix, x, ids, activation: str) -> np.ndarray:
    """The C reference; float32 operands in C order. Returns [T, k, r]."""
    z = np.full((*ids.shape, basis.shape[1]), np.nan, np.float32)
    library().ggml_mobe_proj_ref(
        shape_of(basis, mix, x, ids),
        names.ACTIVATIONS.index(activation),
        pointer(basis, "float *"),
        pointer(mix, "float *"),
        pointer(x, "float *"),
        pointer(ids, "int32_t *"),
        pointer(z, "float *"),
    )
    return z


def cpu_backend(n_threads: int):
    """A CPU backend with so many threads; ``ggml_backend_free`` it."""
    lib = library()
    backend = lib.ggml_backend_init_by_type(CPU, ffi.NULL)
    reg = lib.ggml_backend_dev_backend_reg(lib.ggml_backend_dev_by_type(CPU))
    set_n_threads = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_set_n_threads")
    ffi.cast("void (*)(void *, int)", set_n_threads)(backend, n_threads)
    return backend


class Graph:
    """Builds and computes one node; the output buffer is poisoned with NaN before, and so is what lies between the rows of x.

    ``basis_is_view``: as of a tensor that another node of the graph wrote.
    """

    def __init__(
        self,
        basis_type: str,
        basis_bytes: np.ndarray,
        shape,
        mix,
        x,
        ids,
        activation: str,
        *,
        basis_is_view: bool = False,
    ):
        lib = library()
        m, r, d = shape
        t, k = ids.shape
        self._ctx = lib.ggml_init(
            [16 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead(), ffi.NULL, True]
        )
        self.basis = stored = lib.ggml_new_tensor_3d(self._ctx, ggml.types()[basis_type].id, d, r, m)
        if basis_is_view:
            row = lib.ggml_nbytes(stored) // (m * r)
            self.basis = lib.ggml_view_3d(self._ctx, stored, d, r, m, row, row * r, 0)
        if mix.ndim == 3:
            self.mix = lib.ggml_new_tensor_3d(self._ctx, F32, mix.shape[2], mix.shape[1], mix.shape[0])
        else:
            self.mix = lib.ggml_new_tensor_2d(self._ctx, F32, mix.shape[1], mix.shape[0])
        # the input and a router's choice are views into longer rows
        tokens, each, width = x.shape
        all_x = np.full((tokens, each + 1, width + 8), np.nan, np.float32)
        all_x[:, :each, :width] = x
        strides = all_x.strides[1], all_x.strides[0]
        self._all_x = lib.ggml_new_tensor_3d(self._ctx, F32, width + 8, each + 1, tokens)
        self.x = lib.ggml_view_3d(self._ctx, self._all_x, width, each, tokens, *strides, 0)
        self._all_ids = lib.ggml_new_tensor_2d(self._ctx, I32, k + 3, t)
        self.ids = lib.ggml_view_2d(self._ctx, self._all_ids, k, t, (k + 3) * 4, 0)
        self._lib = lib
        self._activation = names.ACTIVATIONS.index(activation)
        padded = np.full((t, k + 3), -1, np.int32)
        padded[:, :k] = ids
        self._data = [(stored, basis_bytes), (self.mix, mix), (self._all_x, all_x), (self._all_ids, padded)]
        self._out_shape = (t, k, r)

    def fault(self) -> str | None:
        """What ``ggml_mobe_proj_check`` says of the operands."""
        text = self._lib.ggml_mobe_proj_check(self.basis, self.mix, self.x, self.ids)
        return None if text == ffi.NULL else ffi.string(text).decode()

    def supported(self) -> bool:
        """What the CPU backend says of the node."""
        node = self._lib.ggml_mobe_proj(self._ctx, self.basis, self.mix, self.x, self.ids, self._activation)
        return self._lib.ggml_backend_dev_supports_op(self._lib.ggml_backend_dev_by_type(CPU), node)

    def compute(self, n_threads: int = 2, run: Callable[..., bool] | None = None) -> np.ndarray:
        """Returns [T, k, r].

        ``run`` is called with the node, all of whose operands lie in memory, and computes it instead of the CPU backend.
        """
        lib = self._lib
        out = lib.ggml_mobe_proj(self._ctx, self.basis, self.mix, self.x, self.ids, self._activation)
        graph = lib.ggml_new_graph(self._ctx)
        lib.ggml_build_forward_expand(graph, out)
        backend = cpu_backend(n_threads)
        buffer = lib.ggml_backend_alloc_ctx_tensors(self._ctx, backend)
        try:
            for tensor, data in self._data:
                data = np.ascontiguousarray(data)
                assert data.nbytes == lib.ggml_nbytes(tensor)
                lib.ggml_backend_tensor_set(tensor, ffi.from_buffer(data), 0, data.nbytes)
            z = np.full(self._out_shape, np.nan, np.float32)
            lib.ggml_backend_tensor_set(out, ffi.from_buffer(z), 0, z.nbytes)
            assert run(out) if run else lib.ggml_backend_graph_compute(backend, graph) == 0
            lib.ggml_backend_tensor_get(out, ffi.from_buffer(z), 0, z.nbytes)
            return z
        finally:
            lib.ggml_backend_buffer_free(buffer)
            lib.ggml_backend_free(backend)

    def __del__(self):
        self._lib.ggml_free(self._ctx)
