"""Tokenizers that come as a tiktoken rank file and a Python class (Kimi-K2's), read without running the class.

``tiktoken.model`` has a line ``base64(token) rank`` for each token.  Special tokens follow the last rank.  Their names
are in ``added_tokens_decoder`` of tokenizer_config.json; one without a name is ``<|reserved_token_ID|>``.  Only the
code says how text is split before merging, so only the class whose splitting llama.cpp implements is accepted.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.export.tokenizer import Recognized

#: ``auto_map`` of tokenizer_config.json -> llama.cpp's name for that splitting.
CLASSES = {"tokenization_kimi.TikTokenTokenizer": "kimi-k2"}

RANKS = "tiktoken.model"


@dataclass(frozen=True)
class Tiktoken:
    """What llama.cpp's converter asks of an object of the class: ``model._mergeable_ranks``, ``special_tokens``."""

    model: SimpleNamespace
    special_tokens: dict[str, int]
    recognized: Recognized


def read(model_dir: Path) -> Tiktoken | None:
    """The tokenizer of ``model_dir``; None if it is not of a known class, MobeError if its files are damaged."""
    config = _json(model_dir / "tokenizer_config.json")
    auto = (config.get("auto_map") or {}).get("AutoTokenizer") or ()
    named = [auto] if isinstance(auto, str) else auto
    pre = next((CLASSES[name] for name in named if name in CLASSES), None)
    path = model_dir / RANKS
    if pre is None or not path.is_file():
        return None
    ranks = _ranks(path)
    vocab_size = _json(model_dir / "config.json").get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < len(ranks):
        raise MobeError(
            f"{path}: {len(ranks)} tokens, but config.json has vocab_size {vocab_size}; they are of different models"
        )
    names = {i: f"<|reserved_token_{i}|>" for i in range(len(ranks), vocab_size)}
    added = config.get("added_tokens_decoder") or {}
    ids = sorted(int(number) for number in added if str(number).isdecimal())
    if len(ids) < len(added) or (ids and (ids[0] != len(ranks) or ids[-1] >= vocab_size)):
        raise MobeError(
            f"{model_dir}/tokenizer_config.json: added_tokens_decoder has the ids {', '.join(list(added)[:3])}, ...; expected "
            f"{len(ranks)} (the number of tokens in {RANKS}) to {vocab_size - 1}. One of the files is cut off or of "
            "another model."
        )
    names |= {int(number): token["content"] for number, token in added.items()}
    why = f"its class is {next(name for name in named if name in CLASSES)}, its tokens are those of {RANKS}"
    special = {name: number for number, name in names.items()}
    return Tiktoken(SimpleNamespace(_mergeable_ranks=ranks), special, Recognized(pre, why))


def _ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank; MobeError unless the ranks are 0, 1, 2, ... and every single byte is a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as e:
            raise MobeError(
                f"{path}: line {number} is not 'base64 rank': {line[:40]!r}. Download it again."
            ) from e
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise MobeError(
            f"{path}: {len(ranks)} tokens, whose ranks are not 0 to {len(ranks) - 1}, or which lack some of the 256 "
            "bytes. The file is cut off or damaged; download it again."
        )
    return ranks


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as e:
        raise MobeError(f"{path}: cannot be read as JSON: {e}") from e
    return value if isinstance(value, dict) else {}
