"""The calibration text as chunks of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.calibrate.skeleton import unloadable
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError, UsageError

#: Keys that hold the chat in a line of a .jsonl file -> keys of a message's role and content.
CHATS = {
    "messages": ("role", "content"),
    "conversations": ("from", "value"),
    "conversation": ("from", "value"),
}
#: Other names of the roles.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def default_texts() -> list[Path]:
    """The texts that ship with the project: prose, documentation, code, dialogue, mathematics, many languages."""
    models = resources.path("models")
    return [models / "calibration.txt", *sorted((models / "calibration").glob("*.txt"))]


def read_tokens(
    model: Path, texts: Sequence[Path], ctx: int, chunks: int | None, n_vocab: int
) -> torch.Tensor:
    """``[chunks, ctx]`` token ids: those of :func:`read_chunks`, one file after the other."""
    return torch.cat(list(read_chunks(model, texts, ctx, chunks, n_vocab).values()))


def read_chunks(
    model: Path, texts: Sequence[Path], ctx: int, chunks: int | None, n_vocab: int, tokenizer: Any = None
) -> dict[Path, torch.Tensor]:
    """For each file, ``[chunks, ctx]`` token ids; an incomplete chunk at its end is dropped.

    With several files, the ``chunks`` are divided in proportion to the files' text.  Each line of a ``.jsonl`` file is a chat
    (``{"messages": [{"role": ..., "content": ...}]}``, or ``conversations`` with ``from`` and ``value``), to which the
    model's chat template is applied, or a text (``{"text": ...}``).  All other files are plain text.  ``tokenizer``: instead of
    transformers' of the model.
    MobeError or UsageError if a file or the tokenizer cannot be read, the tokenizer is another model's, or there is too
    little text.
    """
    from transformers import AutoTokenizer

    contents = [(path, list(_read(path))) for path in texts]
    try:
        where = {"gguf_file": model.name} if model.is_file() else {}
        folder = model.parent if model.is_file() else model
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
    except Exception as e:  # transformers raises all sorts of errors here
        raise unloadable(model, "its tokenizer", e) from e
    tokenizer.model_max_length = int(1e12)  # else it warns of a text longer than the model's context
    ids = {path: _encode(tokenizer, path, parts) for path, parts in contents}
    largest = max((int(x.max()) for x in ids.values() if len(x)), default=0)
    if largest >= n_vocab:
        raise MobeError(
            f"{model}: its tokenizer gives token {largest}, the model knows {n_vocab}; the tokenizer is another model's. Download "
            "tokenizer.json again."
        )
    cut = {path: x[: len(x) // ctx * ctx].view(-1, ctx) for path, x in ids.items()}
    total, there = sum(map(len, ids.values())), sum(map(len, cut.values()))
    if there < (chunks or 1):
        raise UsageError(
            f"{', '.join(map(str, texts))}: {total} tokens, {there} chunks of {ctx}; expected {chunks or 1} at least. Give a longer "
            "--text, a smaller --ctx or fewer --chunks."
        )
    taken = _shares([len(c) for c in cut.values()], chunks or there)
    return {path: c[:n] for (path, c), n in zip(cut.items(), taken, strict=True)}


def _shares(sizes: list[int], total: int) -> list[int]:
    """``total`` divided in proportion to ``sizes``, in whole numbers."""
    ends = [round(sum(sizes[: i + 1]) * total / sum(sizes)) for i in range(len(sizes))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _read(path: Path) -> Iterator[Any]:
    """The file's texts, and its chats as lists of messages."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise MobeError(f"{path}: cannot be read: {e.strerror or e}; give another text") from e
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield _record(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
                raise MobeError(
                    f'{path}, line {number}: expected {{"messages": [{{"role": "user", "content": "..."}}, ...]}} or '
                    f'{{"text": "..."}} ({type(e).__name__}: {e})'
                ) from e


def _record(record: Any) -> Any:
    for key, (role, content) in CHATS.items():
        if key in record:
            chat = [{"role": ROLES.get(m[role], m[role]), "content": m[content]} for m in record[key]]
            if not chat or not all(isinstance(x, str) for m in chat for x in m.values()):
                raise ValueError("roles and contents must be text")
            return chat
    if not isinstance(record["text"], str):
        raise ValueError("'text' must be text")
    return record["text"]


def _encode(tokenizer: Any, path: Path, parts: list[Any]) -> torch.Tensor:
    found: list[int] = []
    for part in parts:
        if isinstance(part, str):
            found += tokenizer(part).input_ids
            continue
        if tokenizer.chat_template is None:
            raise MobeError(f"{path}: it holds chats, but the model has no chat template; give plain text")
        try:
            text = tokenizer.apply_chat_template(part, tokenize=False)
        except Exception as e:  # a template is a program of the model and may raise anything
            said = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise MobeError(f"{path}: the model's chat template refuses a chat: {said}") from e
        found += tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor(found, dtype=torch.long)
