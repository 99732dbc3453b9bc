"""``verify --model``: the first layers of file and model agree, or the layer and the key where they part are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from models.editing import edit_config

from export.handmade import make_mobe
from mobe_gguf.cli import main
from mobe_gguf.export import Recipe, export
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models import config_values

Maker = Callable[..., Path]


def verify(file: Path, model: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(file), "--model", str(model), *more])


@pytest.fixture
def dense(model: Maker, tmp_path: Path) -> tuple[Path, Path]:
    """DeepSeek-V3: its first layer has no experts."""
    export(model("deepseek_v3"), tmp_path / "dense.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    return tmp_path / "dense.gguf", model("deepseek_v3")


def test_agrees(dense: tuple[Path, Path]) -> None:
    done = verify(*dense, "--layers", "1", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["layers"] == 2 and found["graph_error"] < 1e-10 and found["file_error"] < 1e-10


def test_layer_that_parts(dense: tuple[Path, Path]) -> None:
    file, source = dense
    info = read_gguf(file).tensors["blk.2.ffn_up_exps.weight"]
    data = np.memmap(file, np.float32, "r+", info.offset, (info.n_bytes // 4,))
    data *= 1.5
    data.flush()
    done = verify(file, source)
    assert done.exit_code == 1 and "layer 2 is the first to part from the model" in done.stderr, done.stderr


def test_key_that_differs(dense: tuple[Path, Path]) -> None:
    file, source = dense
    begin, end = read_gguf(file).key_spans["deepseek2.attention.layer_norm_rms_epsilon"]
    with open(file, "r+b") as f:
        f.seek(end - 4)
        f.write(np.float32(0.01).tobytes())
    done = verify(file, source, "--layers", "1")
    assert done.exit_code == 1 and "deepseek2.attention.layer_norm_rms_epsilon is 0.00999" in done.stderr, (
        done.stderr
    )


def test_graph_of_another_model(own_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``export`` refuses, were it not in its tables."""
    source = own_model("qwen3_moe")
    export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    edit_config(source, norm_topk_prob=False)
    monkeypatch.setattr(config_values, "judge", lambda family, config: config_values.Judgement())
    done = verify(tmp_path / "out.gguf", source, "--layers", "1")
    assert done.exit_code == 1 and "layer 0 is the first to part from transformers" in done.stderr, (
        done.stderr
    )


def test_factors(model: Maker, tmp_path: Path) -> None:
    """A file agrees with the factors that it was made of; against the original only keys and graph are judged."""
    source = model("mixtral")
    mobe = make_mobe(source, tmp_path / "mobe", m=3)
    export(mobe, tmp_path / "mobe.gguf", Recipe("f32"), quiet=True)
    done = verify(tmp_path / "mobe.gguf", mobe, "--layers", "1", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["file_error"] < 1e-8, (done.stdout, done.stderr)
    done = verify(tmp_path / "mobe.gguf", source, "--layers", "1")
    assert done.exit_code == 0 and "its factors too far from the model, for a verdict" in done.stderr, (
        done.stderr
    )


def test_models_that_cannot_be_compared(model: Maker, dense: tuple[Path, Path], tmp_path: Path) -> None:
    done = verify(dense[0], model("bailing_moe"))
    assert done.exit_code == 2 and "transformers does not know bailing_moe" in done.stderr


def test_export_compares_what_it_wrote(
    own_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, with the number of experts that was asked for; what would take long is left to ``verify``."""
    source = own_model("qwen3_moe", num_hidden_layers=1)

    def run(*more: str) -> Result:
        arguments = ["export", str(source), str(tmp_path / "out.gguf"), "--dense", "--quant", "f32", *more]
        return CliRunner().invoke(main, arguments)

    done = run("--experts-used", "3")
    assert done.exit_code == 0 and "first 1 layers: llama.cpp in float32 differs" in done.stderr, done.stderr
    assert "differs" not in run("--no-verify").stderr
    with monkeypatch.context() as patch:
        patch.setattr("mobe_gguf.export.agreement.QUICK", 1000)
        assert "mobe-gguf verify" in run().stderr
    monkeypatch.setattr(config_values, "judge", lambda family, config: config_values.Judgement())
    edit_config(source, norm_topk_prob=False)
    done = run()
    assert done.exit_code == 1 and "do not use it: layer 0 is the first to part" in done.stderr, done.stderr


def test_layers_of_every_kind_of_attention(model: Maker, tmp_path: Path) -> None:
    """Llama-4's fourth layer is the first without chunks; lists of layers are cut with them."""
    command = ["export", str(model("llama4_text")), str(tmp_path / "out.gguf"), "--dense", "--quant", "f32"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and "first 4 layers: llama.cpp in float32 differs" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decoder_sparse_step": 0}, "transformers cannot run the model's first layers: ZeroDivisionError"),
        ({"num_key_value_heads": 3}, "wrong shape"),
    ],
)
def test_what_transformers_or_the_runtime_cannot_run(
    change: dict[str, int], said: str, own_model: Maker, tmp_path: Path
) -> None:
    """One line that says why, and nothing of Python's."""
    source = own_model("qwen3_moe", num_hidden_layers=1)
    edit_config(source, **change)
    command = ["export", str(source), str(tmp_path / "out.gguf"), "--dense", "--quant", "q8_0", "-q"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and said in done.stderr.replace("\n", " "), done.output
    assert "raise " not in done.stderr and "Traceback" not in done.stderr
