"""``mobe-gguf convert``: a family that is not read as a directory becomes a GGUF file that all else takes; refusals in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from mobe_gguf.cli import main
from mobe_gguf.formats.gguf import read_model
from mobe_gguf.models.gguf_source import GgufModel


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family that is not read as a directory, which the converter knows by its architecture: experts in linear layers of
    three dimensions, tied embeddings."""
    path = tmp_path_factory.mktemp("granite") / "granite"
    config = transformers.GraniteMoeConfig(
        vocab_size=tiny._SIZES["vocab_size"], hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GraniteMoeForCausalLM(config).save_pretrained(path)
    tiny._tokenizer().save_pretrained(path)
    said = json.loads((path / "config.json").read_text()) | {"model_type": "granitemoeown"}
    (path / "config.json").write_text(json.dumps(said))
    return path


def test_the_way_that_the_refusal_names(granite: Path, tmp_path: Path) -> None:
    refused = call("factorize", granite, tmp_path / "factors")
    assert refused.exit_code == 1 and "mobe-gguf convert MODEL model.gguf" in refused.stderr
    file = tmp_path / "model.gguf"
    done = call("convert", granite, file, "--outtype", "f32")
    assert done.exit_code == 0, done.stderr
    assert "granitemoe, 8 experts in 2 layers" in done.stderr
    model = GgufModel(file)
    state = load_file(granite / "model.safetensors")
    fused = next(t for name, t in state.items() if "layers.1." in name and "output_linear" in name)
    torch.testing.assert_close(model.expert(1, "down", 5), fused[5].float())
    done = call("factorize", file, tmp_path / "factors", "--steps", 2, "-q")
    assert done.exit_code == 0, done.stderr
    done = call("export", tmp_path / "factors", tmp_path / "mobe.gguf", "--quant", "q8_0")
    assert done.exit_code == 0 and "not compared with the model" in done.output, done.output
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_types(granite: Path, tmp_path: Path) -> None:
    for outtype, expected in (("f16", "f16"), ("q8_0", "q8_0")):
        assert call("convert", granite, tmp_path / "model.gguf", "--outtype", outtype, "-q").exit_code == 0
        assert read_model(tmp_path / "model.gguf").tensors["blk.0.attn_q.weight"].type == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["NoSuchForCausalLM"]}, "does not know NoSuchForCausalLM"),
        ({"num_hidden_layers": 3}, "blk.2"),
    ],
)
def test_models_that_it_does_not_take(
    change: dict[str, object], said: str, granite: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(granite, tmp_path / "own"))
    config = json.loads((own / "config.json").read_text()) | change
    (own / "config.json").write_text(json.dumps(config))
    done = call("convert", own, tmp_path / "model.gguf")
    assert done.exit_code == 1 and re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "model.gguf").exists()


def test_code_in_the_directory_does_not_run(granite: Path, tmp_path: Path) -> None:
    own, ran = Path(shutil.copytree(granite, tmp_path / "own")), tmp_path / "ran"
    (own / "tokenization_own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    path = own / "tokenizer_config.json"
    found = json.loads(path.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
    }
    path.write_text(json.dumps(found))
    done = call("convert", own, tmp_path / "model.gguf", "--outtype", "f16")
    assert not ran.exists()
    assert done.exit_code == 0, done.stderr
    (own / "tokenizer.json").unlink()
    done = call("convert", own, tmp_path / "other.gguf", "--outtype", "f16")
    assert not ran.exists() and done.exit_code == 1 and "Traceback" not in done.stderr


def test_no_model(tmp_path: Path) -> None:
    done = call("convert", tmp_path, tmp_path / "model.gguf")
    assert done.exit_code == 1 and "expected a Hugging Face model directory" in done.stderr


@pytest.mark.parametrize(
    ("model_type", "change", "said"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "--dense --quant bf16"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ("phimoe", {}, "SparseMixer"),
    ],
)
def test_what_the_converter_would_drop(
    model_type: str, change: dict[str, object], said: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing is converted to a file that answers otherwise."""
    source = shutil.copytree(model("qwen3_moe"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": model_type} | change))
    done = call("convert", source, tmp_path / "out.gguf")
    assert done.exit_code == 1 and said in done.stderr and not (tmp_path / "out.gguf").exists()
