"""Recognizing pre-tokenizers: by their definition, and by what llama.cpp then makes of a text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.export import Recipe, export
from mobe_gguf.export.tokenizer import DIGITS, GPT2, KNOWN, Known, recognize
from mobe_gguf.formats.gguf import read_gguf

#: Where the pre-tokenizers differ: contractions, digits, line ends, capitals, other scripts, marks, punctuation.
TEXT = (
    "Hello World! I'VE said it's 1234567 or 3.14;  don't\n\n   indent\t\ttabs \r\n end   \n"
    "CamelCaseHTTPServer snake_case x=y+1 /usr/bin «цитата» Привет 123 ¿qué? naïve "
    "日本語テスト中文字符 한국어 العربية 😀👍🏽 --- ... !?!? (a)[b]{c} $100 50%\n"
)
MARKS = "e\u0301te\u0301 हिन्दी\n"

#: llama.cpp stands in ``[^a-z]`` for "a letter or mark that is no small letter" here, which is not the same for marks.
INEXACT = ("tekken", "gpt-4o")


def definition(known: Known) -> dict[str, Any]:
    """The ``pre_tokenizer`` of a tokenizer.json that splits as ``known``."""
    splits = list(known.splits)
    use_regex = splits[-1] == GPT2
    steps: list[dict[str, Any]] = [
        {"type": "Digits", "individual_digits": True}
        if split == DIGITS
        else {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in splits[: -1 if use_regex else None]
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [*steps, last]} if steps else last


@pytest.fixture
def retokenized(model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``retokenized(change)``: a model whose tokenizer.json went through ``change``."""

    def get(change: Callable[[dict[str, Any]], None]) -> Path:
        target = tmp_path / "model"
        shutil.copytree(model("qwen3_moe", num_hidden_layers=1, vocab_size=640), target)
        path = target / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return target

    return get


def retrain(path: Path, pre_tokenizer: dict[str, Any]) -> None:
    """Give tokenizer.json in ``path`` this pre-tokenizer, and merges learned with it."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    content = json.loads((path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = pre_tokenizer
    tokenizer = Tokenizer.from_str(json.dumps(content))
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(TEXT + MARKS) * 3], trainer)
    tokenizer.save(str(path / "tokenizer.json"))


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_llama_cpp_tokenizes_the_same(known: Known, retokenized: Callable[..., Path], tmp_path: Path) -> None:
    """Each definition of the table is recognized, and the name it gets makes llama.cpp split as ``tokenizers`` does."""
    from llama_cpp import Llama
    from tokenizers import Tokenizer

    source = retokenized(lambda content: None)
    retrain(source, definition(known))
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = known.ignore_merges
    (source / "tokenizer.json").write_text(json.dumps(content))

    report = export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert report.tokenizer_pre == known.name and "tokenizer.json" in str(report.tokenizer_why)
    assert read_gguf(tmp_path / "out.gguf").keys["tokenizer.ggml.pre"] == known.name
    llama = Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    theirs = Tokenizer.from_file(str(source / "tokenizer.json"))
    theirs.normalizer = None  # llama.cpp has no NFC
    for line in (TEXT, *TEXT.splitlines(keepends=True), *[MARKS][: known.name not in INEXACT]):
        expected = theirs.encode(line, add_special_tokens=False).ids
        assert llama.tokenize(line.encode(), add_bos=False, special=False) == expected, line


def test_spellings(tmp_path: Path) -> None:
    """The same definition written otherwise: escapes, an inverted removal, contractions spelled out."""
    (qwen2,) = (known for known in KNOWN if known.name == "qwen2")
    pre = definition(qwen2)
    step = pre["pretokenizers"][0]
    step["pattern"]["Regex"] = step["pattern"]["Regex"].replace(r"\r\n", "\r\n").replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    )  # fmt: skip
    step |= {"behavior": "Removed", "invert": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": pre, "model": {"type": "BPE"}}))
    assert recognize(tmp_path).name == "qwen2"


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"type": "Unigram"}}, "Unigram"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "ByteLevel"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "space in front"),
        ({"pre_tokenizer": BYTE_LEVEL, "normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": BYTE_LEVEL, "model": {"ignore_merges": True}}, "ignore_merges"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTE_LEVEL]}},
            "Punctuation",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": "x+"},
                            "behavior": "Isolated",
                            "invert": False,
                        },
                        BYTE_LEVEL,
                    ],
                }
            },
            "x+ then",
        ),
        ({}, "ByteLevel"),
    ],
)
def test_unlike_any(content: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MobeError) as e:
        recognize(tmp_path)
    assert words in e.value.message and "--tokenizer-pre" in e.value.message


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"pre_tokenizer": 3}', '{"pre_tokenizer": {"pretokenizers": 1}}']
)
def test_broken_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(MobeError, match=r"tokenizer\.json"):
        recognize(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MobeError, match="--tokenizer-pre"):
        recognize(tmp_path)


def test_unknown_tokenizer_and_the_option(retokenized: Callable[..., Path], tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\P{L}+"

    source, out = retokenized(change), tmp_path / "out.gguf"
    with pytest.raises(MobeError, match="--tokenizer-pre NAME"):
        export(source, out, Recipe("f32"), allow_dense=True, quiet=True)
    assert not out.exists()
    report = export(source, out, Recipe("f32"), allow_dense=True, quiet=True, tokenizer_pre="tekken")
    assert report.tokenizer_pre == "tekken" and "--tokenizer-pre" in str(report.tokenizer_why)
    assert read_gguf(out).keys["tokenizer.ggml.pre"] == "tekken"
    with pytest.raises(UsageError, match="llama-bpe, "):
        export(source, out, Recipe("f32"), allow_dense=True, quiet=True, tokenizer_pre="nonsense")


def test_known_to_the_converter(
    retokenized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the converter recognizes by its hash is not second-guessed."""
    from mobe_gguf import runtime

    runtime.use_conversion()
    import conversion.base

    monkeypatch.setattr(conversion.base.TextModel, "get_vocab_base_pre", lambda self, tokenizer: "stablelm2")
    report = export(
        retokenized(lambda content: None), tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True
    )
    assert report.tokenizer_pre == "stablelm2" and "converter" in str(report.tokenizer_why)
