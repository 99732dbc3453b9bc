"""Run the reference once, then compare each file with its predictions."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import describe_size
from mobe_gguf.core.progress import Bar, bar, say
from mobe_gguf.evaluate import logits, parse, tool
from mobe_gguf.evaluate.experts import ExpertsKept
from mobe_gguf.evaluate.facts import Facts, facts_of
from mobe_gguf.evaluate.parse import Divergence, Estimate
from mobe_gguf.evaluate.vocabulary import count_tokens, read_vocabulary

TOOL = "llama-perplexity"

#: Options for the reference and every file, whatever the environment says (``LLAMA_ARG_UBATCH`` and the like).  Other
#: values change the result by more than good files differ.  KL divergence of the shipped model in f16 from itself:
#: below 1e-6 with the same settings, 5e-6 with ``-ub 128``, 2.9e-5 without flash attention, 1.3e-4 with a q8_0 cache.
FIXED = ("-b", "2048", "-ub", "512", "-fa", "on", "-ctk", "f16", "-ctv", "f16")

#: With fewer evaluated tokens than this the program prints no statistics.
LEAST_SCORED = 100


@dataclass(frozen=True)
class EvalSettings:
    """``ctx``: tokens of a chunk, whose second half is evaluated.  ``chunks``: how many chunks of the text, None for
    all.

    ``threads``: None leaves the number to llama.cpp.  ``options``: more of llama.cpp's options, for all files, such as
    ``("-ngl", "99", "--cpu-moe")``.  ``experts``: all files run once more, on the CPU, for :attr:`Row.kept`.
    """

    ctx: int = 512
    chunks: int | None = None
    threads: int | None = None
    options: tuple[str, ...] = ()
    experts: bool = False

    def arguments(self) -> tuple[str, ...]:
        threads = () if self.threads is None else ("-t", str(self.threads))
        return ("-c", str(self.ctx), *FIXED, *threads, *self.options)

    def origin(self, reference: Path, text: Path) -> dict[str, object]:
        """Everything that determines the reference's logits; shows whether kept logits can be used again."""
        return {
            "reference": _sample(reference),
            "text": hashlib.sha256(text.read_bytes()).hexdigest(),
            "settings": " ".join((*FIXED, *self.options)),
        }


@dataclass(frozen=True)
class Row:
    """One file: its sizes, and its distance from the reference.

    ``chunks`` of text were run and ``scored`` tokens evaluated, in ``seconds``.  ``kept``: share of tokens that have the same
    experts in both, by layer; empty if it was not asked for.
    """

    facts: Facts
    divergence: Divergence
    chunks: int
    scored: int
    seconds: float
    kept: Mapping[int, float] = field(default_factory=dict)


def heldout() -> Path:
    """The evaluation text that ships with the project; its tiny model was not trained on it."""
    path = resources.path("models") / "heldout.txt"
    if not path.is_file():
        raise MobeError(f"{path}: this installation lacks the held-out text; name one with --text")
    return path


def compare(
    reference: str | os.PathLike[str],
    files: Iterable[str | os.PathLike[str]],
    text: str | os.PathLike[str],
    settings: EvalSettings = EvalSettings(),
    *,
    keep_logits: str | os.PathLike[str] | None = None,
    reuse_logits: bool = False,
    quiet: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """How the predictions of each GGUF file on ``text`` differ from those of ``reference``; in the order of ``files``.

    Everything is checked before anything runs, as far as possible.  The reference's logits go to ``keep_logits``, or to
    a temporary file.  With ``reuse_logits`` they are in ``keep_logits`` already; those of another reference, text or
    other settings are refused.  ``on_row`` gets each row at once, so a failure loses no earlier rows. Raises MobeError
    if a file is not a model of the reference's vocabulary, the text is too short, there is no room for the logits, or
    llama-perplexity fails.
    """
    reference, text, paths = Path(reference), Path(text), [Path(file) for file in files]
    runtime.tool(TOOL)
    origin, facts = facts_of(reference), [facts_of(file) for file in paths]
    n_vocab = _check_vocabularies(reference, paths, quiet)
    chunks = _chunks(reference, text, settings)
    if origin.context is not None and settings.ctx > origin.context and not quiet:
        say(
            f"warning: chunks of {settings.ctx} tokens, but {reference} was trained on {origin.context} at most; "
            f"ask for --ctx {origin.context}"
        )
    layout = logits.LogitsLayout(n_vocab, settings.ctx, chunks)
    rows = []
    with (
        logits.place(layout, Path(keep_logits) if keep_logits is not None else None) as base,
        bar("eval", chunks * (1 + len(paths)), quiet) as progress,
    ):
        if reuse_logits:
            layout.check_origin(base, settings.origin(reference, text))
            progress.found(chunks)
        else:
            with atomic_path(base) as part:
                _write_logits(reference, text, part, layout, settings, progress)
                layout.sign(part, settings.origin(reference, text))
        chosen = (
            ExpertsKept(reference, text, settings.ctx, chunks, settings.threads) if settings.experts else None
        )
        for file in facts:
            started = time.monotonic()
            found = _divergence(file.path, base, layout, settings, progress)
            kept = chosen.shares(file.path) if chosen is not None else {}
            rows.append(Row(file, found, chunks, layout.scored, time.monotonic() - started, kept))
            progress.advance(
                0,
                f"{file.path.name}: KL divergence {found.kl.value:.5f}, {rows[-1].seconds:.1f} s",
            )
            if on_row is not None:
                on_row(rows[-1])
    return rows


def perplexity(
    file: str | os.PathLike[str], text: str | os.PathLike[str], settings: EvalSettings = EvalSettings()
) -> Estimate:
    """Perplexity of one GGUF file on ``text``.  Raises MobeError as :func:`compare` does."""
    file, text = Path(file), Path(text)
    facts_of(file)
    chunks = _chunks(file, text, settings)
    arguments = ("-m", str(file), "-f", str(text), "--chunks", str(chunks), *settings.arguments())
    done = tool.run(TOOL, *arguments)
    found = parse.perplexity(done.stdout + done.stderr)
    if found is None:
        raise done.failure(f"{TOOL} -m {file} gave no final estimate:")
    return found


def _sample(path: Path) -> str:
    """Size and checksum of the first and the last megabyte of a file: tells models apart without reading them whole."""
    size, part = path.stat().st_size, 1 << 20
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(part))
        file.seek(max(0, size - part))
        digest.update(file.read(part))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def _check_vocabularies(reference: Path, files: list[Path], quiet: bool) -> int:
    """Size of the vocabulary, which all files must share; MobeError if they do not."""
    expected = read_vocabulary(reference)
    for file in files:
        found = read_vocabulary(file)
        found.check_same(expected)
        if found.begin != expected.begin and not quiet:
            say(
                f"warning: {file} begins a text with token {found.begin}, {reference} with {expected.begin}: the "
                "numbers include what that changes"
            )
    return len(expected.tokens)


def _chunks(model: Path, text: Path, settings: EvalSettings) -> int:
    """How many chunks to run.  UsageError if the text has too few, MobeError if it cannot be read."""
    if settings.ctx < 4 or (settings.chunks is not None and settings.chunks < 1):
        raise UsageError(
            f"--ctx {settings.ctx}, --chunks {settings.chunks}: expected at least 4 tokens and 1 chunk"
        )
    try:
        content = text.read_bytes()
    except OSError as e:
        raise MobeError(f"{text}: cannot be read: {e.strerror or e}; name a text with --text") from e
    n_tokens, ctx = count_tokens(model, content), settings.ctx
    there = n_tokens // ctx
    wanted = there if settings.chunks is None else settings.chunks
    if n_tokens < 2 * ctx or wanted > there:
        # llama-perplexity needs text for two chunks, even to run one
        needed = max(2, wanted) * ctx
        fewer = f", --chunks {there}" if there >= 2 else ""
        raise UsageError(
            f"{text}: it has {n_tokens} tokens, {there} chunks of {ctx}, but {needed} are needed for "
            f"{max(2, wanted)} chunks. Give a longer --text, a smaller --ctx{fewer}."
        )
    if wanted * logits.scored(ctx) < LEAST_SCORED:
        enough = -(-LEAST_SCORED // logits.scored(ctx))
        raise UsageError(
            f"--ctx {ctx}, --chunks {wanted}: {wanted * logits.scored(ctx)} tokens would be evaluated, at least "
            f"{LEAST_SCORED} are needed: --chunks {enough}"
        )
    return wanted


def _write_logits(
    reference: Path,
    text: Path,
    base: Path,
    layout: logits.LogitsLayout,
    settings: EvalSettings,
    progress: Bar,
) -> None:
    """Run the reference and write its predictions to ``base``."""
    progress.update(reference.name)
    started = time.monotonic()
    count = parse.Chunks(parse.PERPLEXITY_CHUNK, lambda _: progress.advance(1))
    arguments = ("-m", str(reference), "-f", str(text), "--chunks", str(layout.chunks))
    done = tool.run(
        TOOL, *arguments, *settings.arguments(), "--kl-divergence-base", str(base), on_stdout=count.feed
    )
    if not base.is_file() or not base.stat().st_size:
        raise done.failure(f"{TOOL} -m {reference} wrote no logits:")
    layout.check(base)
    progress.advance(layout.chunks - count.last)
    spent = time.monotonic() - started
    progress.advance(0, f"{reference.name}: {describe_size(layout.n_bytes)} of logits, {spent:.1f} s")


def _divergence(
    file: Path, base: Path, layout: logits.LogitsLayout, settings: EvalSettings, progress: Bar
) -> Divergence:
    """Run one file against ``base``."""
    progress.update(file.name)
    count = parse.Chunks(parse.DIVERGENCE_CHUNK, lambda _: progress.advance(1))
    arguments = ("-m", str(file), "--kl-divergence", "--kl-divergence-base", str(base), *settings.arguments())
    done = tool.run(TOOL, *arguments, on_stdout=count.feed)
    try:
        found = parse.divergence(done.stdout)
    except parse.ParseError as e:
        raise done.failure(f"{TOOL} -m {file}: {e} after {count.last} of {layout.chunks} chunks:") from e
    progress.advance(layout.chunks - count.last)
    return found
