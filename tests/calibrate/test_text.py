"""The text as chunks of tokens: several files, chats, what ships with the project."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from mobe_gguf.calibrate import moments
from mobe_gguf.calibrate.text import default_texts, read_tokens
from mobe_gguf.core.errors import MobeError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": "How many ships?"},
                {"role": "assistant", "content": "12."},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "And small ones?"},
                {"from": "gpt", "value": "Nineteen."},
            ]
        },
        {"text": "She counted them all."},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return path


def templated(path):
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return path


def test_chats_go_through_the_models_template(own_model, chats):
    path = templated(own_model("olmoe"))
    ids = read_tokens(path, [chats], 4, None, 384).flatten()
    said = AutoTokenizer.from_pretrained(path).decode(ids)
    expected = (
        "<user>How many ships?<assistant>12.<user>And small ones?<assistant>Nineteen.She counted them all."
    )
    assert expected.startswith(said) and len(said) > len(expected) - 8


def test_each_file_gives_its_share(model, tmp_path):
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("The keeper counted 12 ships. " * 300)
    short.write_text("What she wrote that night we're still reading. " * 100)
    path = model("olmoe")
    alone = [len(read_tokens(path, [f], 16, None, 384)) for f in (long, short)]
    both = read_tokens(path, [long, short], 16, None, 384)
    assert len(both) == sum(alone)
    some = read_tokens(path, [long, short], 16, 12, 384)
    first = round(12 * alone[0] / sum(alone))
    assert some.shape == (12, 16) and 0 < first < 12
    assert (some[:first] == both[:first]).all()
    assert (some[first:] == both[alone[0] : alone[0] + 12 - first]).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: expected"),
        ('{"messages": [{"role": "user"}]}', "KeyError: 'content'"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "must be text"),
        ('{"other": 1}', "KeyError: 'text'"),
        ("[1]", "line 2: expected"),
    ],
)
def test_lines_that_are_no_chats(line, said, own_model, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(MobeError, match=said):
        read_tokens(own_model("olmoe"), [path], 2, None, 384)


def test_templates_that_are_missing_or_refuse(own_model, chats):
    path = own_model("olmoe")
    with pytest.raises(MobeError, match="the model has no chat template; give plain text"):
        read_tokens(path, [chats], 4, None, 384)
    file = path / "tokenizer_config.json"
    refuses = "{{ raise_exception('system messages only') }}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": refuses}))
    with pytest.raises(MobeError, match="chat template refuses a chat: system messages only"):
        read_tokens(path, [chats], 4, None, 384)


def test_the_default_text_is_broad(model):
    texts = default_texts()
    assert {"prose": "calibration", "code": "code"}.items() <= {
        "prose": texts[0].stem,
        "code": next(t.stem for t in texts if t.stem == "code"),
    }.items()
    assert len(texts) == 6 and sum(t.stat().st_size for t in texts) > 1_000_000
    for text in texts:
        text.read_text(encoding="utf-8")
    readme = (texts[1].parent / "README.md").read_text()
    assert all(f"`{t.name}`" in readme or f"`../{t.name}`" in readme for t in texts)


def test_experts_that_saw_little_are_named_with_the_text_that_reaches_them(model, tmp_path, monkeypatch):
    """Counts of both texts together against those of each alone: a chunk does not know the others."""
    path, texts = model("qwen3_moe"), [tmp_path / "ships.txt", tmp_path / "night.txt"]
    texts[0].write_text("The keeper counted 12 ships. " * 200)
    texts[1].write_text("What she wrote that night we're still reading. " * 40)
    alone = []
    for text in texts:
        moments.collect(path, text, tmp_path / "m", ctx=16, quiet=True)
        alone.append(tokens_seen(tmp_path / "m"))
    few = int(torch.cat([sum(counts) for counts in zip(*alone, strict=True)]).float().quantile(0.4))
    monkeypatch.setattr(moments, "FEW", few)
    about = moments.collect(path, texts, tmp_path / "m", ctx=16, quiet=True)
    found, reached = list(about["coverage"].values()), [0, 0]
    sizes = [int(counts[0].sum()) for counts in alone]
    for layer, (first, second) in zip(found, zip(*alone, strict=True), strict=True):
        expected = (first + second < few).nonzero().flatten().tolist()
        assert layer["experts"] == expected and layer["few"] == len(expected)
        reached = [
            r + int(counts[expected].sum()) for r, counts in zip(reached, (first, second), strict=True)
        ]
    rates = [r / size / (sum(reached) / sum(sizes)) for r, size in zip(reached, sizes, strict=True)]
    assert list(about["reached"].values()) == pytest.approx(rates, abs=0.01) and sum(reached)
    said = moments.report(about, tmp_path / "m")
    block, named = next((b, c["experts"]) for b, c in about["coverage"].items() if c["experts"])
    assert f"{block}: {named[0]}" in said and f"fewer than {few}" in said


def test_advice_names_the_text_that_helps() -> None:
    assert "text like code.txt, which reaches them 2.5 times" in moments._advice(
        {"prose": 0.8, "code.txt": 2.5}
    )
    assert "longer" in moments._advice({"prose": 0.9, "code.txt": 1.1})
    assert "longer" in moments._advice({"prose": 1.0})
    many = {f"blk.{i}": {"few": 9, "experts": list(range(9))} for i in (1, 3)}
    assert moments._named(many) == "blk.1: 0, 1, 2, 3, 4, 5, 6, 7, 8; blk.3: 0, 1, 2 and 6 more"


def tokens_seen(file) -> list[torch.Tensor]:
    """Of each expert, layer by layer."""
    from safetensors.torch import load_file

    return [t for name, t in sorted(load_file(file).items()) if name.endswith("gate_exps.tokens")]
