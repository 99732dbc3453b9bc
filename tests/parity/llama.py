"""Running a GGUF file through the installed ``llama_cpp`` in full precision, and comparing numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np

from mobe_gguf import runtime
from parity.loader import Loader


@contextmanager
def plain_order() -> Iterator[None]:
    """Models that are opened in it keep all weights in the file's order."""
    from llama_cpp import llama_cpp

    default = llama_cpp.llama_model_default_params

    def changed():
        params = default()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = changed
    try:
        yield
    finally:
        llama_cpp.llama_model_default_params = default


def open_model(path: Path):
    """A ``llama_cpp.Llama`` that computes in float32: no flash attention, cache not rounded to float16."""
    runtime.lib_dir()  # says what to do when there is none
    from llama_cpp import Llama

    try:
        return Llama(
            str(path),
            flash_attn=False,
            type_k=0,
            type_v=0,
            logits_all=True,
            n_ctx=64,
            n_batch=64,
            n_ubatch=64,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
        )
    except ValueError as error:  # which does not say why
        with Loader() as loader:
            raise AssertionError(loader.load(path)) from error


def logits(
    path: Path, tokens: Sequence[int], steps: Iterable[int], repack: bool = True
) -> dict[int, np.ndarray]:
    """Logits [len(tokens), vocabulary] of every position, for each way to cut the prompt: ``step`` tokens a call.
    ``repack``: whether the CPU backend may keep weights in another order.

    The prompt in one call is shared by two threads.  In many small calls they would, on a busy machine, mostly wait for
    each other.
    """
    from llama_cpp import llama_set_n_threads

    result = {}
    with nullcontext() if repack else plain_order(), closing(open_model(path)) as model:
        for step in steps:
            n_threads = 2 if step >= len(tokens) else 1
            llama_set_n_threads(model.ctx, n_threads, n_threads)
            model.reset()
            for i in range(0, len(tokens), step):
                model.eval(tokens[i : i + step])
            result[step] = model.scores[: len(tokens)].copy()
    return result


def greedy(path: Path, text: str, n: int) -> dict[str, np.ndarray]:
    """``prompt``: tokens of ``text``; ``tokens`` [n]: what follows, always the likeliest; ``logits`` [prompt + n,
    vocabulary]: of every position, the prompt evaluated at once."""
    with closing(open_model(path)) as model:
        prompt = model.tokenize(text.encode(), add_bos=False)
        model.eval(prompt)
        tokens: list[int] = []
        for _ in range(n):
            tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(tokens[-1:])
        scores = model.scores[: model.n_tokens].copy()
    return {"prompt": np.array(prompt), "tokens": np.array(tokens), "logits": scores}


def nmse(truth: np.ndarray, got: np.ndarray) -> float:
    """Squared error over the squared truth, both centred for each position: a constant added to logits is nothing."""
    assert truth.shape == got.shape and np.isfinite(got).all()
    truth, got = (a.astype(np.float64) - a.mean(-1, keepdims=True, dtype=np.float64) for a in (truth, got))
    return float(((got - truth) ** 2).sum() / (truth**2).sum())
