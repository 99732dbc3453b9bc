"""Moments of a GGUF file: those of the directory that it was made of; q8_0's nearly."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from mobe_gguf.calibrate import heard
from mobe_gguf.calibrate import moments as module
from mobe_gguf.calibrate.experts import ExpertForm
from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core.errors import UsageError
from mobe_gguf.export import Recipe, export
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.checkpoint import Checkpoint

pytestmark = pytest.mark.runtime


def gathered(path, text, out, source="gguf, dequantized", **options) -> Moments:
    about = collect(path, text, out, ctx=32, chunks=4, keep=1, quiet=True, **options)
    assert about["source"] == (source if path.is_file() else "safetensors")
    return Moments(out)


@pytest.mark.parametrize(
    ("family", "quant", "tolerance"), [("qwen3_moe", "f32", 1e-3), ("qwen2_moe", "q8_0", 0.1)]
)
def test_same_as_the_directory(family, quant, tolerance, model, text, tmp_path):
    export(model(family), tmp_path / "m.gguf", Recipe(quant), dense=True, quiet=True)
    got = gathered(tmp_path / "m.gguf", text, tmp_path / "gguf")
    expected = gathered(model(family), text, tmp_path / "hf")
    assert set(got.names) == set(expected.names)
    for name in got.names:
        a, b = (m.find(name).root for m in (got, expected))
        a, b = a @ a.mT * got.scale(name), b @ b.mT * expected.scale(name)
        assert float((a - b).norm() / b.norm()) < tolerance, name


FAMILIES = (
    "olmoe",
    "deepseek_v2",
    "gpt_oss",
    "granitemoe",
    "nemotron_h",
    "llama4_text",
    "mixtral",
    "qwen3_5_moe_text",
)
#: Families whose experts' activation llama.cpp computes otherwise than as one of four functions: the router's weight alone counts.
NO_SLOPES = ("gpt_oss", "nemotron_h")


def values(moments, name):
    found = moments.find(name)
    return (found.root @ found.root.mT).double() * moments.scale(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_runs_the_others(family, model, text, tmp_path, monkeypatch):
    """The same inputs of every matrix that both have."""
    path, out = model(family), tmp_path / "m.gguf"
    export(path, out, Recipe("f32"), dense=True, quiet=True)
    if family in NO_SLOPES:
        monkeypatch.setattr(ExpertForm, "slope", lambda self, product, squares: torch.ones(len(product)))
    monkeypatch.setattr(heard, "GgufTokenizer", lambda path: AutoTokenizer.from_pretrained(model(family)))
    monkeypatch.setattr(module, "GgufTokenizer", lambda path: AutoTokenizer.from_pretrained(model(family)))
    expected = gathered(path, text, tmp_path / "hf")
    got = gathered(out, text, tmp_path / "gguf", "gguf, run by llama.cpp")
    for layer in Checkpoint(path).moe_layers:  # a token may lie between two experts
        name = f"blk.{layer}.ffn_down_exps.weight"
        assert int((got.tokens(name) - expected.tokens(name)).abs().sum()) <= 4
    both = [name for name in expected.names if name in got]
    for part in ("ffn_gate_exps", "ffn_down_exps", "attn_output"):
        part = "ffn_up_exps" if part == "ffn_gate_exps" and family == "nemotron_h" else part
        assert any(part in name for name in both), part
    for name in both:
        if got.shape(name)[:2] == expected.shape(name)[:2]:
            mine, theirs = values(got, name), values(expected, name)
            assert float((mine - theirs).norm() / theirs.norm()) < (0.05 if family == "gpt_oss" else 0.01), (
                name
            )


def test_a_group_of_layers_is_not_run_again(model, text, tmp_path, monkeypatch):
    export(model("olmoe"), tmp_path / "m.gguf", Recipe("q8_0"), dense=True, quiet=True)
    run, runs = heard.run_apart, []

    def one(*args, **options):
        if runs:
            raise KeyboardInterrupt
        runs.append(run(*args, **options))

    with monkeypatch.context() as m:
        m.setattr(heard, "run_apart", one)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path / "m.gguf", text, tmp_path / "m", ctx=32, chunks=4, memory=1, quiet=True)
    collect(tmp_path / "m.gguf", text, tmp_path / "m", ctx=32, chunks=4, memory=1, quiet=True, resume=True)
    collect(tmp_path / "m.gguf", text, tmp_path / "whole", ctx=32, chunks=4, quiet=True)
    assert (tmp_path / "m").read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_llama_cpp_does_not_do_is_told(model, text, tmp_path):
    export(model("olmoe"), tmp_path / "m.gguf", Recipe("q8_0"), dense=True, quiet=True)
    with pytest.raises(
        UsageError, match="llama.cpp runs a GGUF file of olmoe, on the CPU and without gradients"
    ):
        collect(tmp_path / "m.gguf", text, tmp_path / "o", gradients=True, quiet=True)
