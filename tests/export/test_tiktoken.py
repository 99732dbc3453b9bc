"""Kimi-K2's kind of tokenizer: a rank file and Python code, which is not run."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mobe_gguf.core.errors import MobeError
from mobe_gguf.export import Recipe, export
from mobe_gguf.export.tiktoken import read

MERGED = [b"th", b"the", b" the", b"in", b"ing", b" ship", b"\xc3\xa9"]
WHOLE = [b" s", b"hip", b"hi", b" t"]
CODE = "from pathlib import Path\nPath(__file__).parent.joinpath('it-ran').touch()\nclass TikTokenTokenizer: pass\n"


def ranks() -> list[bytes]:
    """Tokens by rank: the bytes, then pieces before what is merged of them."""
    return [bytes([b]) for b in range(256)] + [WHOLE[2], WHOLE[1], WHOLE[0], *MERGED]


@pytest.fixture
def source(model: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "kimi"
    shutil.copytree(model("deepseek_v3"), path)
    (path / "tokenizer.json").unlink()
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks())]
    (path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    (path / "tokenization_kimi.py").write_text(CODE)
    n = len(ranks())
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": {
            str(n + i): {"content": name, "special": True}
            for i, name in enumerate(("[BOS]", "[EOS]", "<|im_end|>"))
        },
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def merged(word: bytes) -> list[int]:
    """Tokens of one word by the definition: the pair of lowest rank is merged first."""
    rank = {token: i for i, token in enumerate(ranks())}
    parts = [bytes([b]) for b in word]
    while True:
        pairs = [
            (rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in rank
        ]
        if not pairs:
            return [rank[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_it_is_read_and_runs_without_code(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = export(source, out, Recipe("f32"), allow_dense=True, quiet=True)
    assert report.tokenizer_pre == "kimi-k2" and "TikTokenTokenizer" in str(report.tokenizer_why)
    assert not list(tmp_path.rglob("it-ran")) and not list(tmp_path.rglob("__pycache__"))
    from llama_cpp import Llama

    words = [b"the", b" ship", b" the", b" sing", b" caf\xc3\xa9"]
    n = len(ranks())
    with closing(Llama(str(out), vocab_only=True, verbose=False)) as llama:
        got = llama.tokenize(b"".join(words), add_bos=False)
        assert got == [token for word in words for token in merged(word)]
        assert llama.detokenize(got) == b"".join(words)
        assert llama.tokenize(b"[EOS]", add_bos=False, special=True) == [n + 1]
        assert llama.tokenize(b"<|reserved_token_%d|>" % (n + 9), add_bos=False, special=True) == [n + 9]


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "tokenizer_config.json").read_text()) | changes
        (path / "tokenizer_config.json").write_text(json.dumps(config))

    return change


def _rank_file(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "tiktoken.model").write_bytes(change((path / "tiktoken.model").read_bytes()))

    return write


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            _config(auto_map={"AutoTokenizer": ["mine.Other", None]}),
            r"tokenization_kimi\.py.*tokenizer\.json",
        ),
        (lambda path: (path / "tiktoken.model").unlink(), r"tokenization_kimi\.py.*tokenizer\.json"),
        (_rank_file(lambda data: data[: data.index(b"\n", 2000) + 1]), "lack some of the 256"),
        (_rank_file(lambda data: data[: data.rindex(b"\n", 0, -1) + 1]), "expected 265"),
        (_rank_file(lambda data: b"* 0\n" + data), r"line 1 is not 'base64 rank'"),
        (_rank_file(lambda data: data + b"QUFB 9999\n"), "ranks are not 0 to"),
        (_config(added_tokens_decoder={"5": {"content": "[BOS]"}}), "has the ids 5, .*expected 266"),
        (lambda path: (path / "tokenizer_config.json").write_text("{"), "JSON"),
    ],
)
def test_what_is_missing_or_damaged(
    change: Callable[[Path], None], words: str, source: Path, tmp_path: Path
) -> None:
    change(source)
    with pytest.raises(MobeError, match=words):
        export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.rglob("it-ran"))


def test_other_directories_have_none(model: Callable[..., Path]) -> None:
    assert read(model("deepseek_v3")) is None and read(model("olmoe")) is None
