"""A and mix solved again for rounded bases: the arithmetic against brute force, then files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from export.handmade import make_mobe
from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.metric import Metric
from mobe_gguf.export import Recipe, export, refit, refit_solve
from mobe_gguf.export.refit_solve import ANCHOR, cost, kept, second_moments, solve, step
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint, Reconstruction
from mobe_gguf.runtime import ggml

N, P, R, D, M = 3, 12, 8, 20, 4


def problem(activation: str = "tanh", noise: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """A block of experts whose bases were changed a little, in the metric of inputs of their own."""
    g = torch.Generator().manual_seed(seed)
    basis, alpha = torch.randn(M, R, D, generator=g), torch.randn(N, M, generator=g)
    a0 = torch.randn(N, P, R, generator=g)
    metric = Metric.of(torch.rand(N, 1, D, generator=g) + 0.1, N, D)
    w = metric.apply(torch.bmm(a0, activate(combine(alpha, basis), activation)))
    rounded = basis + noise * torch.randn(M, R, D, generator=g)
    z = activate(combine(alpha, rounded), activation)
    return dict(
        w=w, a0=a0, zm=metric.apply(z), z=z, alpha=alpha, basis=rounded, metric=metric, activation=activation
    )


def brute_force(w: torch.Tensor, a0: torch.Tensor, zm: torch.Tensor) -> np.ndarray:
    """``argmin |w - A zm|^2 + anchor |A - a0|^2`` of one expert, in float64, and each row scaled to keep its size."""
    w, a0, zm = (x.double().numpy() for x in (w, a0, zm))
    weight = np.sqrt(ANCHOR * np.square(zm).sum() / len(zm))
    left, right = np.vstack([zm.T, weight * np.eye(len(zm))]), np.vstack([w.T, weight * a0.T])
    a = np.linalg.lstsq(left, right, rcond=None)[0].T
    return a * (np.square(w).sum(1) / ((a @ zm) * w).sum(1))[:, None]


@pytest.mark.parametrize("activation", ["tanh", "silu", "none"])
def test_a_is_the_solution_of_least_squares(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the alpha that was chosen, and for the old one where there is no step."""
    p = problem(activation)
    a, alpha, zm = solve(**p)
    torch.testing.assert_close(zm, p["metric"].apply(activate(combine(alpha, p["basis"]), activation)))
    for got, w, a0, z in zip(a, p["w"], p["a0"], zm, strict=True):
        np.testing.assert_allclose(got.numpy(), brute_force(w, a0, z), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(refit_solve, "step", lambda w, a, zm, z, alpha, *rest: alpha)
    a, alpha, zm = solve(**p)
    assert torch.equal(alpha, p["alpha"]) and torch.equal(zm, p["zm"])
    for got, w, a0, z in zip(a, p["w"], p["a0"], p["zm"], strict=True):
        np.testing.assert_allclose(got.numpy(), brute_force(w, a0, z), rtol=1e-4, atol=1e-5)


def test_outputs_keep_their_size_and_cost_less() -> None:
    p = problem(noise=0.4)
    a, _, zm = solve(**p)
    torch.testing.assert_close(kept(p["w"], a, zm), torch.ones(N, P), rtol=1e-4, atol=1e-4)
    old, new = cost(p["w"], p["a0"], p["zm"]), cost(p["w"], a, zm)
    assert (new[0] < 0.8 * old[0]).all()
    # a row that is not met at all is not blown up
    p["w"][0, 0] = 0
    assert torch.isfinite(solve(**p)[0]).all()


def test_a_row_that_is_hardly_met_is_not_scaled_up() -> None:
    """By twice at most, or by half: what else would be had of it is noise."""
    zm = torch.tensor([[[1.0, 0.0]]])
    w = torch.tensor([[[1.0, 0.0], [1.0, 30.0], [0.1, 0.0]]])  # met by (1, 0): whole, by 1/901, tenfold
    scaled = refit_solve.resized(w, torch.tensor([[[0.8], [1.0], [1.0]]]), zm)
    torch.testing.assert_close(scaled, torch.tensor([[[1.0], [2.0], [0.5]]]))


@pytest.mark.parametrize("seed", range(3))
def test_the_anchor_keeps_what_the_metric_does_not_know(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A0 is best for inputs whose channels hang together; the metric has their squares alone.  In truth the error is less with
    the anchor than without."""
    g = torch.Generator().manual_seed(seed)
    r, d, m = 32, 64, 4
    basis, alpha = torch.randn(m, r, d, generator=g), torch.randn(N, m, generator=g)
    strong = torch.randn(N, d, 8, generator=g)
    inputs = strong @ strong.mT + 0.1 * torch.eye(d)
    metric = Metric.of(inputs.diagonal(dim1=1, dim2=2)[:, None], N, d)
    z = activate(combine(alpha, basis), "tanh")
    w = torch.bmm(torch.randn(N, P, r, generator=g), z)
    w += 0.5 * w.std() * torch.randn(N, P, d, generator=g)
    a0 = torch.linalg.solve(z @ inputs @ z.mT, z @ inputs @ w.mT).mT
    basis = basis + 0.1 * torch.randn(m, r, d, generator=g)
    z = activate(combine(alpha, basis), "tanh")

    def error() -> float:
        a, found, _ = solve(metric.apply(w), a0, metric.apply(z), z, alpha, basis, metric, "tanh")
        rest = w - a @ activate(combine(found, basis), "tanh")
        return float(((rest @ inputs) * rest).sum())

    anchored = error()
    monkeypatch.setattr(refit_solve, "ANCHOR", 1e-6)
    assert anchored < 0.96 * error()


def test_cost_by_hand() -> None:
    w = torch.tensor([[[3.0, 4.0]]])
    total, error = cost(w, torch.tensor([[[0.5]]]), w)  # half of w: error 25/4, bias 1/2 of a square of 25
    assert float(error) == 6.25 and float(total) == 6.25 + refit_solve.BIAS * 25 / 4


def test_the_step_finds_alpha_again_and_zeros_stay() -> None:
    """Bases that are not rounded, alpha that is off: one step takes most of the error away."""
    p = problem(noise=0.0, seed=3)
    true = p["alpha"].clone()
    alpha = true + 0.05 * torch.randn(N, M, generator=torch.Generator().manual_seed(1))
    z = activate(combine(alpha, p["basis"]), "tanh")
    zm = p["metric"].apply(z)
    best = torch.linalg.lstsq(zm.transpose(1, 2), p["w"].transpose(1, 2)).solution.transpose(1, 2)
    stepped = step(p["w"], best, zm, z, alpha, p["basis"], p["metric"], "tanh")

    def loss(alpha: torch.Tensor) -> float:
        zm = p["metric"].apply(activate(combine(alpha, p["basis"]), "tanh"))
        solution = torch.linalg.lstsq(zm.transpose(1, 2), p["w"].transpose(1, 2)).solution
        return float((p["w"] - torch.bmm(solution.transpose(1, 2), zm)).square().sum())

    assert loss(stepped) < 0.2 * loss(alpha)
    alpha[1, 2] = 0
    z = activate(combine(alpha, p["basis"]), "tanh")
    stepped = step(p["w"], p["a0"], p["metric"].apply(z), z, alpha, p["basis"], p["metric"], "tanh")
    assert stepped[1, 2] == 0 and (stepped[1] != alpha[1]).sum() == M - 1


@pytest.mark.parametrize("activation", ["none", "tanh"])
def test_an_identity_stays_where_it_is_a_scale(activation: str) -> None:
    p = problem(activation)
    p["alpha"] = torch.eye(N, M)
    p["z"] = activate(combine(p["alpha"], p["basis"]), activation)
    p["zm"] = p["metric"].apply(p["z"])
    assert torch.equal(solve(**p)[1], p["alpha"]) == (activation == "none")


def test_second_moments_are_those_of_random_inputs() -> None:
    p = problem()
    g = torch.Generator().manual_seed(5)
    for i in range(N):
        x = p["metric"].root[i] * torch.randn(200_000, D, generator=g)
        measured = (x @ p["z"][i].T).square().mean(0)
        torch.testing.assert_close(second_moments(p["zm"])[i], measured, rtol=0.02, atol=0)
    assert (second_moments(torch.zeros(1, R, D)) == 1).all()


KINDS: dict[str, dict[str, Any]] = dict(
    plain={},
    grouped=dict(m=4, g=2),
    by_row=dict(by_row=True),
    linear=dict(activation="none", r=32),
    down=dict(projections=("gate", "up", "down"), r=32),
    down_by_row=dict(projections=("down",), by_row=True, r=32),
)


def values(path: Path, name: str) -> torch.Tensor:
    info = read_gguf(path).tensors[name]
    data = np.fromfile(path, np.uint8, info.n_bytes, offset=info.offset)
    rows = data.reshape(-1, info.n_bytes // int(np.prod(info.shape[:-1])))
    return torch.from_numpy(ggml.dequantize(rows, info.type, info.shape[-1]).reshape(info.shape))


def matrices(path: Path, projection: str, groups: int, activation: str) -> torch.Tensor:
    """What the file's factors of layer 1 stand for."""
    a, b, mix = (
        values(path, f"blk.1.ffn_{projection}_{what}")
        for what in ("exps.weight", "basis.weight", "basis.mix")
    )
    pairs = zip(mix.chunk(groups), b.chunk(groups), strict=True)
    z = torch.cat([activate(combine(m, x), activation) for m, x in pairs])
    return z @ a if projection == "down" else a @ z


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_nearer(kind: str, model: Callable[..., Path], tmp_path: Path) -> None:
    """No expert costs more than with A as it is; all else in the file is the same."""
    source = make_mobe(model("qwen3_moe"), tmp_path / "mobe", **KINDS[kind])
    paths = tmp_path / "as_is.gguf", tmp_path / "solved.gguf"
    assert export(source, paths[0], Recipe("q4_0"), refit=False, quiet=True).refit is None
    report = export(source, paths[1], Recipe("q4_0"), quiet=True)
    assert (
        report.refit is not None and report.refit.original is None and "not recorded" in report.refit.line()
    )
    checkpoint = MobeCheckpoint(source)
    layer = checkpoint.layer(1)
    changed = {
        n for n, t in read_gguf(paths[0]).tensors.items() if not torch.equal(*(values(p, n) for p in paths))
    }
    by_row = KINDS[kind].get("by_row", False)
    for projection in layer.projections:
        groups = layer.group_count(projection)
        read = Reconstruction(layer, projection)
        w = torch.stack([read(e) for e in range(checkpoint.n_expert)])
        found = [matrices(p, projection, groups, checkpoint.activation) for p in paths]
        costs = []
        for x in found:
            rows = (w, x) if projection != "down" else (w.transpose(1, 2), x.transpose(1, 2))
            share = (rows[0] * rows[1]).sum(-1) / rows[0].square().sum(-1)
            bias = (1 - share).square() * rows[0].square().sum(-1)
            costs.append((w - x).square().sum((1, 2)) + refit_solve.BIAS * bias.sum(-1))
        assert (costs[1] <= costs[0] * (1 + 1e-5)).all() and costs[1].sum() < 0.9 * costs[0].sum(), costs
        names = {f"blk.1.ffn_{projection}_exps.weight", f"blk.1.ffn_{projection}_basis.mix"}
        assert names - changed == ({f"blk.1.ffn_{projection}_basis.mix"} if by_row else set())
    assert all("_exps." in n or n.endswith(".mix") for n in changed)
    assert 0 < report.refit.after < report.refit.before and report.refit.solved <= report.refit.matrices


def test_factors_that_are_rounded_already_stay(model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_mobe(model("qwen3_moe"), tmp_path / "mobe", r=32)
    tensors = load_file(source / "model.safetensors")
    for name, x in tensors.items():
        if "B_" in name or "gate_proj" in name or "up_proj" in name:
            encoded = ggml.quantize(x.numpy(), "q8_0")
            tensors[name] = torch.from_numpy(ggml.dequantize(encoded, "q8_0", x.shape[-1]))
    save_file(tensors, source / "model.safetensors")
    for name, solved in (("a", True), ("b", False)):
        report = export(source, tmp_path / name, Recipe("q8_0"), refit=solved, quiet=True)
        assert report.refit is None or "leaves the bases as they are" in report.refit.line()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # nor is there anything to solve for where bases are not quantized
    assert export(source, tmp_path / "c", Recipe("f16"), quiet=True).refit is None


@pytest.fixture
def recorded(model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, Callable[..., None]]:
    """A checkpoint, its original, and a function that sets keys of the former's ``mobe``."""
    original = model("qwen3_moe")
    source = make_mobe(original, tmp_path / "mobe", r=32, our_key=True)

    def note(**keys: Any) -> None:
        config = json.loads((source / "config.json").read_text())
        config["mobe"] |= keys
        (source / "config.json").write_text(json.dumps(config))

    return source, original, note


def test_the_original_is_found_and_checked(recorded: Any, model: Callable[..., Path], tmp_path: Path) -> None:
    source, original, note = recorded
    other, out, checksum = model("qwen3_moe", seed=1), tmp_path / "out.gguf", Checkpoint(original).checksum

    def said(**options: Any) -> tuple[str | None, str]:
        report = export(source, out, Recipe("q4_0"), quiet=True, **options)
        return report.refit.original, report.refit.line()

    assert said()[0] is None and "was not recorded" in said()[1]
    assert said(original=original)[0] == str(original)
    note(source=str(original), source_checksum=checksum)
    assert said()[0] == str(original) and str(original) in said()[1]
    note(source=str(tmp_path / "gone"))
    assert said()[0] is None and f"no longer at {tmp_path / 'gone'}" in said()[1]
    note(source=str(other))
    assert said()[0] is None and "is not the model" in said()[1]
    with pytest.raises(
        MobeError, match=r"--original .*is not the model that .*checksum is .*expected " + checksum[:12]
    ):
        said(original=other)
    with pytest.raises(MobeError, match="holds factors"):
        said(original=source)
    note(source_checksum=None)
    with pytest.raises(MobeError, match="n_ff_exp is 40"):
        said(original=model("qwen3_moe", moe_intermediate_size=40))
    with pytest.raises(MobeError, match="nowhere"):
        said(original=tmp_path / "nowhere")


def test_the_originals_matrices_are_what_counts(recorded: Any, tmp_path: Path) -> None:
    """A solved for W itself: the error of random factors, all of it, falls."""
    source, original, _ = recorded
    report = export(source, tmp_path / "out.gguf", Recipe("q4_0"), original=original, quiet=True)
    w = Checkpoint(original).expert_stack(1, "gate")
    found = matrices(tmp_path / "out.gguf", "gate", 1, "tanh")
    before = Reconstruction(MobeCheckpoint(source).layer(1), "gate")
    was = torch.stack([before(e) for e in range(len(w))])
    assert (w - found).square().sum() < 0.9 * (w - was).square().sum()
    assert report.refit.after < report.refit.before


def test_command(recorded: Any, tmp_path: Path) -> None:
    source, original, _ = recorded
    out = tmp_path / "out.gguf"

    def run(*options: str) -> Any:
        return CliRunner().invoke(main, ["export", str(source), str(out), "--quant", "q4_0", *options])

    done = run("--original", str(original), "--json")
    assert done.exit_code == 0 and f"to come near to {original}: cost" in done.stderr, done.output
    said = json.loads(done.stdout)["refit"]
    assert said["original"] == str(original) and said["cost_after"] < said["cost_before"]
    done = run("--no-refit", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["refit"] is None
    done = run("--original", str(source))
    assert done.exit_code == 1 and "holds factors" in done.stderr and "Traceback" not in done.output


def test_an_interrupted_export_finds_the_mix_again(
    recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with an A is finished, that with its mix is not: the mix is that of this A all the same."""
    source, _, _ = recorded
    entries = export(source, tmp_path / "plan", Recipe("q4_0"), dry_run=True, quiet=True).entries

    def files(limit: int) -> dict[str, int]:
        """In which file each tensor is."""
        found, size, number = {}, 0, 0
        for e in entries:
            padded = -(-e.n_bytes // 32) * 32
            size, number = (size + padded, number) if size + padded <= limit else (padded, number + 1)
            found[e.name] = number
        return found

    def apart(at: dict[str, int]) -> list[int]:
        """Files with the mix of an A in the one before."""
        return [
            i
            for n, i in at.items()
            if n.endswith(".mix") and at[n.replace("_basis.mix", "_exps.weight")] == i - 1
        ]

    limit = next(limit for limit in range(50_000, 80_000, 500) if apart(files(limit)))
    first = apart(files(limit))[0]
    split = dict(split_max_size=limit, quiet=True)
    export(source, tmp_path / "whole.gguf", Recipe("q4_0"), **split)
    whole = {p.name[5:]: p.read_bytes() for p in tmp_path.glob("whole-*")}
    real, calls = os.replace, []

    def failing(a: Any, b: Any) -> None:
        if str(b).endswith(".gguf"):
            calls.append(b)
            if len(calls) == first + 1:
                raise OSError(5, "gone")
        real(a, b)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(MobeError):
        export(source, tmp_path / "again.gguf", Recipe("q4_0"), **split)
    monkeypatch.setattr(os, "replace", real)
    report = export(source, tmp_path / "again.gguf", Recipe("q4_0"), **split)
    assert report.files_kept == first > 0 and len(whole) == len(report.files) > first
    assert {p.name[5:]: p.read_bytes() for p in tmp_path.glob("again-*")} == whole
    # another way to solve is another file
    assert (
        refit.Refitting({}, None, None).fingerprint
        != refit.Refitting({}, Checkpoint(recorded[1]), None).fingerprint
    )
