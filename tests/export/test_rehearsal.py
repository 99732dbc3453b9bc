"""llama.cpp's loader is asked about a large file's head before its data are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result
from models.editing import edit_config

from export.handmade import make_mobe
from mobe_gguf.cli import main
from mobe_gguf.export import rehearsal

Maker = Callable[..., Path]


@pytest.fixture(autouse=True)
def _every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LONG", 0)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def without_merges(source: Path) -> None:
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = []
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda source: edit_config(source, num_attention_heads=3), "tensor 'blk.0.attn_q.weight' has wrong shape"),
        (lambda source: edit_config(source, num_key_value_heads=4), "tensor 'blk.0.attn_k.weight' has wrong shape"),
        (without_merges, "cannot find tokenizer merges"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["factorize", "export", "compress"])
def test_refused_before_the_work(
    command: str, damage: Any, said: str, own_model: Maker, tmp_path: Path
) -> None:
    source, out = own_model("qwen3_moe", num_hidden_layers=1), tmp_path / "out.gguf"
    damage(source)
    options = {"export": ["--dense", "--quant", "f32", "--no-verify"], "compress": ["--quant", "q4_0"]}
    done = run(command, source, out, *options.get(command, []), "-q")
    assert done.exit_code == 1 and f"{source}: the runtime would not run a file of it" in done.stderr, (
        done.output
    )
    assert said in done.stderr and not out.exists() and not list(tmp_path.glob("out.gguf.work/*.safetensors"))


@pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
def test_what_runs_is_not_refused(family: str, model: Maker, tmp_path: Path) -> None:
    done = run(
        "export", model(family), tmp_path / "out.gguf", "--dense", "--quant", "f16", "--no-verify", "-q"
    )
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("options", [["--quant", "q8_0"], ["--quant", "f16", "--split-max-size", "100K"]])
def test_factors_and_shards(options: list[str], model: Maker, tmp_path: Path) -> None:
    factors = make_mobe(model("qwen3_moe"), tmp_path / "factors")
    done = run("export", factors, tmp_path / "out.gguf", *options, "-q")
    assert done.exit_code == 0 and list(tmp_path.glob("out*.gguf")), done.stderr
