"""The experts that a GGUF file's routers choose for the tokens of a text, from the installed runtime, on the CPU.

    python -m mobe_gguf.runtime.choices FILE TEXT CTX CHUNKS THREADS OUT.npz

It is a separate program because llama.cpp ends the process if a file does not fit its graph.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mobe_gguf import runtime
from mobe_gguf.runtime.apart import run_apart

#: The graph's nodes with all experts of each token, best first, and with the first of them (src/llama-graph.cpp, build_moe_ffn).
ALL, TAKEN = re.compile(r"ffn_moe_argsort-(\d+)"), re.compile(r"ffn_moe_topk-(\d+)")


def choices(
    path: Path, text: Path, ctx: int, chunks: int, threads: int | None = None
) -> dict[int, np.ndarray]:
    """By layer, int16 ``[chunks, ctx, k]``: the experts of each token of the first ``chunks`` chunks of ``text``, sorted.

    Empty for a model without routed experts.  Chunks begin as llama-perplexity's do.  MobeError, with the program's output, if the
    runtime fails to run the file.
    """
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-") as folder:
        out = Path(folder) / "choices.npz"
        run_apart(__name__, path, text, ctx, chunks, threads or 0, out=out)
        with np.load(out) as found:
            return {int(name): found[name].reshape(chunks, ctx, -1) for name in found.files}


class Listener:
    """Collects the choices of every layer, one micro-batch after the other."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(str(runtime.lib_dir() / "libggml-base.so"))
        self.lib.ggml_get_name.restype = ctypes.c_char_p
        self.lib.ggml_nelements.restype = self.lib.ggml_nrows.restype = ctypes.c_int64
        for function in (self.lib.ggml_get_name, self.lib.ggml_nelements, self.lib.ggml_nrows):
            function.argtypes = [ctypes.c_void_p]
        self.lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
        self.found: dict[int, list[np.ndarray]] = {}

    def __call__(self, tensor: int, asked: bool, _: Any) -> bool:
        """llama.cpp asks which nodes to show, then shows them; true means yes, and go on."""
        name = self.lib.ggml_get_name(tensor).decode()
        rows = self.lib.ggml_nrows(tensor)
        width = self.lib.ggml_nelements(tensor) // rows
        if taken := TAKEN.fullmatch(name):
            if asked and (parts := self.found.get(int(taken[1]))):
                parts[-1] = np.sort(parts[-1][:, :width].astype(np.int16))
            return not asked
        everything = ALL.fullmatch(name)
        if everything and not asked:
            values = np.empty((rows, width), np.int32)
            self.lib.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            self.found.setdefault(int(everything[1]), []).append(values)
        return not asked or everything is not None


def main(path: str, text: str, ctx: str, chunks: str, threads: str, out: str) -> None:
    import llama_cpp

    size, listener = int(ctx), Listener()
    listen = llama_cpp.ggml_backend_sched_eval_callback(listener)
    llama_cpp.llama_backend_init()
    model_options = llama_cpp.llama_model_default_params()
    model_options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_options)
    if not model:
        raise SystemExit(f"Error: {path} cannot be loaded")
    vocab = llama_cpp.llama_model_get_vocab(model)
    begin = llama_cpp.llama_vocab_bos(vocab) if llama_cpp.llama_vocab_get_add_bos(vocab) else None
    content = Path(text).read_bytes().removesuffix(b"\n")
    room = (ctypes.c_int32 * (len(content) + 8))()
    n = llama_cpp.llama_tokenize(vocab, content, len(content), room, len(room), True, False)
    if n < int(chunks) * size:
        raise SystemExit(f"Error: {text} has {n} tokens, {int(chunks) * size} are needed")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = size
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    options.cb_eval = listen
    if int(threads):
        options.n_threads = options.n_threads_batch = int(threads)
    context = llama_cpp.llama_init_from_model(model, options)
    if not context:
        raise SystemExit(f"Error: no context of {size} tokens can be made for {path}")
    batch = llama_cpp.llama_batch_init(size, 0, 1)
    for chunk in range(int(chunks)):
        tokens = list(room[chunk * size : (chunk + 1) * size])
        if begin is not None:
            tokens[0] = begin
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = size
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            # outputs for all: the last layer runs only the tokens that have one
            batch.seq_id[i][0], batch.logits[i] = 0, True
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"Error: llama_decode fails in chunk {chunk}")
    found: dict[str, Any] = {str(layer): np.concatenate(parts) for layer, parts in listener.found.items()}
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
