"""Factors of down, whose bases are on the output side: ``W_i ~ f(sum_j alpha_ij B_j) . A_i``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from formats.test_imatrix import write as write_imatrix
from formula import combine_groups

from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.formula import activate
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.factorize.down import fit_down
from mobe_gguf.factorize.job import prepare, run
from mobe_gguf.factorize.plan import Options, make_plan, plan_checkpoint, settle
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint, reconstruct
from mobe_gguf.quant.roundtrip import rounded
from mobe_gguf.runtime import ggml

from .test_solver import shared_structure

N, D, P, R = 12, 40, 24, 16


def experts(**options):
    """Down matrices ``[n, d, p]`` with bases in common."""
    return shared_structure(**options).transpose(1, 2).contiguous()


def formed(f, settings):
    """Z_i, ``[n, d, r]``."""
    return activate(combine_groups(f.mix, f.basis.float(), settings.n_group), settings.activation)


WEIGHTS = {
    "none": None,
    "diagonal": torch.logspace(0, -2, P),
    "expert": torch.rand(N, 1, P, generator=torch.Generator().manual_seed(3)) + 0.05,
    "full": (lambda x: x.T @ x)(torch.randn(2 * P, P, generator=torch.Generator().manual_seed(4))),
}


def as_matrices(weight):
    """``[n, p, d]``-shaped W weighs as ``trace(X S X^T)`` with S ``[n, p, p]``, its mean diagonal 1."""
    if weight is None:
        return torch.eye(P).expand(N, P, P)
    s = weight if weight.shape == (P, P) else torch.diag_embed(weight.reshape(-1, P)).expand(N, P, P)
    return (s / s.diagonal(dim1=-2, dim2=-1).mean()).expand(N, P, P)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("mix", ["scalar", "row"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_reported_errors_are_those_of_the_stored_factors(weight, mix, groups):
    w, settings = experts(), Settings(4, R, groups, mix=mix, steps=5, dtype=torch.bfloat16)
    f = fit_down(w.clone(), settings, weight=WEIGHTS[weight])
    assert f.basis.shape == (4, D, R) and f.transform.shape == (N, R, P)
    assert f.mix.shape == (N, 4 // groups, *((D,) if mix == "row" else ()))
    assert f.basis.dtype == f.transform.dtype == torch.bfloat16
    assert all(x.is_contiguous() for x in (f.basis, f.mix, f.transform))
    rest = w - formed(f, settings) @ f.transform.float()
    assert f.error == pytest.approx(float(rest.square().sum() / w.square().sum()), rel=1e-4)
    s = as_matrices(WEIGHTS[weight])
    weighted = [torch.einsum("ndp,npq,ndq->", x, s, x) for x in (rest, w)]
    assert f.objective == pytest.approx(float(weighted[0] / weighted[1]), rel=1e-3)


def test_without_weights_it_is_the_transposed_problem():
    w = experts()
    down, up = fit_down(w.clone(), Settings(4, R, steps=9)), fit(w.transpose(1, 2), Settings(4, R, steps=9))
    for a, b in ((down.basis, up.basis), (down.transform, up.transform)):
        assert torch.equal(a, b.transpose(1, 2))
    assert torch.equal(down.mix, up.mix) and down.error == up.error


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("mix", ["scalar", "row"])
def test_a_is_the_least_squares_solution(weight, mix):
    """Each column of A_i belongs to one input, so what the inputs weigh does not move the best A.  (Where there are weights
    it is scaled up to full size, an expert as a whole.)"""
    w, settings = experts(), Settings(4, R, mix=mix, steps=20)
    f = fit_down(w.clone(), settings, weight=WEIGHTS[weight])
    best = torch.linalg.lstsq(formed(f, settings).double(), w.double()).solution
    found = f.transform.double()
    scale = (found * best).sum((1, 2)) / best.square().sum((1, 2))
    assert torch.allclose(found, best * scale[:, None, None], rtol=2e-3, atol=2e-3 * float(best.std()))
    assert (scale - 1).abs().max() < (1e-3 if weight == "none" else 0.2)


@pytest.mark.parametrize("weight", ["diagonal", "expert", "full"])
def test_what_weighs_more_is_kept_better(weight):
    w, settings = experts(noise=0.5), Settings(3, 8, steps=60)
    s = as_matrices(WEIGHTS[weight])

    def missed(f):
        """What of W's outputs is in none of the factors', whatever their size."""
        x = formed(f, settings) @ f.transform
        xx, xw, ww = (torch.einsum("ndp,npq,ndq->", a, s, b) for a, b in ((x, x), (x, w), (w, w)))
        return 1 - float(xw**2 / (xx * ww))

    plain, aware = (fit_down(w.clone(), settings, weight=x) for x in (None, WEIGHTS[weight]))
    assert missed(aware) < 0.97 * missed(plain) and aware.error > plain.error


def test_few_terms_of_a_mix_of_rows():
    f = fit_down(experts(), Settings(4, R, mix="row", steps=20, mix_terms=2))
    assert set((f.mix != 0).any(-1).sum(1).tolist()) == {2}


@pytest.mark.parametrize("weighted", [False, True])
def test_rounding_goes_along_the_files_rows(weighted):
    """Rows of B are r long, rows of A p: 32 and 64, blocks of 32 along d = 96 would be others."""
    w = experts(n=8, p=64, d=96, m=4, r=32)
    weight = torch.logspace(0, -1, 64) if weighted else None
    settings = Settings(4, 32, steps=60, basis_type="q4_0", transform_type="q5_0")
    f = fit_down(w.clone(), settings, weight=weight)
    assert torch.equal(rounded(f.basis, "q4_0"), f.basis)
    assert torch.equal(rounded(f.transform, "q5_0"), f.transform)
    rest = w - formed(f, settings) @ f.transform
    assert f.error == pytest.approx(float(rest.square().sum() / w.square().sum()), rel=1e-4)
    plain = fit_down(w.clone(), Settings(4, 32, steps=60), weight=weight)
    naive = w - activate(combine_groups(plain.mix, rounded(plain.basis, "q4_0"), 1), "tanh") @ rounded(
        plain.transform, "q5_0"
    )
    scale = 1 if weight is None else weight
    assert float((rest.square() * scale).sum()) < 0.8 * float((naive.square() * scale).sum())


def test_types_are_resolved_for_the_files_rows():
    """Of gate the bases have rows of 256, of down of the rank."""
    settings = Settings(4, 96, basis_type="q4_k", transform_type="q4_k", transposed=True)
    assert (settings.rows(160, 256), settings.resolved(160, 256).basis_type) == ((96, 160), "q5_0")
    assert Settings(4, 96, basis_type="q4_k").resolved(160, 256).basis_type == "q4_k"
    assert Settings(4, 96, transform_type="q4_k", transposed=True).resolved(256, 512).transform_type == "q4_k"


@pytest.mark.parametrize("mix", ["scalar", "row"])
def test_a_plan_counts_what_the_checkpoint_holds(mix, model, tmp_path):
    source, out = model("deepseek_v3"), tmp_path / "mobe"
    options = Options(bases=4, groups=2, rank=32, mix=mix, steps=2, layers=(2,), projections=ALL_PROJECTIONS)
    result = run(prepare(source, out, options), quiet=True)
    assert [u.projection for u in result.units] == ["gate", "up", "down"]
    per_unit = 8 * 48 * 32 + 4 * 32 * 64
    mixing = 8 * 2 * (3 if mix == "scalar" else 32 + 32 + 64)
    assert result.plan.projected_after == 3 * per_unit + mixing
    checkpoint = MobeCheckpoint(out)
    infos = [checkpoint.info(name) for name in checkpoint.names]
    assert sum(info.numel for info in infos) == result.plan.model_after
    assert sum(info.n_bytes for info in infos) == result.plan.output_bytes

    layer = checkpoint.layer(2)
    assert layer.projections == ALL_PROJECTIONS and checkpoint.layer(1).projections == ()
    for name, shape in (
        ("B_down_0", (2, 64, 32)),
        ("W_down_1", (4, 2) if mix == "scalar" else (4, 2, 64)),
        ("experts.7.down_proj.weight", (32, 48)),
    ):
        assert checkpoint.shape(f"model.layers.2.mlp.{name}") == shape
    w = Checkpoint(source).expert_stack(2, "down")
    rest = w - reconstruct(layer, "down")
    error = float(rest.square().sum() / w.square().sum())
    recorded = checkpoint.config["mobe"]["errors"]["2"]["down"]
    assert error == pytest.approx(recorded, rel=1e-3) and error == pytest.approx(
        result.units[2].error, rel=1e-3
    )


@pytest.mark.parametrize(
    "projections, bases, kept",
    [("gate up", 32, 0.750), ("gate up down", 48, 0.750), ("gate up down", 38, 0.672)],
)
def test_what_is_kept_of_qwen3_30b(projections, bases, kept):
    """Share of all experts' parameters: the figures of docs/forms.md, and the -33 % of a replication with down."""
    size = dict(n=128, p=768, d=2048, units=48, moe_layers=48, model_parameters=30_532_122_624)
    shed = sum(
        make_plan(Settings(bases, 768, transposed=name == "down"), **size).shed
        for name in projections.split()
    )
    assert 1 - shed / (3 * 48 * 128 * 768 * 2048) == pytest.approx(kept, abs=5e-4)


def test_down_alone(model, tmp_path):
    source = model("mixtral")
    run(prepare(source, tmp_path / "mobe", Options(steps=1, projections=("down",))), quiet=True)
    checkpoint = MobeCheckpoint(tmp_path / "mobe")
    assert [checkpoint.layer(i).projections for i in range(3)] == [("down",)] * 3
    assert torch.equal(reconstruct(checkpoint.layer(1), "gate"), Checkpoint(source).expert_stack(1, "gate"))
    assert "model.layers.0.block_sparse_moe.experts.0.w2.weight" in checkpoint


def test_fused_experts(model, tmp_path):
    """transformers 5 has down in one tensor a layer: taken apart where it is not factorized, dropped where it is."""
    source = model("qwen3_moe", fused=True)
    options = Options(steps=1, layers=(1,), projections=("down",))
    run(prepare(source, tmp_path / "mobe", options), quiet=True)
    checkpoint = MobeCheckpoint(tmp_path / "mobe")
    assert checkpoint.layer(1).rank("down") == 48 and not any(
        "experts.down_proj" in n for n in checkpoint.names
    )
    assert torch.equal(checkpoint.expert_stack(0, "down"), Checkpoint(source).expert_stack(0, "down"))


def test_the_imatrix_of_down_is_of_its_own_inputs(model, tmp_path):
    """p channels, of each expert: channel 0 is all that matters, and comes out better for it."""
    sums = np.full((8, 48), 1e-3, np.float32)
    sums[:, 0] = 100
    path = write_imatrix(tmp_path / "i.gguf", sums, [10.0] * 8, projections=("down",))
    w = Checkpoint(model("qwen3_moe")).expert_stack(0, "down")

    def error(**options):
        out = tmp_path / f"mobe-{len(options)}"
        job = prepare(
            model("qwen3_moe"), out, Options(steps=20, layers=(0,), projections=("down",), **options)
        )
        run(job, quiet=True)
        rest = w - reconstruct(MobeCheckpoint(out).layer(0), "down")
        return float(rest[:, :, 0].square().sum() / w[:, :, 0].square().sum())

    assert error(imatrix=str(path)) < 0.1 * error()


def test_resume_refuses_other_projections(model, tmp_path):
    options = Options(steps=1, projections=("gate", "down"))
    job = prepare(model("qwen3_moe"), tmp_path / "mobe", options)
    (job.work / "units").mkdir(parents=True)
    (job.work / "job.json").write_text(json.dumps(job.description()))
    (job.work / "units" / "layer-000-down.safetensors").touch()
    with pytest.raises(MobeError, match="--projections is gate,up now, but .* started with gate,down"):
        prepare(model("qwen3_moe"), tmp_path / "mobe", Options(projections=("gate", "up")), resume=True)
    assert prepare(model("qwen3_moe"), tmp_path / "mobe", Options(), resume=True).settings == job.settings


def test_sizes_that_do_not_fit(model):
    checkpoint = Checkpoint(model("qwen3_moe"))
    with pytest.raises(UsageError, match="--rank 65 is more than the hidden size 64"):
        settle(Options(rank=65, projections=("down",)), checkpoint)
    with pytest.raises(UsageError, match="--for-transform q1_0: rows of 48"):  # of gate they would be of 128
        settle(Options(rank=32, for_transform="q1_0", projections=("down",)), checkpoint)


def test_dry_run_prints_it(model, tmp_path):
    command = ["factorize", str(model("qwen3_moe")), str(tmp_path / "x"), "--projections", "down,up,gate"]
    result = CliRunner().invoke(main, [*command, "--dry-run", "--rank", "32", "--for", "q4_k"])
    assert result.exit_code == 0, result.stderr
    assert (
        "gate, up and down: 2 bases of rank 32" in result.stderr
        and "gate, up and down, chosen" in result.stderr
    )
    assert "bases of gate and up q5_0 (q4_k does not fit rows of 64)" in result.stderr
    assert (
        "bases of down q5_0 (q4_k does not fit rows of 32), A of down f16 (q4_k does not fit" in result.stderr
    )
    plan = json.loads(CliRunner().invoke(main, [*command, "--dry-run", "--json", "-q"]).stdout)["plan"]
    settings = settle(Options(projections=ALL_PROJECTIONS, wide=True), Checkpoint(model("qwen3_moe")))
    assert plan == plan_checkpoint(Checkpoint(model("qwen3_moe")), settings).to_json()
    result = CliRunner().invoke(
        main, ["factorize", str(model("qwen3_moe")), "x", "--projections", "down,gat"]
    )
    assert result.exit_code == 2 and "expected some of gate,up,down" in result.stderr


def test_export_writes_the_very_values(model, tmp_path):
    """Factors of down fitted for types that their rows have, here 32 of B and 64 of A, come out as they are."""
    out, gguf = tmp_path / "mobe", tmp_path / "model.gguf"
    source = model("qwen3_moe", moe_intermediate_size=64)
    command = ["factorize", str(source), str(out), "--rank", "32", "--steps", "4", "--layers", "1"]
    fitted = ["--projections", "gate,up,down", "--for-basis", "q4_0", "--for-transform", "q8_0"]
    result = CliRunner().invoke(main, [*command, *fitted])
    assert result.exit_code == 0, result.stderr
    types = ["--quant", "q5_k_m", "--basis-type", "q4_0", "--transform-type", "q8_0", "--no-refit"]
    result = CliRunner().invoke(main, ["export", str(out), str(gguf), *types])
    assert result.exit_code == 0, result.stderr
    layer, file = MobeCheckpoint(out).layer(1), read_gguf(gguf)
    assert file.keys["qwen3moe.mobe.version"] == 2

    def values(name: str, type_name: str) -> torch.Tensor:
        info = file.tensors[name]
        assert info.type.lower() == type_name
        data = np.fromfile(gguf, np.uint8, info.n_bytes, offset=info.offset).reshape(*info.shape[:-1], -1)
        return torch.from_numpy(ggml.dequantize(data, type_name, info.shape[-1]))

    for projection in ("up", "down"):
        transforms = torch.stack([layer.transform(projection, e) for e in range(8)])
        assert torch.equal(values(f"blk.1.ffn_{projection}_basis.weight", "q4_0"), layer.basis(projection))
        assert torch.equal(values(f"blk.1.ffn_{projection}_exps.weight", "q8_0"), transforms)


def test_in_its_place_comes_the_same_and_w_comes_back():
    """``overwrite_w`` transposes w in its own memory meanwhile: a unit that is probed is fitted again and again."""
    w = torch.randn(6, 20, 12, generator=torch.Generator().manual_seed(0))
    settings, weight = Settings(2, 8, steps=4), torch.rand(6, 1, 12).double() + 0.1
    kept, own = w.clone(), w.clone()
    plain, in_place = (
        fit_down(x, settings, weight=weight, overwrite_w=over) for x, over in ((kept, False), (own, True))
    )
    for name in ("basis", "mix", "transform"):
        assert torch.equal(getattr(plain, name), getattr(in_place, name))
    assert torch.equal(kept, w) and torch.equal(own, w / w.std())
