"""Text that a GGUF file writes by itself, from the installed runtime: many sequences beside each other.

    python -m mobe_gguf.runtime.sample FILE SETTINGS-AS-JSON OUT.json

It is a separate program because llama.cpp ends the process if a file does not fit its graph.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobe_gguf.runtime.apart import run_apart

#: Seconds after which the program says how far it is.
TELL = 1.0


@dataclass(frozen=True)
class Sampling:
    """``tokens`` of text in documents of at most ``ctx``, ``parallel`` of them at once.  ``gpu_layers`` < 0: all."""

    tokens: int = 100_000
    ctx: int = 512
    parallel: int = 16
    temperature: float = 1.0
    seed: int = 0
    threads: int | None = None
    gpu_layers: int = -1
    cpu_moe: bool = False
    n_cpu_moe: int = 0


@dataclass(frozen=True)
class Sampled:
    """The documents, and their tokens in all."""

    documents: list[str]
    tokens: int


def sample(path: Path, settings: Sampling, tell: Callable[[int], None] = lambda done: None) -> Sampled:
    """What the model at ``path`` writes; ``tell`` gets the number of tokens so far.

    Each document begins with a token drawn evenly from the ordinary ones and is drawn from the model's own distribution from there on,
    without control tokens.  It ends where the model ends it, or with ``ctx`` tokens.  Same file, settings and machine, same text.
    MobeError, with the program's output, if the runtime fails to run the file.
    """
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-") as folder:
        out = Path(folder) / "sampled.json"
        run_apart(__name__, path, json.dumps(asdict(settings)), out=out, on_line=lambda line: tell(int(line)))
        return Sampled(**json.loads(out.read_text(encoding="utf-8")))


class Documents:
    """The documents that are written, one in each of ``settings.parallel`` places, and those that are done.

    ``start``: tokens that begin every document and are no part of its text.  ``first``: tokens that may come next.
    """

    def __init__(self, settings: Sampling, start: Sequence[int], first: Sequence[int]):
        self.settings, self.start, self.first = settings, list(start), first
        self._random = np.random.default_rng(settings.seed)
        self.done: list[list[int]] = []
        self.tokens = 0
        self.open = [self._new() for _ in range(settings.parallel)]

    def _new(self) -> list[int]:
        self.tokens += 1
        return [int(self._random.choice(self.first))]

    def put(self, place: int, token: int | None) -> bool:
        """The document at ``place`` goes on with ``token``, or ends (None); whether another one begins there."""
        document = self.open[place]
        if token is not None:
            document.append(token)
            self.tokens += 1
            if len(self.start) + len(document) < self.settings.ctx:
                return False
        self.done.append(document)
        self.open[place] = self._new()
        return True

    @property
    def enough(self) -> bool:
        return self.tokens >= self.settings.tokens

    def all(self) -> list[list[int]]:
        """Those that are done, then those that are not."""
        return self.done + self.open


class Writer:
    """A loaded model and ``settings.parallel`` sequences of it."""

    def __init__(self, path: str, settings: Sampling):
        import llama_cpp
        from llama_cpp import _offload

        llama_cpp.llama_backend_init()
        self.lib, self.settings = llama_cpp, settings
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = settings.gpu_layers
        places = _offload.overrides(None, settings.cpu_moe, settings.n_cpu_moe)
        if places is not None:
            options.tensor_buft_overrides = ctypes.addressof(places)
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), options)
        if not self.model:
            raise SystemExit(f"Error: {path} cannot be loaded")
        if not llama_cpp.llama_model_has_decoder(self.model):
            raise SystemExit(f"Error: {path} is an encoder, it writes no text")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.context = self._new_context()
        self.batch = llama_cpp.llama_batch_init(2 * settings.parallel, 0, 1)

    def _new_context(self) -> Any:
        own = self.settings
        options = self.lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max = own.ctx * own.parallel, own.parallel
        options.n_batch = max(options.n_batch, 2 * own.parallel)
        options.swa_full = False
        options.n_threads = options.n_threads_batch = own.threads or len(os.sched_getaffinity(0))
        context = self.lib.llama_init_from_model(self.model, options)
        if not context:
            raise SystemExit(
                f"Error: there is no memory for {own.parallel} sequences of {own.ctx} tokens; give fewer --parallel"
            )
        return context

    def tokens_with(self, attributes: int) -> list[int]:
        """The vocabulary's tokens that have any of the attributes."""
        lib = self.lib
        count = lib.llama_vocab_n_tokens(self.vocab)
        return [i for i in range(count) if lib.llama_vocab_get_attr(self.vocab, i) & attributes]

    def ends(self, token: int) -> bool:
        """Whether the token ends a document."""
        return bool(self.lib.llama_vocab_is_eog(self.vocab, token))

    def start(self) -> list[int]:
        """What the model expects before a text."""
        begins = self.lib.llama_vocab_get_add_bos(self.vocab)
        return [self.lib.llama_vocab_bos(self.vocab)] if begins else []

    @contextmanager
    def samplers(self, forbidden: Sequence[int]) -> Iterator[list[Any]]:
        """One for each sequence; none draws a token of ``forbidden``."""
        lib, own = self.lib, self.settings
        biases = (lib.llama_logit_bias * len(forbidden))(*((token, -np.inf) for token in forbidden))
        chains = []
        for seed in np.random.SeedSequence(own.seed).generate_state(own.parallel):
            chains.append(lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params()))
            for part in (
                lib.llama_sampler_init_logit_bias(
                    lib.llama_vocab_n_tokens(self.vocab), len(forbidden), biases
                ),
                lib.llama_sampler_init_temp(own.temperature),
                lib.llama_sampler_init_dist(int(seed)),
            ):
                lib.llama_sampler_chain_add(chains[-1], part)
        try:
            yield chains
        finally:
            for chain in chains:
                lib.llama_sampler_free(chain)

    def run(self, parts: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Feed each sequence its ``(position, tokens)``; a position of 0 begins it anew.  Where the last logits of each are."""
        batch, memory, last = self.batch, self.lib.llama_get_memory(self.context), []
        batch.n_tokens = 0
        for sequence, (position, tokens) in enumerate(parts):
            if position == 0:
                self.lib.llama_memory_seq_rm(memory, sequence, -1, -1)
            for i, token in enumerate(tokens):
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + i, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, i == len(tokens) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if failed := self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"Error: llama_decode fails with code {failed}")
        return last

    def text(self, tokens: Sequence[int]) -> str:
        """Characters of which the document has only a part are left out, and so are control tokens."""
        given, size = (ctypes.c_int32 * len(tokens))(*tokens), 64 * len(tokens) + 64
        while True:
            room = ctypes.create_string_buffer(size)
            n = self.lib.llama_detokenize(self.vocab, given, len(tokens), room, size, True, False)
            if n >= 0:
                return room.raw[:n].decode("utf-8", errors="ignore")
            size = -n


def write(writer: Writer, settings: Sampling, tell: Callable[[int], None]) -> Documents:
    """The documents of a model; ``tell`` gets the number of tokens so far, every TELL seconds and at the end."""
    lib = writer.lib
    special = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN | lib.LLAMA_TOKEN_ATTR_UNUSED
    forbidden = [token for token in writer.tokens_with(special) if not writer.ends(token)]
    first = [token for token in writer.tokens_with(lib.LLAMA_TOKEN_ATTR_NORMAL) if not writer.ends(token)]
    if not first:
        raise SystemExit("Error: the vocabulary has no ordinary tokens to begin with")
    documents = Documents(settings, writer.start(), first)
    told, new = time.monotonic(), [True] * settings.parallel
    with writer.samplers(forbidden) as samplers:
        while not documents.enough:
            parts = []
            for place, document in enumerate(documents.open):
                whole = [*documents.start, *document]
                parts.append((0, whole) if new[place] else (len(whole) - 1, whole[-1:]))
            for place, at in enumerate(writer.run(parts)):
                token = lib.llama_sampler_sample(samplers[place], writer.context, at)
                new[place] = documents.put(place, None if writer.ends(token) else token)
            if documents.enough or time.monotonic() > told + TELL:
                told = time.monotonic()
                tell(documents.tokens)
    return documents


def main(path: str, given: str, out: str) -> None:
    from llama_cpp import _logger

    settings = Sampling(**json.loads(given))
    _logger.set_verbose(True)  # the reasons of a failure
    writer = Writer(path, settings)
    documents = write(writer, settings, lambda done: print(done, flush=True))
    texts = [writer.text(document) for document in documents.all()]
    found = Sampled([text for text in texts if text], documents.tokens)
    Path(out).write_text(json.dumps(asdict(found)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
