"""Types for a size: the choice against brute force, then files."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from export.handmade import make_mobe

from mobe_gguf.cli import main
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.export import Recipe, export
from mobe_gguf.export.imatrix import Imatrix
from mobe_gguf.export.refit import units_of
from mobe_gguf.export.refit_solve import BIAS
from mobe_gguf.export.source import Tensor, Whole
from mobe_gguf.export.type_errors import ladder, measure
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.quant.allocate import Option, Target, TooSmall, allocate, parse_target
from mobe_gguf.quant.mixture import layer_of
from mobe_gguf.quant.recipe import Choice
from mobe_gguf.runtime import ggml

SIZES = dict(hidden_size=256, moe_intermediate_size=256, head_dim=64, num_experts=4, num_hidden_layers=2)


def curves(seed: int, n: int = 5) -> dict[str, list[Option]]:
    g = np.random.default_rng(seed)
    return {
        f"t{i}": [Option(f"o{j}", int(g.integers(10, 300)), float(g.random())) for j in range(4)]
        for i in range(n)
    }


def totals(chosen: Any) -> tuple[float, int]:
    return sum(o.error for o in chosen), sum(o.n_bytes for o in chosen)


@pytest.mark.parametrize("seed", range(4))
def test_against_every_combination(seed: int) -> None:
    """So small that each byte is a grain: the least error there is, within the budget, falling as it grows."""
    options = curves(seed)
    every = [totals(c) for c in itertools.product(*options.values())]
    least, last = min(size for _, size in every), np.inf
    for budget in range(least, least + 900, 37):
        chosen = allocate(options, budget)
        error, size = totals(chosen.values())
        assert list(chosen) == list(options) and size <= budget
        assert error == pytest.approx(min(e for e, s in every if s <= budget))
        assert error <= last + 1e-12
        last = error
    with pytest.raises(TooSmall) as refused:
        allocate(options, least - 1)
    assert refused.value.least == least


def test_large_sizes_are_counted_in_grains() -> None:
    """A thousand tensors of gigabytes: within the budget, hardly below it, and better with more."""
    g = np.random.default_rng(1)
    options = {
        f"t{i}": [Option(str(b), b * int(2e8), w * 4.0**-b) for b in range(2, 9)]
        for i, w in enumerate(g.random(1000) + 0.1)
    }
    last = np.inf
    for bits in (2.0, 2.5, 3.4, 5.0, 8.0, 9.0):
        error, size = totals(allocate(options, int(bits * 2e11)).values())
        assert size <= bits * 2e11 and size >= 0.96 * min(bits, 8) * 2e11 and error <= last
        last = error
    heavy = allocate(options, int(3.4 * 2e11))  # what counts more gets more
    by_weight = sorted(options, key=lambda n: options[n][0].error)
    assert sum(int(heavy[n].type) for n in by_weight[:300]) < sum(
        int(heavy[n].type) for n in by_weight[-300:]
    )


@pytest.mark.parametrize(
    ("size", "bits", "expected"),
    [
        ("4.6M", None, Target(n_bytes=4_600_000)),
        ("12GB", None, Target(n_bytes=12 * 10**9)),
        (None, 3.4, Target(bits=3.4)),
    ],
)
def test_targets(size: str | None, bits: float | None, expected: Target) -> None:
    assert parse_target(size, bits) == expected


@pytest.mark.parametrize(
    ("size", "bits"), [("4.6", None), ("0M", None), ("big", None), (None, 0.0), (None, 40.0), ("1M", 3.0)]
)
def test_nonsense_targets(size: str | None, bits: float | None) -> None:
    with pytest.raises(UsageError, match="--target-(size|bpw)"):
        parse_target(size, bits)
    assert parse_target(None, None) is None


@pytest.fixture(scope="module")
def source(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mobe(model("qwen3_moe", **SIZES), tmp_path_factory.mktemp("target") / "mobe", m=2, r=256)


def test_a_file_of_a_size(source: Path, tmp_path: Path) -> None:
    """It is no larger, hardly smaller, the same again, and other tensors keep what --quant gives them."""
    plain = export(source, tmp_path / "plain.gguf", Recipe("q4_k_m"), refit=False, quiet=True)
    recipe = Recipe("q4_k_m", target=Target(n_bytes=plain.n_bytes))
    report = export(source, tmp_path / "a.gguf", recipe, refit=False, quiet=True)
    assert 0.97 * plain.n_bytes < report.n_bytes <= plain.n_bytes
    export(source, tmp_path / "b.gguf", recipe, refit=False, quiet=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    types = [
        {n: t.type for n, t in read_gguf(tmp_path / p).tensors.items()} for p in ("plain.gguf", "a.gguf")
    ]
    changed = {n for n in types[0] if types[0][n] != types[1][n]}
    assert changed and all("_exps." in n or n.endswith("_basis.weight") for n in changed)
    assert not any(t.startswith(("iq1", "iq2", "iq3_xx")) for t in types[1].values())  # there is no imatrix
    assert report.divided[-1].endswith("all layers alike") and report.divided[0].startswith("down: ")


def test_bits_per_weight_and_options_before_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"

    def run(*options: str) -> Any:
        return CliRunner().invoke(main, ["export", str(source), str(out), "--quant", "q4_k", *options])

    planned = run(
        "--target-bpw",
        "6",
        "--down-type",
        "q8_0",
        "--tensor-type",
        "blk.0.ffn_up_exps=q6_k",
        "--dry-run",
        "--json",
    )
    assert planned.exit_code == 0, planned.output
    assert not out.exists()
    said = json.loads(planned.stdout)
    assert 5.8 < said["bits_per_weight"] <= 6
    types = {row["class"]: row["types"] for row in said["classes"]}
    assert types["down"] == {"q8_0": 2} and "q6_k" in types["A"]
    assert (
        "gate B: " in planned.stderr and "down: " not in planned.stderr and "expected error" in planned.stderr
    )
    done = run("--target-bpw", "1.5")
    assert done.exit_code == 2 and not out.exists()
    least = float(re.search(r"--target-bpw 1.5: .* it is (\d\.\d+)", done.stderr)[1])  # type: ignore[index]
    assert run("--target-bpw", f"{least + 0.001:.3f}", "--dry-run").exit_code == 0
    done = run("--target-size", "9M", "--dry-run", "--json")
    took = json.loads(done.stdout)["bytes"]
    assert took < 4_000_000 and "--target-size 9M is more than can be used" in done.stderr
    assert (
        f"the file takes {took / 1e6:.2f} MB" in done.stderr and "larger --quant than q4_k_m" in done.stderr
    )
    done = run("--target-size", "1M", "--target-bpw", "4")
    assert done.exit_code == 2 and "leave one out" in done.stderr


def test_errors_are_the_encoders_own(source: Path) -> None:
    """Of down, a basis and an A, against the products written out; a layer's share multiplies them."""
    checkpoint = MobeCheckpoint(source)
    layer, down = checkpoint.layer(0), "blk.0.ffn_down_exps.weight"
    a_name, b_name = "blk.0.ffn_up_exps.weight", "blk.0.ffn_up_basis.weight"
    a = torch.stack([layer.transform("up", e) for e in range(4)])
    stacks = {down: checkpoint.expert_stack(0, "down"), a_name: a, b_name: layer.basis("up")}
    tensors = {name: Tensor(name, Whole(stack)) for name, stack in stacks.items()}
    choices = {
        f"blk.{i}.ffn_{p}_basis.weight": Choice("q4_k", "q4_k") for i in (0, 1) for p in ("gate", "up")
    }
    units = units_of(checkpoint, Imatrix([]), choices, {})

    def measured(refit: bool, shares: dict[int, float] | None) -> dict[str, dict[str, float]]:
        def counts(name: str) -> float:
            return 1.0 if shares is None else shares.get(layer_of(name), 1.0)

        found = measure(tensors, set(tensors), units, {}, lambda n, t: 1, refit=refit, counts=counts)
        return {name: {o.type: o.error for o in options} for name, options in found}

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(ggml.dequantize(ggml.quantize(x.numpy(), "q4_k"), "q4_k", x.shape[-1]))

    def share(rest: torch.Tensor, w: torch.Tensor) -> float:
        bias = 1 - ((w - rest) * w).sum(-1) / w.square().sum(-1)
        return float(
            (rest.square().sum() + BIAS * (bias.square() * w.square().sum(-1)).sum()) / w.square().sum()
        )

    z, z_rounded = (
        activate(combine(layer.mix("up"), b), "tanh") for b in (stacks[b_name], rounded(stacks[b_name]))
    )
    got, w = measured(False, None), a @ z
    assert got[down]["q4_k"] == pytest.approx(
        float((stacks[down] - rounded(stacks[down])).square().sum() / stacks[down].square().sum()), rel=1e-4
    )
    assert got[a_name]["q4_k"] == pytest.approx(share((a - rounded(a)) @ z, w), rel=1e-3)
    assert got[b_name]["q4_k"] == pytest.approx(share(a @ (z - z_rounded), w), rel=1e-3)
    assert "iq2_xxs" not in got[down] and got[down]["q8_0"] < got[down]["q4_k"] < got[down]["q2_k"]
    assert measured(True, None)[b_name]["q4_k"] < got[b_name]["q4_k"]
    assert measured(False, {0: 0.5})[down]["q4_k"] == pytest.approx(got[down]["q4_k"] / 2)


@pytest.mark.parametrize(
    "row, by_moments, expected", [(256, True, True), (256, False, False), (96, True, False)]
)
def test_signs_alone_are_for_rounding_by_moments(row: int, by_moments: bool, expected: bool) -> None:
    """q1_0's own encoder takes the nearest sign, which is useless; and llama.cpp has no type to take instead for other rows."""
    tensor = Tensor("blk.0.ffn_up_exps.weight", Whole(torch.zeros(2, 4, row)))
    found = ladder(tensor, None, by_moments)
    assert ("q1_0" in found) == expected
    assert "q8_0" in found and len(found) == len(set(found))
