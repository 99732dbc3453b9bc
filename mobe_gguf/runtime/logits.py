"""Logits of a GGUF file from the installed runtime, in full precision.

    python -m mobe_gguf.runtime.logits FILE TOKENS.npy OUT.npy

It is a separate program because llama.cpp ends the process if a file does not fit its graph.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np

from mobe_gguf.runtime.apart import run_apart


def logits(path: Path, tokens: np.ndarray, of: object = None) -> np.ndarray:
    """float32 ``[len(tokens), vocabulary]``; MobeError, with the program's output, if the runtime fails to run the file, which the
    message calls ``of``."""
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-") as folder:
        given, out = Path(folder) / "tokens.npy", Path(folder) / "logits.npy"
        np.save(given, tokens)
        run_apart(__name__, path, given, out=out, of=of)
        return np.load(out)


def main(path: str, given: str, out: str) -> None:
    from llama_cpp import Llama

    tokens = np.load(given)
    size = len(tokens)
    model = Llama(
        path, flash_attn=False, type_k=0, type_v=0, logits_all=True, n_ctx=size, n_batch=size, n_ubatch=size, n_gpu_layers=0,
        verbose=True,
    )  # fmt: skip
    with closing(model):
        model.eval(tokens.tolist())
        np.save(out, model.scores[:size])


if __name__ == "__main__":
    main(*sys.argv[1:])
