"""``--target``: the pure parts against exhaustive search, and whole jobs with sizes of their own for each unit."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from models.editing import edit_tensors

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate.inspect import describe
from mobe_gguf.factorize import job as jobs
from mobe_gguf.factorize.job import running
from mobe_gguf.factorize.job import unit as units
from mobe_gguf.factorize.plan import Options
from mobe_gguf.factorize.target import (
    Choices,
    Point,
    Size,
    SizeOption,
    allocate_sizes,
    once_more,
    options,
    parse_goal,
    rank_candidates,
    search,
)
from mobe_gguf.formats.imatrix import ImatrixFile
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.models.residual import layer_shares

from .test_cli import call, refused
from .test_job import contents, factorize, names


@pytest.mark.parametrize(
    "text, value",
    [
        ("0.75", 0.75),
        ("75%", 0.75),
        (".5", 0.5),
        ("12.5GB", 12_500_000_000),
        ("700m", 700_000_000),
        ("1 T", 10**12),
        ("900K", 900_000),
    ],
)
def test_targets(text, value):
    assert parse_goal(text) == value and type(parse_goal(text)) is type(value)


@pytest.mark.parametrize("text", ["", "x", "1", "0", "-0.5", "12.5", "0G", "0.5 0.6", "nan"])
def test_bad_targets(text):
    with pytest.raises(UsageError, match="--target"):
        parse_goal(text)


@pytest.mark.parametrize("seed", range(20))
def test_the_allocation_is_the_best_at_its_own_cost(seed):
    """Along convex hulls: no choice that costs as little has a smaller sum; and no upgrade that helps still fits."""
    rng = np.random.default_rng(seed)
    units, choices, weights = [(i, "up") for i in range(3)], {}, {}
    for unit in units:
        costs = np.cumsum(rng.integers(1, 20, 5))
        errors = np.cumsum(np.sort(rng.random(5)))[::-1]  # convex in the index; costs make it any shape
        choices[unit] = [
            SizeOption(Size(i + 1, 1), int(c), float(e))
            for i, (c, e) in enumerate(zip(costs, errors, strict=True))
        ]
        weights[unit] = float(rng.random() + 0.1)
    budget = int(sum(o[0].cost for o in choices.values()) + rng.integers(0, 80))
    chosen = allocate_sizes(choices, weights, budget)
    spent = sum(o.cost for o in chosen.values())
    loss = sum(weights[u] * o.error for u, o in chosen.items())
    assert spent <= budget
    every = [dict(zip(units, c, strict=True)) for c in itertools.product(*choices.values())]
    best = min(
        sum(weights[u] * o.error for u, o in c.items())
        for c in every
        if sum(o.cost for o in c.values()) <= budget
    )
    step = max(weights[u] * (a.error - b.error) for u in units for a, b in itertools.pairwise(choices[u]))
    assert best - 1e-12 <= loss <= best + 2 * step
    for unit in units:
        for option in choices[unit]:
            if option.error < chosen[unit].error:
                assert spent - chosen[unit].cost + option.cost > budget


def test_what_weighs_more_gets_more():
    curve = [SizeOption(Size(m, 8), 10 * m, math.exp(-m / 3)) for m in range(1, 13)]
    chosen = allocate_sizes({(0, "up"): curve, (1, "up"): curve}, {(0, "up"): 4.0, (1, "up"): 1.0}, 120)
    # equal slopes: 4 exp(-a/3) = exp(-b/3), so a - b = 3 log 4 = 4.2
    assert (chosen[0, "up"].size.bases, chosen[1, "up"].size.bases) == (8, 4)


def test_options_go_through_the_probes():
    points = [
        Point(Size(4, 8), 0.4),
        Point(Size(8, 8), 0.1),
        Point(Size(12, 8), 0.11),
        Point(Size(20, 4), 0.09),
    ]
    found = options(points, lambda s: s.bases * s.rank, Choices(1, 24, 1), 1.5)
    by_size = {o.size: o.error for o in found}
    assert by_size[Size(4, 8)] == pytest.approx(0.4) and by_size[Size(6, 8)] == pytest.approx(0.2)
    assert by_size[Size(2, 8)] == pytest.approx(0.8), "down to half of what was probed"
    assert Size(1, 8) not in by_size
    assert by_size[Size(20, 4)] == pytest.approx(0.09), "a rank that was probed once has that size"
    assert Size(9, 8) not in by_size, "more bases for no smaller error is no option"
    assert [o.cost for o in found] == sorted({o.cost for o in found})
    assert [o.error for o in found] == sorted({o.error for o in found}, reverse=True)


def test_options_are_multiples_of_the_groups():
    points = [Point(Size(4, 8), 0.4), Point(Size(12, 8), 0.1)]
    assert {o.size.bases for o in options(points, lambda s: s.bases, Choices(4, 16, 4), 1.5)} == {
        4,
        8,
        12,
        16,
    }


@pytest.mark.parametrize("best", [64, 48, 32])
def test_the_search_ends_at_the_best_rank(best):
    asked = []

    def measure(size: Size) -> float:
        asked.append(size)
        return abs(size.rank - best) / 100 + 1 / size.bases

    even = [Size(6, 64), Size(6, 48), Size(6, 32), Size(6, 16)]
    points = search(measure, even, Choices(1, 24, 1))
    assert min(points, key=lambda p: p.error).size.rank == best
    assert sorted(p.size.bases for p in points if p.size.rank == best) == [3, 6, 9]
    tried = [64, 48, 32, 16]
    assert {size.rank for size in asked} == set(tried[: tried.index(best) + 2]), "one rank past the best"
    assert len(asked) == len(set(asked)) == len(points), "nothing is measured twice"


def test_what_a_first_allocation_comes_to_is_probed_again():
    points = [Point(Size(m, 64), 1 / m) for m in (3, 6, 9)]
    even = [Size(12, 96), Size(18, 64), Size(30, 32)]
    assert once_more(points, Size(18, 64), even) == [Size(18, 64), Size(12, 96)]
    assert once_more(points, Size(3, 64), [Size(1, 96), Size(3, 64), Size(8, 32)]) == [Size(8, 32)], (
        "3 is known"
    )


def test_ranks_are_whole_blocks():
    assert rank_candidates(96, 256, None, 96) == (96, 64, 32)
    assert rank_candidates(768, 2048, None, 768) == (768, 512, 256)
    assert all(r % 32 == 0 for r in rank_candidates(1408, 2048, None, 1408))
    assert rank_candidates(768, 2048, 100, 768) == (100,)


# whole jobs


@pytest.fixture
def uneven(own_model) -> Path:
    """A model whose first layer is easy: all its experts share one gate and one up."""
    path = own_model("qwen3_moe")

    def alike(tensors):
        for name in list(tensors):
            if "layers.0." in name and (".gate_proj" in name or ".up_proj" in name):
                first = name.split("experts.")[0] + "experts.0." + name.split(".", 6)[-1]
                tensors[name] = tensors[first].clone()

    edit_tensors(path, alike)
    return path


TARGET = Options(target=0.95, steps=12)


def test_bases_go_where_they_help(uneven, tmp_path):
    result = factorize(uneven, tmp_path / "out", TARGET)
    assert names(tmp_path) == {"own", "out"}
    kept = result.plan.projected_after / result.plan.projected_before
    assert 0.85 < kept <= 0.95
    first = max(result.sizes[0, p].bases for p in ("gate", "up"))
    assert first < min(result.sizes[layer, p].bases for layer in (1, 2) for p in ("gate", "up"))
    got = MobeCheckpoint(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_B"] == max(s.bases for s in result.sizes.values())
    assert config["mobe"]["settings"]["bases"] is None and config["mobe"]["settings"]["target"] == 0.95
    for (layer, projection), size in result.sizes.items():
        found = got.layer(layer)
        assert (found.n_basis(projection), found.rank(projection)) == (size.bases, size.rank)
    del config["mobe"], config["num_B"]  # a reader must not need them: shapes tell
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    described = {layer.index: layer for layer in describe(tmp_path / "out").layers}
    assert (described[2].gate.m, described[2].gate.r) == (
        result.sizes[2, "gate"].bases,
        result.sizes[2, "gate"].rank,
    )


def test_groups_and_terms_are_kept(model, tmp_path):
    options = Options(target=0.9, steps=3, groups=2, mix_terms=2, layers=(1,))
    result = factorize(model("qwen3_moe"), tmp_path / "out", options)
    assert all(size.bases % 2 == 0 and size.bases >= 4 for size in result.sizes.values())


def test_a_fixed_rank(model, tmp_path):
    result = factorize(
        model("qwen3_moe"), tmp_path / "out", Options(target=0.7, rank=32, steps=2, layers=(0,))
    )
    assert {size.rank for size in result.sizes.values()} == {32}


def test_a_stopped_job_goes_on_with_its_probes_and_sizes(uneven, tmp_path, monkeypatch):
    factorize(uneven, tmp_path / "whole", TARGET)
    fit, calls = units.fit, []

    def stop(*args, **kwargs):
        calls.append(args[1].steps)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(units, "fit", stop)
    out, stops = tmp_path / "out", {6}
    with pytest.raises(KeyboardInterrupt):
        factorize(uneven, out, TARGET)
    kept = sorted(p.name for p in (tmp_path / "out.work" / "probes").iterdir())
    assert kept and not (tmp_path / "out.work" / "sizes.json").exists()
    with pytest.raises(MobeError, match="Add --resume"):
        jobs.prepare(uneven, out, TARGET)
    stamps = {name: (tmp_path / "out.work" / "probes" / name).stat().st_mtime_ns for name in kept}
    monkeypatch.setattr(units, "fit", fit)
    monkeypatch.setattr(running, "write_output", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        factorize(uneven, out, Options(), resume=True)
    first = json.loads((tmp_path / "out.work" / "probes" / kept[0]).read_text())
    assert first["again"] is not None or stamps[kept[0]]
    monkeypatch.undo()
    chosen = jobs.prepare(uneven, out, Options(), resume=True)
    assert chosen.sizes, "sizes that units were fitted with are taken up"
    assert all(u.seconds is None for u in factorize(uneven, out, Options(), resume=True).units)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_unit_of_another_size_is_fitted_again(uneven, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "write_output", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        factorize(uneven, tmp_path / "out", TARGET)
    monkeypatch.undo()
    path = tmp_path / "out.work" / "sizes.json"
    found = json.loads(path.read_text())
    found["units"]["1.gate"]["bases"] = 1
    path.write_text(json.dumps(found))
    result = factorize(uneven, tmp_path / "out", Options(), resume=True)
    assert [u.seconds is None for u in result.units] == [True, True, False, True, True, True]
    assert MobeCheckpoint(tmp_path / "out").layer(1).n_basis("gate") == 1


@pytest.mark.parametrize("quant", ["q8_0", "f16"])
def test_a_file_of_a_size(quant, uneven, tmp_path):
    from mobe_gguf.export import Recipe, export, parse_quant
    from mobe_gguf.export.predict import predict

    recipe = Recipe(parse_quant(quant))
    plain = export(uneven, tmp_path / "plain.gguf", recipe, allow_dense=True, quiet=True).n_bytes
    target = int(0.96 * plain)
    options = Options(target=target, quant=recipe.quant, steps=3)
    result = jobs.run(jobs.prepare(uneven, tmp_path / "out", options, predict=predict), quiet=True)
    written = export(tmp_path / "out", tmp_path / "out.gguf", recipe, quiet=True).n_bytes
    basis = 2 * 48 * 64
    assert target - basis <= written <= target
    assert len(set(result.sizes.values())) > 1
    layers = {layer.index: layer for layer in describe(tmp_path / "out.gguf").layers}
    assert {(i, p): getattr(layers[i], p).m for i, p in result.sizes} == {
        u: s.bases for u, s in result.sizes.items()
    }
    assert describe(tmp_path / "out.gguf").problems == []
    message = refused(2, uneven, tmp_path / "new", "--target", "12GB", "--quant", quant)
    assert f"an ordinary {quant} file takes" in message


def test_a_dry_run_says_what_it_cannot_know(model, tmp_path):
    result = call(model("qwen3_moe"), tmp_path / "out", "--target", "0.9", "--dry-run")
    assert result.exit_code == 0, result.stderr
    for expected in (
        "bases to keep 90.0% of these matrices' parameters",
        "short fits, which a dry run does not make",
        "probing",
    ):
        assert expected in result.stderr
    plan = json.loads(
        call(model("qwen3_moe"), tmp_path / "out", "--target", "0.9", "--dry-run", "--json").stdout
    )
    assert plan["time"]["seconds"] >= plan["time"]["probing"] > 0
    assert plan["plan"]["projected_after"] <= 0.9 * plan["plan"]["projected_before"]
    assert not any(tmp_path.iterdir())


def test_refusals(model, tmp_path):
    source, out = model("qwen3_moe"), tmp_path / "out"
    for given, message in (
        (["--target", "0.9", "--bases", 4], "--target chooses the number of bases"),
        (
            ["--target", "0.05"],
            "--target is too little: with 1 bases of rank 6 in every unit it would be --target 0.1",
        ),
        (["--target", "5GB"], "needs --quant TYPE"),
        (["--target", "0.5", "--quant", "q4_k"], "--quant is only used with --target SIZE"),
        (["--quant", "q4_k"], "--quant is only used with --target SIZE"),
        (["--target", "2"], "between 0 and 1; for a file's size add GB or MB"),
        (["--target", "0.9", "--rank", 65], "more than the hidden size 64"),
    ):
        assert message in " ".join(refused(2, source, out, *given).split())
    assert not any(tmp_path.iterdir())


def test_resume_refuses_another_target(uneven, tmp_path):
    job = jobs.prepare(uneven, tmp_path / "out", TARGET)
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "job.json").write_text(json.dumps(job.description()))
    with pytest.raises(MobeError, match="--target is 0.9 now, but the job to resume was started with 0.95"):
        jobs.prepare(uneven, tmp_path / "out", Options(target=0.9), resume=True)
    with pytest.raises(MobeError, match="--bases is 4 now, but the job to resume was started with none"):
        jobs.prepare(uneven, tmp_path / "out", Options(bases=4), resume=True)


# weights


def imatrix(path: Path, inputs: dict[str, torch.Tensor], counts: dict[str, list[float]]) -> ImatrixFile:
    writer = GGUFWriter(path, "")
    for name, sums in inputs.items():
        writer.add_tensor(f"{name}.in_sum2", sums.float().numpy())
        writer.add_tensor(f"{name}.counts", np.asarray(counts[name], dtype=np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ImatrixFile(path)


def test_weights_are_shares_of_the_residual_stream(model, tmp_path):
    """Against outputs of random inputs with independent channels; DeepSeek has a dense layer and shared experts."""
    checkpoint = Checkpoint(model("deepseek_v3"))
    generator = torch.Generator().manual_seed(0)
    inputs, counts, energy = {}, {}, {}

    def feed(stem: str, w: torch.Tensor, n: int = 20_000) -> float:
        x = torch.randn(n, w.shape[1], generator=generator) * torch.rand(w.shape[1], generator=generator)
        inputs[stem], counts[stem] = x.square().sum(0)[None], [float(n)]
        return float((x @ w.T).square().sum(1).mean())

    for layer in range(3):
        block = f"model.layers.{layer}"
        energy[layer] = feed(
            f"blk.{layer}.attn_output.weight", checkpoint.get(f"{block}.self_attn.o_proj.weight")
        )
        if layer == 0:
            energy[layer] += feed("blk.0.ffn_down.weight", checkpoint.get(f"{block}.mlp.down_proj.weight"))
            continue
        shared = checkpoint.get(f"{block}.mlp.shared_experts.down_proj.weight")
        energy[layer] += feed(f"blk.{layer}.ffn_down_shexp.weight", shared)
    routed = {}
    for layer in (1, 2):
        name, sums, seen, total = f"blk.{layer}.ffn_down_exps.weight", [], [], 0.0
        for e in range(8):
            n = 500 * (e + 1)
            total += n * feed("expert", checkpoint.expert(layer, "down", e), n)
            sums.append(inputs.pop("expert")[0])
            seen.append(counts.pop("expert")[0])
        inputs[name], counts[name] = torch.stack(sums), seen
        scale = checkpoint.config.get("routed_scaling_factor") or 1.0
        routed[layer] = total / sum(seen) * scale**2
    embedding = float(checkpoint.get("model.embed_tokens.weight").square().sum(1).mean())
    stream, expected = embedding + energy[0], {}
    for layer in (1, 2):
        stream += energy[layer] + routed[layer]
        expected[layer] = routed[layer] / stream
    got = layer_shares(checkpoint, imatrix(tmp_path / "i.gguf", inputs, counts), (1, 2))
    assert got == pytest.approx(expected, rel=0.05)
    for layer in (1, 2):
        del inputs[f"blk.{layer}.ffn_down_exps.weight"]
    assert layer_shares(checkpoint, imatrix(tmp_path / "j.gguf", inputs, counts), (1, 2)) is None
