"""Which of llama.cpp's pre-tokenizers a ``tokenizer.json`` describes.

``tokenizer.ggml.pre`` names how text is split before byte-pair merging.  llama.cpp's converter finds the name by a
hash over one text's tokens, so it refuses a vocabulary that it has not seen, even one that splits as Qwen2's does.
Here the splitting itself is compared.  The ``pre_tokenizer`` of tokenizer.json is brought to a canonical form, a
sequence of regular expressions, and looked up in a table of those that llama.cpp implements.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobe_gguf.core.errors import MobeError, UsageError

#: What ByteLevel splits by when its ``use_regex`` is on (tokenizers, pre_tokenizers/byte_level.rs).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"\p{N}"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"
DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK_PUNCTUATION = r"\s?[!-/:-~" "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
# the Latin, Greek, Cyrillic, Armenian, Georgian, ... letters, in the order of the tokenizer.json of deepseek-llm
DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)


@dataclass(frozen=True)
class Known:
    """One pre-tokenizer of llama.cpp: its name, its splits in order, and the ``ignore_merges`` that it sets."""

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False


#: Sources: the tokenizer.json files of the models that convert_hf_to_gguf_update.py lists, and the originals quoted in
#: the comments of ``llm_tokenizer_bpe`` (src/llama-vocab.cpp).  If several names mean the same, the plainest is here.
KNOWN = (
    Known("qwen2", (QWEN2,)),
    Known(
        "qwen35",
        (QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),),
    ),
    Known("llama-bpe", (LLAMA3,), ignore_merges=True),
    Known("smaug-bpe", (LLAMA3,)),
    Known("gpt-2", (GPT2,)),
    Known("starcoder", (DIGITS, GPT2)),
    Known("deepseek-v3", (r"\p{N}{1,3}", KANA, DEEPSEEK_WORDS)),
    Known("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGITS)),
    Known(
        "deepseek-llm",
        (r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", CJK, DIGITS),
    ),
    Known("tekken", (rf"{UPPER}*{LOWER}+|{UPPER}+{LOWER}*|\p{{N}}|{SLASH_TAIL}",), ignore_merges=True),
    Known(
        "gpt-4o",
        (rf"{UPPER}*{LOWER}+{CONTRACTIONS}?|{UPPER}+{LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}|{SLASH_TAIL}",),
    ),
    Known(
        "bailingmoe",
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
)

#: Normalizers that do not change the tokens of ordinary text; llama.cpp does not normalize for byte-level BPE.
HARMLESS_NORMALIZERS = (None, "NFC")


@dataclass(frozen=True)
class Recognized:
    """The value for ``tokenizer.ggml.pre`` and, in a few words, the reason."""

    name: str
    why: str


#: Names in the converter's list that are not byte-level BPE; the runtime refuses them for a byte-level BPE vocabulary.
WORDPIECE = ("bert-bge", "bert-bge-large", "jina-v2-en")


def known_names(converter_source: str) -> tuple[str, ...]:
    """Every name that the pinned converter gives, from the source text of its ``get_vocab_base_pre``."""
    names = dict.fromkeys(re.findall(r'res = "([^"]+)"', converter_source))
    if "llama-bpe" not in names:
        raise MobeError(
            "get_vocab_base_pre of the pinned llama.cpp has another form now: tokenizer.known_names reads it"
        )
    return tuple(sorted(set(names) - set(WORDPIECE)))


def check_name(name: str, known: tuple[str, ...]) -> Recognized:
    """The user's ``--tokenizer-pre``; UsageError lists the names if llama.cpp does not know it."""
    if name not in known:
        raise UsageError(
            f"--tokenizer-pre {name}: llama.cpp knows no such pre-tokenizer. Known: {', '.join(known)}."
        )
    return Recognized(name, "as --tokenizer-pre says")


def recognize(model_dir: Path) -> Recognized:
    """The pre-tokenizer that ``model_dir/tokenizer.json`` describes.

    MobeError, naming ``--tokenizer-pre``, if there is no such file or llama.cpp implements nothing like it.
    """
    path = model_dir / "tokenizer.json"
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(definition, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError as e:
        raise _unknown(path, "there is no such file") from e
    except (ValueError, OSError, RecursionError) as e:
        raise MobeError(f"{path}: cannot be read as JSON: {e}") from e
    try:
        splits, ignore_merges = _canonical(definition)
    except _Unlike as e:
        raise _unknown(path, str(e)) from e
    except (AttributeError, TypeError, KeyError) as e:
        raise MobeError(
            f"{path}: not a tokenizer definition as the tokenizers library writes them: {e}"
        ) from e
    same = [known for known in KNOWN if tuple(map(_normal, known.splits)) == splits]
    for known in same:
        if known.ignore_merges == ignore_merges:
            return Recognized(known.name, "its pre_tokenizer in tokenizer.json is the same")
    if same:
        raise _unknown(
            path,
            f"it splits as '{same[0].name}' does, but has ignore_merges {str(ignore_merges).lower()} "
            f"where that has {str(same[0].ignore_merges).lower()}",
        )
    raise _unknown(path, "its pre_tokenizer splits by " + " then ".join(splits))


class _Unlike(Exception):
    """tokenizer.json holds something that none of llama.cpp's byte-level BPE pre-tokenizers has."""


def _unknown(path: Path, why: str) -> MobeError:
    return MobeError(
        f"{path}: llama.cpp's converter does not know this tokenizer, and {why}. "
        f"If you know one that splits the same way, name it: --tokenizer-pre NAME (for instance "
        f"{', '.join(known.name for known in KNOWN[:5])})."
    )


def _canonical(definition: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    """The splits of a tokenizer.json in order, normalized, and its ``ignore_merges``."""
    model = definition.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise _Unlike(f"its model is {model.get('type')}, not byte-level BPE")
    normalizer = (definition.get("normalizer") or {}).get("type")
    if normalizer not in HARMLESS_NORMALIZERS:
        raise _Unlike(f"it normalizes text by {normalizer}")
    pre = definition.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise _Unlike("its pre_tokenizer does not end in ByteLevel")
    if steps[-1].get("add_prefix_space"):
        raise _Unlike("its ByteLevel adds a space in front")
    splits = [_split(step) for step in steps[:-1]]
    if steps[-1].get("use_regex", True):
        splits.append(GPT2)
    return tuple(map(_normal, splits)), bool(model.get("ignore_merges", False))


def _split(step: dict[str, Any]) -> str:
    """The regular expression that one step isolates."""
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return DIGITS
    if step.get("type") != "Split":
        raise _Unlike(f"its pre_tokenizer has a step {step.get('type')}")
    pattern = step.get("pattern") or {}
    # removing what does not match is the same as isolating what does: these expressions match all text
    isolates = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
    if "Regex" not in pattern or not isolates:
        raise _Unlike(f"its Split by {pattern} is {step.get('behavior')}, invert {step.get('invert')}")
    return pattern["Regex"]


def _normal(regex: str) -> str:
    """One spelling for equal expressions: escapes for line ends, case folding written out."""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n").replace(r"\p{N}{1}|", r"\p{N}|")
    spelled = "(?:" + "|".join(f"'{_both(c)}" for c in ("s", "t", "re", "ve", "m", "ll", "d")) + ")"
    return regex.replace(spelled, CONTRACTIONS)


def _both(word: str) -> str:
    return "".join(f"[{c}{c.upper()}]" for c in word)
