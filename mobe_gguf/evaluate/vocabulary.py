"""The vocabulary of a GGUF file as llama.cpp loads it, to compare two files and to count a text's tokens."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError


@dataclass(frozen=True)
class Vocabulary:
    """``tokens``: the text of each id.  ``begin``: the id that begins every chunk of text, None if there is none."""

    path: Path
    tokens: tuple[bytes, ...]
    begin: int | None

    def check_same(self, other: Vocabulary) -> None:
        """MobeError, with the first difference, unless every id means the same in both."""
        if self.tokens != other.tokens:
            if len(self.tokens) != len(other.tokens):
                difference = f"it has {len(self.tokens)} tokens, the reference {len(other.tokens)}"
            else:
                pairs = zip(self.tokens, other.tokens, strict=True)
                at, (own, expected) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
                difference = f"token {at} is {_shown(own)}, in the reference {_shown(expected)}"
            raise MobeError(
                f"{self.path}: its vocabulary is not that of the reference {other.path}: {difference}, so their "
                "predictions cannot be compared. Compare files that were made from the same model."
            )


def _shown(token: bytes) -> str:
    return repr(token.decode("utf-8", errors="backslashreplace"))


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary of the file at ``path``.  MobeError if llama.cpp cannot load it."""
    import llama_cpp

    with _opened(Path(path)) as vocab:
        n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        tokens = tuple(llama_cpp.llama_vocab_get_text(vocab, i) for i in range(n_vocab))
        begin = llama_cpp.llama_vocab_bos(vocab) if llama_cpp.llama_vocab_get_add_bos(vocab) else None
    if not tokens:
        raise MobeError(
            f"{path}: it holds no vocabulary, so text cannot be evaluated; convert the model again"
        )
    return Vocabulary(Path(path), tokens, begin)


def count_tokens(path: str | os.PathLike[str], text: bytes) -> int:
    """Number of tokens that llama-perplexity makes of a file's content ``text``, of which it drops one final line
    break."""
    import llama_cpp

    text = text.removesuffix(b"\n")
    with _opened(Path(path)) as vocab:
        # the buffer is too small for any text; the answer is then minus the required size
        return -llama_cpp.llama_tokenize(vocab, text, len(text), (ctypes.c_int32 * 1)(), 0, True, False)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A ``llama_vocab`` pointer.  Nothing else of the file is loaded, and llama.cpp's messages are suppressed."""
    runtime.lib_dir()  # raises if there is no runtime
    import llama_cpp
    from llama_cpp import _logger

    said: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            said.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(listen, None)
    no_devices = (ctypes.c_void_p * 1)()
    model = None
    try:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        # an empty list: asking a GPU for its free memory would occupy some of it until this process ends
        params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            why = said[0] if said else "it does not say why"
            raise MobeError(f"{path}: llama.cpp cannot load its vocabulary: {why}")
        yield llama_cpp.llama_model_get_vocab(model)
    finally:
        if model:
            llama_cpp.llama_model_free(model)
        llama_cpp.llama_log_set(_logger.llama_log_callback, None)
