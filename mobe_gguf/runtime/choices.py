"""The experts that a GGUF file's routers choose for the tokens of a text, from the installed runtime, on the CPU.

    python -m mobe_gguf.runtime.choices FILE TEXT CTX CHUNKS THREADS OUT.npz

It is a separate program because llama.cpp ends the process if a file does not fit its graph.
"""

from __future__ import annotations

import ctypes
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mobe_gguf.runtime.apart import run_apart
from mobe_gguf.runtime.graph import Node, Reader

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
        self.found: dict[int, list[np.ndarray]] = {}

    def ask(self, node: Node) -> bool:
        """Whether the node's values are wanted; the node of those taken only says by its shape how many they are."""
        if taken := TAKEN.fullmatch(node.name):
            if parts := self.found.get(int(taken[1])):
                parts[-1] = np.sort(parts[-1][:, : node.shape[-1]].astype(np.int16))
            return False
        return ALL.fullmatch(node.name) is not None

    def seen(self, node: Node) -> None:
        everything = ALL.fullmatch(node.name)
        assert everything is not None
        self.found.setdefault(int(everything[1]), []).append(node.values()[0, 0])


def main(path: str, text: str, ctx: str, chunks: str, threads: str, out: str) -> None:
    import llama_cpp

    size, listener = int(ctx), Listener()
    reader = Reader(Path(path), size, listener.ask, listener.seen, int(threads))
    vocab = llama_cpp.llama_model_get_vocab(reader.model)
    begin = llama_cpp.llama_vocab_bos(vocab) if llama_cpp.llama_vocab_get_add_bos(vocab) else None
    content = Path(text).read_bytes().removesuffix(b"\n")
    room = (ctypes.c_int32 * (len(content) + 8))()
    n = llama_cpp.llama_tokenize(vocab, content, len(content), room, len(room), True, False)
    if n < int(chunks) * size:
        raise SystemExit(f"Error: {text} has {n} tokens, {int(chunks) * size} are needed")
    for chunk in range(int(chunks)):
        tokens = list(room[chunk * size : (chunk + 1) * size])
        if begin is not None:
            tokens[0] = begin
        reader.run(tokens)
    found: dict[str, Any] = {str(layer): np.concatenate(parts) for layer, parts in listener.found.items()}
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
