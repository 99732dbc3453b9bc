"""Families beyond those that every test goes through: read in both saved forms, factorized, exported, calibrated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from calibrate.test_layers import gathered, whole
from export.handmade import make_mobe

from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.export.agreement import agreement
from mobe_gguf.factorize import job
from mobe_gguf.factorize.spec import Options
from mobe_gguf.models.checkpoint import Checkpoint
from parity.llama import logits, nmse
from parity.reference import multiply_out, transformers_logits
from parity.test_parity import LIMIT, to_gguf

Maker = Callable[..., Path]

#: The gated delta rule is computed in blocks by one and step by step by the other: 1e-9 of the logits' energy.
LIMITS = {"qwen3_next": 1e-8, "qwen3_5_moe_text": 1e-8, "qwen3_5_moe": 1e-8}

#: Factorized files: one that has everything, and one for each way in which families differ.
FACTORS = {
    "glm4_moe": dict(projections=ALL_PROJECTIONS),
    "lfm2_moe": dict(activation="none", m=2, r=56, projections=ALL_PROJECTIONS),
    "ernie4_5_moe": dict(activation="silu", r=40),
    "minimax_m2": dict(g=2),
    "gpt_oss": dict(projections=ALL_PROJECTIONS),
    "granitemoe": dict(activation="silu", projections=("up",)),
    "qwen3_5_moe_text": dict(activation="none", projections=ALL_PROJECTIONS),
}


#: Families of which files with factors are not compared here.
DENSE = ("llama4_text", "nemotron_h", *tiny._SEEING)


def tokens(n: int = 33) -> list[int]:
    return np.random.default_rng(0).integers(tiny._SIZES["vocab_size"], size=n).tolist()


@pytest.mark.parametrize("family", [*tiny._MORE, *tiny._SEEING])
def test_as_transformers(family: str, model: Maker, tmp_path: Path) -> None:
    """Experts in a tensor each, and all in one, as they are and as factors."""
    source, fused = model(family, seed=1), model(family, seed=1, fused=True)
    truth = transformers_logits(source, tokens())
    limit = LIMITS.get(family, LIMIT)
    for path in (source, fused):
        Checkpoint(path).check_whole()
        found = logits(to_gguf(path, tmp_path / "dense.gguf"), tokens(), [33])[33]
        assert nmse(truth, found) < limit, path
    assert Checkpoint(fused).is_fused(Checkpoint(fused).moe_layers[0], "down")
    if family in DENSE:
        return
    mobe = make_mobe(source, tmp_path / "mobe", **FACTORS.get(family, {}))
    truth = transformers_logits(multiply_out(mobe, tmp_path / "dense", source), tokens())
    got = logits(to_gguf(mobe, tmp_path / "mobe.gguf"), tokens(), [33, 1])
    assert max(nmse(truth, x) for x in got.values()) < limit


@pytest.mark.parametrize("family", [f for f in tiny._MORE if f not in DENSE])
def test_moments_factors_file(family: str, model: Maker, tmp_path: Path) -> None:
    """The whole path, from the fused form: moments as by hooks on the whole model, factors of them, a file that agrees."""
    source = model(family, seed=1, fused=True)
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 6)
    expected = whole(source, text)
    moments = gathered(source, text, tmp_path / "moments.safetensors")
    layers = Checkpoint(source).moe_layers
    assert {f"blk.{i}.ffn_{x}_exps.weight" for i in layers for x in ALL_PROJECTIONS} <= set(expected)
    for name, s in expected.items():
        found = moments.find(name)
        mine = (found.root @ found.root.mT).double() * moments.scale(name)
        assert found.rest is None and float((mine - s).norm() / s.norm()) < 1e-3, name
    options = Options(
        moments=str(tmp_path / "moments.safetensors"), bases=2, rank=48, activation="none", steps=2
    )
    job.run(job.prepare(source, tmp_path / "mobe", options), quiet=True)
    agreed = agreement(to_gguf(tmp_path / "mobe", tmp_path / "out.gguf"), tmp_path / "mobe", 1)
    assert not agreed.problems, agreed.problems
    assert json.loads((tmp_path / "mobe" / "config.json").read_text())["num_B"] == 2


@pytest.mark.parametrize("family", ["llama4_text", "nemotron_h"])
def test_moments(family: str, model: Maker, tmp_path: Path) -> None:
    """Inputs that are scaled before the experts, and experts without gate: moments as by hooks on the whole model."""
    source = model(family, seed=1, fused=True)
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 6)
    expected = whole(source, text)
    assert {f"blk.1.ffn_{x}_exps.weight" for x in Checkpoint(source).family.kinds} <= set(expected)
    moments = gathered(source, text, tmp_path / "moments.safetensors")
    for name, s in expected.items():
        found = moments.find(name)
        mine = (found.root @ found.root.mT).double() * moments.scale(name)
        assert found.rest is None and float((mine - s).norm() / s.norm()) < 1e-3, name
