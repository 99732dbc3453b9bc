"""Fits for factors that will be rounded: what they reach, and that export finds nothing left to round."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.factorize.plan import settle
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.factorize.spec import Options, resume_settings
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.quant.roundtrip import noise, resolve, rounded, settled
from mobe_gguf.runtime import ggml

from .test_solver import reconstruct, shared_structure

TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("scale", [1e-2, 1.0])
def test_settled_values_stay_and_are_about_as_near(name, scale):
    x = scale * torch.randn(2, 32, 256, generator=torch.Generator().manual_seed(1))
    y = settled(x, name)
    assert torch.equal(rounded(y, name), y)

    def error(z):
        return float((z - x).square().sum() / x.square().sum())

    assert 0 < error(y) < 1.1 * error(rounded(x, name))
    if scale == 1.0:
        assert error(rounded(x, name)) == pytest.approx(noise(name), rel=0.05)


@pytest.mark.parametrize(
    "name, row, expected",
    [("q4_k", 256, "q4_k"), ("Q4_K", 96, "q5_0"), ("q3_k", 1408, "q4_0"), ("q4_0", 48, "f16"), ("q8_0", 64, "q8_0")],
)  # fmt: skip
def test_types_follow_exports_rule(name, row, expected):
    assert resolve("--for", name, row) == expected


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("q9", 256, "--for q9: unknown type"),
        ("q4_k_m", 256, "a mixture of types"),
        ("iq2_xs", 256, "importance matrix of the factors"),
        ("q1_0", 96, "rows of 96 are no whole blocks of 128"),
    ],
)
def test_types_that_cannot_be_fitted_for(name, row, message):
    with pytest.raises(UsageError, match=message):
        resolve("--for", name, row)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_knowing_of_the_rounding_pays(weighted, groups):
    w = shared_structure(n=12, p=32, d=64, m=4, r=32)
    weight = torch.logspace(0, -1, 64) if weighted else None
    settings = Settings(4, 32, groups, steps=80)
    plain = fit(w, settings, weight=weight)
    known = fit(w, replace(settings, basis_type="q4_0", transform_type="q4_0"), weight=weight)
    for factor in (known.basis, known.transform):
        assert factor.dtype == torch.float32 and torch.equal(rounded(factor, "q4_0"), factor)
    naive = replace(plain, basis=rounded(plain.basis, "q4_0"), transform=rounded(plain.transform, "q4_0"))

    def error(f):
        rest = w - reconstruct(f, settings)
        return float(((rest.square() * (1 if weight is None else weight)).sum()) / w.square().sum())

    assert error(known) < 0.55 * error(naive)
    assert known.error == pytest.approx(
        float((w - reconstruct(known, settings)).square().sum() / w.square().sum()), rel=1e-4
    )


@pytest.mark.parametrize("only", ["basis_type", "transform_type"])
def test_one_factor_alone(only):
    w = shared_structure(p=32, d=64, r=32)
    f = fit(w, Settings(3, 32, steps=3, **{only: "q5_0"}))
    stays = {
        name: torch.equal(rounded(x, "q5_0"), x)
        for name, x in vars(f).items()
        if name in ("basis", "transform")
    }
    assert stays == {"basis": only == "basis_type", "transform": only == "transform_type"}


def test_same_seed_same_rounded_factors():
    w, settings = shared_structure(p=32, d=64, r=32), Settings(3, 32, steps=12, basis_type="q4_0")
    a, b = fit(w, settings), fit(w, settings)
    assert (
        torch.equal(a.basis, b.basis) and torch.equal(a.mix, b.mix) and torch.equal(a.transform, b.transform)
    )


def test_rounded_factors_are_stored_exactly(model):
    checkpoint = Checkpoint(model("qwen3_moe", dtype=torch.bfloat16))
    assert settle(Options(), checkpoint).dtype == "bf16"
    assert settle(Options(for_basis="q4_0"), checkpoint).dtype == "f32"
    with pytest.raises(UsageError, match="must be stored as f32: leave out --dtype"):
        settle(Options(for_basis="q4_0", dtype="bf16"), checkpoint)


def test_a_resumed_job_is_for_the_same_types(model):
    old = settle(Options(for_basis="q4_k", for_transform="q8_0"), Checkpoint(model("qwen3_moe")))
    assert resume_settings(old, Options(for_basis="q4_k")) == old
    with pytest.raises(MobeError, match="--for-transform is q4_k now, but .* started with q8_0"):
        resume_settings(old, Options(for_transform="q4_k"))


def test_export_writes_the_very_values(model, tmp_path):
    """--for q4_k: rows of 64 become q5_0, rows of 32 too; export chooses the same and changes nothing."""
    out, gguf = tmp_path / "mobe", tmp_path / "model.gguf"
    result = CliRunner().invoke(
        main, ["factorize", str(model("qwen3_moe")), str(out), "--rank", "32", "--steps", "4", "--layers", "1",
               "--for", "q4_k", "--for-transform", "q8_0"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "fitted to be exported as: bases q5_0 (q4_k does not fit rows of 64), A q8_0" in result.stderr
    assert "--basis-type q4_k --transform-type q8_0" in result.stderr
    about = json.loads((out / "config.json").read_text())["mobe"]["settings"]
    assert (about["for_basis"], about["for_transform"], about["dtype"]) == ("q4_k", "q8_0", "f32")
    result = CliRunner().invoke(
        main,
        [
            "export",
            str(out),
            str(gguf),
            "--quant",
            "q4_k",
            "--basis-type",
            "q4_k",
            "--transform-type",
            "q8_0",
            "--no-refit",
        ],
    )
    assert result.exit_code == 0, result.stderr
    layer = MobeCheckpoint(out).layer(1)
    file = read_gguf(gguf)

    def values(name: str, type_name: str) -> torch.Tensor:
        info = file.tensors[name]
        assert info.type.lower() == type_name
        data = np.fromfile(gguf, np.uint8, info.n_bytes, offset=info.offset).reshape(*info.shape[:-1], -1)
        return torch.from_numpy(ggml.dequantize(data, type_name, info.shape[-1]))

    for name, type_name, expected in (
        ("blk.1.ffn_up_basis.weight", "q5_0", layer.basis("up")),
        ("blk.1.ffn_up_exps.weight", "q8_0", torch.stack([layer.transform("up", e) for e in range(8)])),
    ):
        assert torch.equal(values(name, type_name), expected), name
