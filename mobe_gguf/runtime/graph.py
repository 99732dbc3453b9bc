"""Nodes of llama.cpp's graph while a text runs through a GGUF file, for a program that runs apart (``apart``).

    for each node:   ask(node) -> whether its values are wanted;   then seen(node), with all inputs of the node in memory

The layout of ``ggml_tensor`` is that of the pinned source (ggml/include/ggml.h); its size is checked.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mobe_gguf import runtime

#: Types of values that are read: numbers of ggml -> numpy.
TYPES: dict[int, Any] = {0: np.float32, 1: np.float16, 26: np.int32}
#: sizeof(struct ggml_object), which ``ggml_tensor_overhead`` adds.
OBJECT = 32


class _Tensor(ctypes.Structure):
    pass


_Tensor._fields_ = [
    ("type", ctypes.c_int32),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int32),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _Library:
    """libggml-base, loaded when it is first used."""

    def __init__(self) -> None:
        self.lib = lib = ctypes.CDLL(str(runtime.lib_dir() / "libggml-base.so"))
        lib.ggml_op_desc.restype = ctypes.c_char_p
        lib.ggml_nbytes.restype = lib.ggml_tensor_overhead.restype = ctypes.c_size_t
        for function in (lib.ggml_op_desc, lib.ggml_nbytes):
            function.argtypes = [ctypes.c_void_p]
        lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
        if lib.ggml_tensor_overhead() != ctypes.sizeof(_Tensor) + OBJECT:
            raise SystemExit("Error: the runtime has another struct ggml_tensor than this program")


class Node:
    """A node of the graph, or one of its inputs."""

    def __init__(self, library: _Library, pointer: Any):
        self._library, self.address = library, ctypes.cast(pointer, ctypes.c_void_p).value
        self._tensor = ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents

    @property
    def name(self) -> str:
        return str(self._tensor.name.decode(errors="replace"))

    @property
    def op(self) -> str:
        """ggml's name, such as ``MUL_MAT_ID`` or ``SWIGLU``."""
        return str(self._library.lib.ggml_op_desc(self.address).decode())

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first, all four."""
        return tuple(self._tensor.ne[:])[::-1]

    def source(self, i: int) -> Node | None:
        pointer = self._tensor.src[i]
        return Node(self._library, pointer) if pointer else None

    def values(self) -> np.ndarray:
        """Of :attr:`shape`, a copy.  SystemExit if they are of another type than TYPES."""
        t = self._tensor
        if t.type not in TYPES:
            raise SystemExit(f"Error: {self.name} has values of type {t.type}, expected f32, f16 or i32")
        raw = np.empty(self._library.lib.ggml_nbytes(self.address), np.uint8)
        self._library.lib.ggml_backend_tensor_get(self.address, raw.ctypes.data, 0, raw.nbytes)
        strides = tuple(t.nb[:])[::-1]
        view = np.lib.stride_tricks.as_strided(raw.view(TYPES[t.type]), self.shape, strides)
        return np.array(view)


class Reader:
    """Runs chunks of tokens through the model at ``path``, on the CPU."""

    def __init__(
        self, path: Path, ctx: int, ask: Callable[[Node], bool], seen: Callable[[Node], None], threads: int
    ):
        import llama_cpp

        self.llama, self.path, self.ctx, library = llama_cpp, path, ctx, _Library()
        self.error: BaseException | None = None

        def listen(pointer: int, asked: bool, _: Any) -> bool:
            node = Node(library, ctypes.c_void_p(pointer))
            if asked:
                return ask(node)
            try:
                seen(node)
            except BaseException as error:  # ctypes would only print it
                self.error = error
                return False
            return True

        self._listen = llama_cpp.ggml_backend_sched_eval_callback(listen)
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_options)
        if not self.model:
            raise SystemExit(f"Error: {path} cannot be loaded")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = ctx
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        options.cb_eval = self._listen
        if threads:
            options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"Error: no context of {ctx} tokens can be made for {path}")
        self.batch = llama_cpp.llama_batch_init(ctx, 0, 1)

    def run(self, tokens: list[int]) -> None:
        """One chunk of ``ctx`` tokens, all with outputs: the last layer runs only the tokens that have one."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        self.batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, i, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = 0, True
        failed = self.llama.llama_decode(self.context, self.batch)
        if self.error is not None:
            raise self.error
        if failed:
            raise SystemExit(f"Error: llama_decode fails ({failed})")
