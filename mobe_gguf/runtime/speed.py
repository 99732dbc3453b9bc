"""How fast this machine reads weights: one matrix of a type times one vector, on the installed runtime's CPU backend.

Generating a token consists of such products.  So the bytes per second measured here, with all threads, hold whether the
limit is memory bandwidth or a type's arithmetic.
"""

from __future__ import annotations

import contextlib
import ctypes  # only to load libraries whose symbols depend on each other globally
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import cffi

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError
from mobe_gguf.runtime import ggml

#: Bytes of the matrix, more than the caches hold.
BYTES = 96 << 20
ROW = 2048
#: Least seconds of each measurement, and the number of runs, of which the fastest counts.
SECONDS, RUNS = 0.05, 3
#: Number of nodes in the graph that measures the cost of a node.
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
void * ggml_backend_alloc_ctx_tensors_from_buft(void * ctx, void * buffer_type);
bool   ggml_backend_dev_supports_op(void * device, const void * op);
void   ggml_backend_tensor_set(void * tensor, const void * data, size_t offset, size_t size);
void   ggml_backend_buffer_free(void * buffer);
void   ggml_backend_buffer_clear(void * buffer, uint8_t value);
int    ggml_backend_graph_compute(void * backend, void * graph);
void   ggml_backend_load_all_from_path(const char * path);
void * ggml_backend_dev_by_type(int type);
void * ggml_backend_dev_backend_reg(void * device);
void * ggml_backend_reg_get_proc_address(void * reg, const char * name);
void   ggml_log_get(void ** callback, void ** user_data);
void   ggml_log_set(void * callback, void * user_data);
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
    """Bytes per second of a matrix of the type that is multiplied by a vector, with ``threads`` threads.

    The matrix is stored as llama.cpp stores weights of the type: repacked where the CPU backend does that.
    """
    _, lib = _library()
    info = ggml.type_info(type_name)
    rows = max(64, BYTES // info.row_bytes(ROW) // 64 * 64)
    n_bytes = rows * info.row_bytes(ROW)
    for kind in [*_extra_buffers(), None]:
        with _context() as weights, _context() as ctx:
            matrix = lib.ggml_new_tensor_2d(weights, info.id, ROW, rows)
            vector = lib.ggml_new_tensor_2d(ctx, ggml.type_info("f32").id, ROW, 1)
            product = lib.ggml_mul_mat(ctx, matrix, vector)
            with _placed(weights, kind):
                if kind is None or lib.ggml_backend_dev_supports_op(
                    lib.ggml_backend_dev_by_type(_CPU), product
                ):
                    with _silent():
                        lib.ggml_backend_tensor_set(matrix, bytes(n_bytes), 0, n_bytes)
                    return n_bytes / _fastest(threads, ctx, [product])
    raise MobeError(f"the runtime's CPU backend takes no matrix of type {type_name}")


def node_seconds(threads: int) -> float:
    """Seconds for a graph node with almost no computation: the cost of synchronizing all threads after each node."""
    _, lib = _library()
    with _context() as ctx:
        x = lib.ggml_new_tensor_2d(ctx, ggml.type_info("f32").id, 64, 1)
        nodes = []
        for _ in range(NODES):
            x = lib.ggml_scale(ctx, x, 1.0)
            nodes.append(x)
        return _fastest(threads, ctx, nodes) / NODES


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress ggml's message about each repacked tensor."""
    ffi, lib = _library()
    before, data = ffi.new("void **"), ffi.new("void **")
    lib.ggml_log_get(before, data)
    listen = ffi.callback("void (int, const char *, void *)", lambda *_: None)
    lib.ggml_log_set(ffi.cast("void *", listen), ffi.NULL)
    try:
        yield
    finally:
        lib.ggml_log_set(before[0], data[0])


@contextlib.contextmanager
def _context() -> Iterator[Any]:
    ffi, lib = _library()
    size = (NODES + 16) * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead()
    ctx = lib.ggml_init([size, ffi.NULL, True])
    try:
        yield ctx
    finally:
        lib.ggml_free(ctx)


def _extra_buffers() -> list[Any]:
    """Buffer types in which the CPU backend stores repacked weights."""
    ffi, lib = _library()
    device = lib.ggml_backend_dev_by_type(_CPU)
    reg = lib.ggml_backend_dev_backend_reg(device)
    ask = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts")
    found = ffi.cast("void ** (*)(void *)", ask)(device) if ask else ffi.NULL
    kinds: list[Any] = []
    while found and found[len(kinds)]:
        kinds.append(found[len(kinds)])
    return kinds


@contextlib.contextmanager
def _placed(ctx: Any, kind: Any) -> Iterator[None]:
    """Allocate the context's tensors in a buffer of type ``kind``; None is the CPU's ordinary memory."""
    ffi, lib = _library()
    backend = lib.ggml_backend_init_by_type(_CPU, ffi.NULL)
    try:
        buffer = (
            lib.ggml_backend_alloc_ctx_tensors(ctx, backend)
            if kind is None
            else lib.ggml_backend_alloc_ctx_tensors_from_buft(ctx, kind)
        )
        if not buffer:
            raise MobeError("there is no memory for a matrix to measure the machine by")
        try:
            yield
        finally:
            lib.ggml_backend_buffer_free(buffer)
    finally:
        lib.ggml_backend_free(backend)


def _fastest(threads: int, ctx: Any, nodes: list[Any]) -> float:
    """Seconds of the fastest run of the graph that ends in ``nodes``, tensors of ``ctx`` that are not allocated yet.

    This is wall time.  (CPU time divided by the number of threads is up to half of it: threads also sleep.)
    """
    ffi, lib = _library()
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
