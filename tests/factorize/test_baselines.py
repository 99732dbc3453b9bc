"""``--method svd|molae|d2moe`` against the theorems that they are made of, and as whole jobs."""

from __future__ import annotations

import pytest
import torch
from formats.test_imatrix import write as write_imatrix

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.metric import Roots
from mobe_gguf.factorize.baselines import Baseline
from mobe_gguf.factorize.plan import Options
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint, reconstruct

from .test_cli import refused
from .test_job import factorize

N, P, D = 6, 20, 32


def experts(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, P, D, generator=torch.Generator().manual_seed(seed))


def moments(kind: str) -> tuple[torch.Tensor | Roots | None, torch.Tensor]:
    """A weight as the job gives it, and the second moments S ``[n, d, d]`` that it stands for, mean of the diagonals 1."""
    g = torch.Generator().manual_seed(1)
    if kind == "none":
        return None, torch.eye(D).expand(N, D, D)
    if kind == "channels":
        weight = torch.rand(N, 1, D, generator=g) + 0.1
        s = torch.diag_embed(weight[:, 0])
    else:
        root, rest = torch.randn(N, D, 5, generator=g), torch.rand(N, D, generator=g) + 0.2
        weight, s = Roots(root, rest), root @ root.mT + torch.diag_embed(rest)
    return weight, (s / s.diagonal(dim1=1, dim2=2).mean()).double()


@pytest.mark.parametrize("method", ["svd", "molae", "d2moe"])
@pytest.mark.parametrize("allowance", [1300, 1301, 2000, 3000])
def test_as_many_parameters_as_allowed_and_no_more(method, allowance):
    chosen = Baseline.within(method, allowance, N, P, D)
    each = {"svd": N * (P + D), "molae": N * P + D, "d2moe": N * (P + D)}[method]
    assert chosen.kept <= allowance < chosen.kept + each


def test_too_few_parameters():
    with pytest.raises(UsageError, match="too few for experts of 20 x 32; it takes --target 0.248 at least"):
        Baseline.within("d2moe", 640, N, P, D)


@pytest.mark.parametrize("kind", ["none", "channels", "full"])
def test_svd_is_the_best_of_its_rank(kind):
    w, (weight, s) = experts(), moments(kind)
    got = Baseline.within("svd", 2600, N, P, D).compress(w, weight=weight)
    r = got.basis.shape[1]
    assert got.basis.shape == (N, r, D) and torch.equal(got.mix, torch.eye(N))
    root = torch.linalg.cholesky(s.double())
    values = torch.linalg.svdvals(w.double() @ root)
    expected = float(values[:, r:].square().sum() / values.square().sum())
    assert got.objective == pytest.approx(expected, rel=1e-3)
    rest = w - got.transform @ got.basis
    assert got.error == pytest.approx(float(rest.square().sum() / w.square().sum()), rel=1e-4)


@pytest.mark.parametrize("kind", ["none", "channels", "full"])
def test_molae_shares_the_strongest_directions(kind):
    w, (weight, s) = experts(), moments(kind)
    got = Baseline.within("molae", 2600, N, P, D).compress(w, weight=weight)
    r = got.basis.shape[1]
    assert got.basis.shape == (1, r, D) and got.mix.shape == (N, 1) and r > 12
    if kind == "none":
        values = torch.linalg.svdvals(w.view(-1, D))
        assert got.objective == pytest.approx(
            float(values[r:].square().sum() / values.square().sum()), rel=1e-3
        )
    for i in range(N):  # A is the best for that B, in the expert's own metric: the rest is orthogonal to B
        rest = (w[i] - got.transform[i] @ got.basis[0]).double() @ s[i].double()
        assert float((rest @ got.basis[0].double().T).abs().max()) < 1e-3


@pytest.mark.parametrize("kind", ["none", "channels", "full"])
def test_d2moe_finds_a_base_with_low_rank_differences(kind):
    """If the differences sum to nothing in the metric, the base is the mean, and rank 2 is exact."""
    g = torch.Generator().manual_seed(2)
    base = torch.randn(P, D, generator=g)
    u, v = torch.randn(N // 2, P, 2, generator=g), torch.randn(N // 2, 2, D, generator=g)
    w = base + torch.cat([u @ v, -u @ v])
    weight, _ = moments(kind)
    if kind == "channels":
        weight = weight[: N // 2].repeat(2, 1, 1)
    elif kind == "full":
        weight = Roots(*(x[: N // 2].repeat(2, *[1] * (x.dim() - 1)) for x in (weight.root, weight.rest)))
    chosen = Baseline.within("d2moe", P * D + 2 * N * (P + D), N, P, D)
    assert chosen.rank == 2
    got = chosen.compress(w, weight=weight)
    assert got.objective < 1e-9 and torch.allclose(got.matrices, w, atol=1e-3)
    worse = Baseline.within("d2moe", P * D + N * (P + D), N, P, D).compress(w, weight=weight)
    assert worse.objective > 0.01


@pytest.mark.parametrize("method, form", [("svd", (8, "none")), ("molae", (1, "none"))])
def test_factors_in_the_form_of_mobe(method, form, model, tmp_path):
    source = Checkpoint(model("qwen3_moe"))
    result = factorize(source.path, tmp_path / "out", Options(method=method, target=0.7))
    got = MobeCheckpoint(tmp_path / "out")
    assert (got.config["num_B"], got.activation) == form and got.config["mobe"]["method"] == method
    for unit in result.units:
        w = source.expert_stack(unit.layer, unit.projection)
        rest = w - reconstruct(got.layer(unit.layer), unit.projection)
        assert float(rest.square().sum() / w.square().sum()) == pytest.approx(unit.error, rel=1e-3)
    held = sum(
        got.info(n).numel
        for n in got.names
        if ".B_" in n or ".W_" in n or ("experts" in n and "down" not in n)
    )
    assert held == result.plan.projected_after <= 0.7 * result.plan.projected_before


@pytest.mark.parametrize("family, fused", [("qwen3_moe", False), ("qwen3_moe", True), ("mixtral", False)])
def test_d2moe_writes_an_ordinary_model(family, fused, model, tmp_path):
    source = Checkpoint(model(family, fused=fused))
    result = factorize(source.path, tmp_path / "out", Options(method="d2moe", target=0.8))
    got = Checkpoint(tmp_path / "out")
    assert not got.is_mobe and "num_B" not in got.config
    about = got.config["mobe"]
    assert about["method"] == "d2moe" and 0.6 < about["kept"] <= 0.8
    for unit in result.units:
        w, w2 = (c.expert_stack(unit.layer, unit.projection) for c in (source, got))
        assert float((w - w2).square().sum() / w.square().sum()) == pytest.approx(unit.error, rel=1e-3)
    assert torch.equal(source.expert_stack(1, "down"), got.expert_stack(1, "down"))


def test_an_imatrix_is_the_metric(model, tmp_path):
    sums = torch.rand(8, 64).square().numpy() * 100
    path = write_imatrix(tmp_path / "i.gguf", sums, [10.0] * 8)
    options = Options(method="svd", layers=(0,), imatrix=str(path))
    weighted = factorize(model("qwen3_moe"), tmp_path / "w", options)
    plain = factorize(model("qwen3_moe"), tmp_path / "p", options.replace(imatrix=None))
    for a, b in zip(weighted.units, plain.units, strict=True):
        assert a.objective < a.error and a.error > b.error


def test_as_many_as_the_bases_would_keep(model, tmp_path):
    result = factorize(model("olmoe"), tmp_path / "out", Options(method="svd", bases=1, rank=24, layers=(0,)))
    mobe = 8 * 48 * 24 + 24 * 64 + 8
    assert result.plan.projected_after <= 2 * mobe < result.plan.projected_after + 2 * 8 * (48 + 64)


def test_refusals(model, tmp_path):
    source, out = model("qwen3_moe"), tmp_path / "out"
    for given, message in (
        (["--method", "svd", "--steps", 5], "--steps means nothing to --method svd"),
        (["--method", "molae", "--activation", "tanh"], "--activation means nothing to --method molae"),
        (["--method", "svd", "--target", "5GB", "--quant", "q8_0"], "keeps a share of the parameters"),
        (["--method", "svd", "--target", "0.5", "--rank", 4], "--target chooses the rank of --method svd"),
        (["--method", "d2moe", "--target", "0.1"], "too few for experts of 48 x 64"),
        (["--method", "svd", "--projections", "gate,down"], "takes gate and up"),
        (["--method", "lora"], "'lora' is not one of"),
    ):
        assert message in " ".join(refused(2, source, out, *given).split())
    assert not any(tmp_path.iterdir())
