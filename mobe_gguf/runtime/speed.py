"""How fast this machine reads weights: one matrix of a type times one vector, by the installed runtime's CPU backend.

That is what writing a token is made of, so bytes a second measured so, with all threads, hold where memory is the limit and
where a type's arithmetic is.
"""

from __future__ import annotations

import ctypes  # only to load libraries whose symbols depend on each other globally
import time
from functools import cache
from typing import Any

import cffi

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError
from mobe_gguf.runtime import ggml

#: Bytes of the matrix: beyond the caches.
BYTES = 96 << 20
ROW = 2048
#: Seconds that each measurement takes at least, and runs of which the fastest counts.
SECONDS, RUNS = 0.1, 5
#: Nodes of the graph that tells what a node costs.
NODES = 400

_DECLARATIONS = """
typedef struct { size_t mem_size; void * mem_buffer; bool no_alloc; } ggml_init_params;
void * ggml_init(ggml_init_params params);
void   ggml_free(void * ctx);
void * ggml_new_tensor_2d(void * ctx, int type, int64_t ne0, int64_t ne1);
void * ggml_mul_mat(void * ctx, void * a, void * b);
void * ggml_scale(void * ctx, void * a, float s);
void * ggml_new_graph(void * ctx);
void   ggml_build_forward_expand(void * graph, void * tensor);
size_t ggml_tensor_overhead(void);
size_t ggml_graph_overhead(void);
void * ggml_backend_init_by_type(int type, const char * params);
void   ggml_backend_free(void * backend);
void * ggml_backend_alloc_ctx_tensors(void * ctx, void * backend);
void   ggml_backend_buffer_free(void * buffer);
void   ggml_backend_buffer_clear(void * buffer, uint8_t value);
int    ggml_backend_graph_compute(void * backend, void * graph);
void   ggml_backend_load_all_from_path(const char * path);
void * ggml_backend_dev_by_type(int type);
void * ggml_backend_dev_backend_reg(void * device);
void * ggml_backend_reg_get_proc_address(void * reg, const char * name);
size_t ggml_backend_dev_count(void);
void * ggml_backend_dev_get(size_t index);
int    ggml_backend_dev_type(void * device);
void   ggml_backend_dev_memory(void * device, size_t * free, size_t * total);
const char * ggml_backend_dev_description(void * device);
"""

_CPU, _GPU = 0, 1


@cache
def _library() -> tuple[cffi.FFI, Any]:
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    folder = runtime.lib_dir()
    ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    lib = ffi.dlopen(str(folder / "libggml.so"), ffi.RTLD_GLOBAL | ffi.RTLD_NOW)
    lib.ggml_backend_load_all_from_path(str(folder).encode())
    return ffi, lib


def devices() -> list[tuple[str, int]]:
    """``(name, bytes of memory)`` of each GPU that the runtime can use."""
    ffi, lib = _library()
    found = []
    for i in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(i)
        if lib.ggml_backend_dev_type(device) == _GPU:
            free, total = ffi.new("size_t *"), ffi.new("size_t *")
            lib.ggml_backend_dev_memory(device, free, total)
            found.append((ffi.string(lib.ggml_backend_dev_description(device)).decode(), int(total[0])))
    return found


def matrix_rate(type_name: str, threads: int) -> float:
    """Bytes of a matrix of the type that are multiplied with a vector in a second."""
    info = ggml.type_info(type_name)
    rows = max(64, BYTES // info.row_bytes(ROW))
    seconds = _fastest(threads, lambda lib, ctx: [_product(lib, ctx, info.id, rows)])
    return rows * info.row_bytes(ROW) / seconds


def node_seconds(threads: int) -> float:
    """What a node of a graph costs that computes next to nothing: all threads meet behind each."""

    def build(lib: Any, ctx: Any) -> list[Any]:
        x = lib.ggml_new_tensor_2d(ctx, ggml.type_info("f32").id, 64, 1)
        nodes = []
        for _ in range(NODES):
            x = lib.ggml_scale(ctx, x, 1.0)
            nodes.append(x)
        return nodes

    return _fastest(threads, build) / NODES


def _product(lib: Any, ctx: Any, type_id: int, rows: int) -> Any:
    matrix = lib.ggml_new_tensor_2d(ctx, type_id, ROW, rows)
    vector = lib.ggml_new_tensor_2d(ctx, ggml.type_info("f32").id, ROW, 1)
    return lib.ggml_mul_mat(ctx, matrix, vector)


def _fastest(threads: int, build: Any) -> float:
    """Seconds of the fastest run of the graph whose last nodes ``build(lib, ctx)`` makes."""
    ffi, lib = _library()
    size = (NODES + 16) * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead()
    ctx = lib.ggml_init([size, ffi.NULL, True])
    nodes = build(lib, ctx)
    graph = lib.ggml_new_graph(ctx)
    for node in nodes:
        lib.ggml_build_forward_expand(graph, node)
    backend = lib.ggml_backend_init_by_type(_CPU, ffi.NULL)
    reg = lib.ggml_backend_dev_backend_reg(lib.ggml_backend_dev_by_type(_CPU))
    set_threads = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_set_n_threads")
    ffi.cast("void (*)(void *, int)", set_threads)(backend, threads)
    buffer = lib.ggml_backend_alloc_ctx_tensors(ctx, backend)
    try:
        lib.ggml_backend_buffer_clear(buffer, 0)
        best, spent, runs = float("inf"), 0.0, 0
        while runs < RUNS or spent < SECONDS:
            start = time.perf_counter()
            if lib.ggml_backend_graph_compute(backend, graph) != 0:
                raise MobeError(
                    "the runtime's CPU backend could not compute a product to measure the machine by"
                )
            took = time.perf_counter() - start
            best, spent, runs = min(best, took), spent + took, runs + 1
        return best
    finally:
        lib.ggml_backend_buffer_free(buffer)
        lib.ggml_backend_free(backend)
        lib.ggml_free(ctx)
