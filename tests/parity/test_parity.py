"""Whole models: the logits of a MoBE file in llama.cpp against transformers with the experts multiplied out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export.handmade import make_mobe
from safetensors.torch import load_file, save_file
from tiny import make_model

from mobe_gguf.core import resources
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.export import Recipe, export
from mobe_gguf.models.families import family_of
from parity.llama import logits, nmse
from parity.reference import multiply_out, transformers_logits

#: Normalized squared error of the logits; a stock build against transformers, ordinary experts: 5e-13.
LIMIT = 1e-10

#: The same products, added in another order.
IDENTITY_LIMIT = 1e-12

#: Tokens at once: more than four an expert (k 2 of n 8), so that tiles are shared; tokens a call of the other runs.
N_TOKENS, STEPS = 33, (33, 3, 1)


@dataclass
class Case:
    """A family's tiny random model (``tests/tiny.py``) with random factors (``tests/export/handmade.py``)."""

    name: str
    family: str
    model: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("qwen3_moe", "qwen3_moe"),
    Case("qwen3_moe-row-mix", "qwen3_moe", factors=dict(by_row=True, r=40, activation="silu")),
    Case("qwen3_moe-mixed-file", "qwen3_moe", factors=dict(layers=(1,), projections=("up",))),
    Case("qwen2_moe-p40", "qwen2_moe", dict(moe_intermediate_size=40), dict(activation="silu")),
    Case("deepseek_v2", "deepseek_v2", factors=dict(activation="none")),
    Case("deepseek_v3-2-groups", "deepseek_v3", factors=dict(g=2)),
    Case("deepseek_v3-r32", "deepseek_v3", factors=dict(r=32, activation="silu")),
    Case("bailing_moe", "bailing_moe", factors=dict(activation="silu")),
    Case("olmoe-r24-2-groups", "olmoe", factors=dict(r=24, g=2)),
    Case("mixtral", "mixtral", factors=dict(m=3, activation="none")),
    Case("qwen3_moe-down", "qwen3_moe", factors=dict(projections=ALL_PROJECTIONS)),
    Case("qwen2_moe-down-alone", "qwen2_moe", factors=dict(projections=("down",), layers=(1,), r=24)),
    Case("deepseek_v3-down-2-groups", "deepseek_v3", factors=dict(g=2, r=32, projections=ALL_PROJECTIONS)),
    Case(
        "olmoe-down-row-mix",
        "olmoe",
        factors=dict(by_row=True, r=40, activation="silu", projections=("up", "down")),
    ),
    Case(
        "mixtral-down-linear-row-mix",
        "mixtral",
        factors=dict(m=3, by_row=True, activation="none", projections=ALL_PROJECTIONS),
    ),
    # ggml's own products; of the prompt, seven of the bases at a time
    Case(
        "qwen3_moe-down-linear",
        "qwen3_moe",
        factors=dict(m=19, activation="none", projections=ALL_PROJECTIONS),
    ),
    Case(
        "deepseek_v3-down-linear",
        "deepseek_v3",
        factors=dict(m=4, r=32, activation="none", projections=("down",)),
    ),
    # bases wider than the experts: p 48, d 64
    Case("qwen3_moe-wide", "qwen3_moe", factors=dict(m=2, r=64, projections=ALL_PROJECTIONS)),
    Case("qwen2_moe-wide-linear", "qwen2_moe", factors=dict(m=2, r=56, activation="none")),
    Case(
        "deepseek_v3-wide-down-linear",
        "deepseek_v3",
        factors=dict(m=3, r=61, activation="none", projections=ALL_PROJECTIONS),
    ),
    Case("olmoe-wide-2-groups", "olmoe", factors=dict(m=2, r=60, g=2, projections=ALL_PROJECTIONS)),
    Case(
        "mixtral-wide-row-mix",
        "mixtral",
        factors=dict(m=2, r=56, by_row=True, activation="silu", projections=ALL_PROJECTIONS),
    ),
    Case(
        "bailing_moe-wide-molae",
        "bailing_moe",
        factors=dict(m=1, r=58, activation="none", projections=ALL_PROJECTIONS),
    ),
    Case(
        "olmoe-down-linear-2-groups",
        "olmoe",
        factors=dict(g=2, activation="none", projections=ALL_PROJECTIONS),
    ),
]


def tokens_of(config: dict[str, Any]) -> list[int]:
    return np.random.default_rng(0).integers(config["vocab_size"], size=N_TOKENS).tolist()


def to_gguf(model: Path, out: Path, quant: str = "f32") -> Path:
    export(model, out, Recipe(quant), allow_dense=True, quiet=True)
    return out


def compare(original: Path, mobe: Path, tmp_path: Path) -> dict[int, float]:
    """Error of the MoBE checkpoint ``mobe``, made from ``original``, for each way to cut the prompt."""
    dense = multiply_out(mobe, tmp_path / "dense", original)
    config = json.loads((dense / "config.json").read_text())
    tokens = tokens_of(config)
    if config["model_type"] == "bailing_moe":
        # transformers does not know it; llama.cpp on the ordinary experts is what there is to compare with
        truth = logits(to_gguf(dense, tmp_path / "dense.gguf"), tokens, [N_TOKENS])[N_TOKENS]
    else:
        truth = transformers_logits(dense, tokens)
    got = logits(to_gguf(mobe, tmp_path / "mobe.gguf"), tokens, STEPS)
    return {step: nmse(truth, got[step]) for step in STEPS}


def check(errors: dict[int, float], limit: float) -> None:
    text = "normalized squared error by tokens a call: " + ", ".join(
        f"{n}: {e:.1e}" for n, e in errors.items()
    )
    print(text)  # pytest -rP shows it
    assert max(errors.values()) < limit, text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_families(case, tmp_path):
    original = make_model(case.family, tmp_path / "original", seed=1, **case.model)
    mobe = make_mobe(original, tmp_path / "mobe", **case.factors)
    check(compare(original, mobe, tmp_path), LIMIT)


def test_shipped_model(tmp_path):
    original = resources.path("models") / "tiny-moe"
    mobe = make_mobe(original, tmp_path / "mobe", m=6)
    check(compare(original, mobe, tmp_path), LIMIT)


def test_published_layout(tmp_path):
    """As the authors publish: bf16, no ``mobe`` key, a class of their own in ``architectures``."""
    original = make_model("qwen3_moe", tmp_path / "original", seed=2, dtype=torch.bfloat16)
    mobe = make_mobe(
        original,
        tmp_path / "mobe",
        dtype=torch.bfloat16,
        activation="silu",
        architectures=["Qwen3MoBEForCausalLM"],
    )
    assert "mobe" not in json.loads((mobe / "config.json").read_text())
    check(compare(original, mobe, tmp_path), LIMIT)


def test_quantized(tmp_path):
    """Factors in blocks, A repacked where llama.cpp does that: the prompt's path and the token's give the same.

    How far quantizing moves the logits of a random model says little, for routers flip; a wrong layout says 1 or more.
    """
    sizes = dict(hidden_size=256, moe_intermediate_size=256)
    mobe = make_mobe(make_model("qwen3_moe", tmp_path / "original", seed=4, **sizes), tmp_path / "mobe")
    tokens = tokens_of(json.loads((mobe / "config.json").read_text()))
    truth = logits(to_gguf(mobe, tmp_path / "f32.gguf"), tokens, [N_TOKENS])[N_TOKENS]
    for quant, limit in (("q8_0", 0.1), ("q4_k_m", 0.8)):
        got = logits(to_gguf(mobe, tmp_path / "quantized.gguf", quant), tokens, STEPS)
        check({step: nmse(truth, got[step]) for step in STEPS}, limit)  # measured 0.03, 0.4
        # a prompt may be multiplied in bf16, 6e-6 of the operator's result: 6e-4 and 0.03 of these logits, where routers flip
        check({step: nmse(got[N_TOKENS], got[step]) for step in STEPS}, limit / 10)
        check({step: nmse(got[1], got[step]) for step in STEPS if step < 4}, 1e-4)  # rounding of activations


@pytest.mark.parametrize("quant", ["q4_0", "q4_k_m"])
def test_wide_and_few_quantized(quant, tmp_path):
    """Bases of gate and up are one matrix, repacked like ordinary ones: what the plain order of the same file gives."""
    sizes = dict(hidden_size=256, moe_intermediate_size=128)
    original = make_model("qwen3_moe", tmp_path / "original", seed=4, **sizes)
    mobe = make_mobe(original, tmp_path / "mobe", m=2, r=256, activation="none")
    tokens = tokens_of(json.loads((mobe / "config.json").read_text()))
    path = to_gguf(mobe, tmp_path / "quantized.gguf", quant)
    got, plain = logits(path, tokens, STEPS), logits(path, tokens, STEPS, repack=False)
    check({step: nmse(plain[step], got[step]) for step in STEPS}, 1e-4)
    check({step: nmse(got[1], got[step]) for step in STEPS if step < 4}, 1e-4)  # rounding of activations


def svd_like(original: Path, mobe: Path, **factors: Any) -> Path:
    """Random factors in the form that an SVD of each expert has: a basis each, mixed by the identity; returns ``mobe``."""
    make_mobe(original, mobe, m=8, activation="none", **factors)
    tensors = load_file(mobe / "model.safetensors")
    mixes = {name: torch.eye(8) for name in tensors if name.rsplit(".", 1)[-1].startswith("W_")}
    assert mixes
    save_file(tensors | mixes, mobe / "model.safetensors")
    return mobe


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_a_basis_each(family, tmp_path):
    original = make_model(family, tmp_path / "original", seed=5)
    check(compare(original, svd_like(original, tmp_path / "mobe", r=16), tmp_path), LIMIT)


@pytest.mark.parametrize("quant", ["q4_0", "q4_k_m"])
def test_a_basis_each_quantized(quant, tmp_path):
    """Types that llama.cpp repacks for products by ids, as these are, but not for a plain one, which the loader asks for."""
    sizes = dict(hidden_size=256, moe_intermediate_size=256)
    original = make_model("qwen3_moe", tmp_path / "original", seed=4, **sizes)
    mobe = svd_like(original, tmp_path / "mobe")
    tokens = tokens_of(json.loads((mobe / "config.json").read_text()))
    truth = logits(to_gguf(mobe, tmp_path / "f32.gguf"), tokens, [N_TOKENS])[N_TOKENS]
    got = logits(to_gguf(mobe, tmp_path / "quantized.gguf", quant), tokens, STEPS)
    check({step: nmse(truth, got[step]) for step in STEPS}, 0.8)  # measured 0.4: see test_quantized
    check({step: nmse(got[1], got[step]) for step in STEPS}, 1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_identity(family, tmp_path):
    """One basis an expert that is the expert itself, mixed by the identity, A the identity, f none: nothing changes."""
    original = make_model(family, tmp_path / "original", seed=3)
    mobe = make_mobe(original, tmp_path / "mobe", m=8, activation="none")
    _make_identity(original, mobe)
    tokens = tokens_of(json.loads((original / "config.json").read_text()))
    truth = logits(to_gguf(original, tmp_path / "original.gguf"), tokens, STEPS)
    got = logits(to_gguf(mobe, tmp_path / "mobe.gguf"), tokens, STEPS)
    check({step: nmse(truth[step], got[step]) for step in STEPS}, IDENTITY_LIMIT)


def _make_identity(original: Path, mobe: Path) -> None:
    config = json.loads((original / "config.json").read_text())
    family, n = family_of(config), 8
    experts, tensors = load_file(original / "model.safetensors"), load_file(mobe / "model.safetensors")
    for layer in family.moe_layers(config):
        for projection in ("gate", "up"):
            weights = [family.expert_weight(layer, e, projection) for e in range(n)]
            tensors[family.basis(layer, projection)] = torch.stack([experts[name] for name in weights])
            tensors[family.mix(layer, projection)] = torch.eye(n)
            tensors |= {name: torch.eye(family.n_ff_exp(config)) for name in weights}
    save_file(tensors, mobe / "model.safetensors")
