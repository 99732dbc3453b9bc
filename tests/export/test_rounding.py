"""``export --moments``: what is written costs less in the metric of the inputs, and wrong files of moments are said to be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mobe_gguf.calibrate.moments import collect
from mobe_gguf.cli import main
from mobe_gguf.core import resources
from mobe_gguf.core.metric import Roots
from mobe_gguf.export import Recipe, export, parse_quant, parse_target
from mobe_gguf.export.rounding import matrix
from mobe_gguf.export.source import Tensor, Whole
from mobe_gguf.export.stream import counted
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.formats.moments import Moments
from mobe_gguf.quant.rounding import TYPES
from mobe_gguf.runtime import ggml

Maker = Callable[..., Path]

#: Rows that blocks of 32 divide.
SIZE = {"moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def moments(model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moments") / "m.safetensors"
    collect(
        model("qwen3_moe", **SIZE), resources.path("models") / "calibration.txt", out, chunks=12, quiet=True
    )
    return out


def values(path: Path, name: str) -> torch.Tensor:
    info = read_gguf(path).tensors[name]
    data = np.fromfile(path, np.uint8, info.n_bytes, offset=info.offset).reshape(*info.shape[:-1], -1)
    return torch.from_numpy(ggml.dequantize(data, info.type, info.shape[-1]))


@pytest.mark.parametrize("quant", ["q4_0", "iq4_nl"])
def test_every_weighed_tensor_costs_less(model: Maker, moments: Path, tmp_path: Path, quant: str) -> None:
    path, made = model("qwen3_moe", **SIZE), {}
    for name, given in (("by-moments", str(moments)), ("nearest", None), ("f32", None)):
        recipe = Recipe(parse_quant("f32" if name == "f32" else quant), moments=given)
        made[name] = export(path, tmp_path / f"{name}.gguf", recipe, dense=True, quiet=True)
    report = made["by-moments"]
    assert report.rounded is not None and report.rounded.after < report.rounded.before
    assert made["nearest"].n_bytes == report.n_bytes and made["nearest"].rounded is None
    known, rounded = Moments(moments), 0
    for entry in report.entries:
        if entry.name not in known or entry.type not in TYPES:
            continue
        rounded += 1
        truth, mine, plain = (
            values(tmp_path / f"{n}.gguf", entry.name) for n in ("f32", "by-moments", "nearest")
        )
        roots, costs = known.find(entry.name), []
        for x in (mine, plain):
            d = (x - truth).reshape(-1, *truth.shape[-2:])
            metrics = [matrix(roots, i if len(roots.root) > 1 else 0) for i in range(len(d))]
            costs.append(sum(float(((e @ s) * e).sum()) for e, s in zip(d, metrics, strict=True)))
        assert costs[0] < costs[1], entry.name
    assert rounded == report.rounded.tensors >= 6


def test_an_imatrix_is_not_needed(model: Maker, moments: Path, tmp_path: Path) -> None:
    args = [
        "export",
        str(model("qwen3_moe", **SIZE)),
        str(tmp_path / "out.gguf"),
        "--dense",
        "--quant",
        "q2_k_s",
    ]
    done = CliRunner().invoke(main, [*args, "--moments", str(moments), "--no-card"])
    assert done.exit_code == 0, done.output
    assert "rounded by second moments" in done.stderr and "m.safetensors (second moments)" in done.stderr


def test_moments_of_another_model(model: Maker, moments: Path, tmp_path: Path) -> None:
    other = model("qwen3_moe", moe_intermediate_size=96)
    args = [
        "export",
        str(other),
        str(tmp_path / "out.gguf"),
        "--dense",
        "--quant",
        "q4_0",
        "--moments",
        str(moments),
    ]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 1 and "of another model" in done.output
    assert "blk.0.ffn_down_exps.weight" in done.output and not (tmp_path / "out.gguf").exists()


def test_no_file_of_moments(model: Maker, tmp_path: Path) -> None:
    given = tmp_path / "text.safetensors"
    shutil.copy(resources.path("models") / "heldout.txt", given)
    for path, said in ((given, "safetensors"), (tmp_path / "none", "no such file")):
        args = ["export", str(model("qwen3_moe")), str(tmp_path / "out.gguf"), "--dense", "--quant", "q4_0"]
        done = CliRunner().invoke(main, [*args, "--moments", str(path)])
        assert done.exit_code == 1 and said in done.output


def test_transforms_are_rounded_by_what_they_multiply(
    mobe: Maker, model: Maker, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A of random factors, solved for again in the full moments; the bases are weighed by them, too."""
    original, given = model("qwen3_moe"), tmp_path / "m.safetensors"
    collect(original, resources.path("models") / "calibration.txt", given, chunks=12, quiet=True)
    recipe = Recipe(parse_quant("q4_0"), moments=str(given))
    factors = mobe("qwen3_moe", r=32)
    report = export(factors, tmp_path / "out.gguf", recipe, original=original, quiet=True)
    assert report.refit is not None and report.refit.solved > 0
    assert report.refit.after < report.refit.before
    gate = next(e for e in report.entries if e.name == "blk.0.ffn_gate_basis.weight")
    assert gate.importance == "m.safetensors (second moments)"


def test_factors_fitted_by_moments_want_them(mobe: Maker, tmp_path: Path) -> None:
    factors = tmp_path / "factors"
    shutil.copytree(mobe("qwen3_moe", r=32), factors)
    config = json.loads((factors / "config.json").read_text())
    notes = {}
    for settings in ({}, {"moments": "0" * 64}):
        config["mobe"] = {**config.get("mobe", {}), "settings": settings}
        (factors / "config.json").write_text(json.dumps(config))
        report = export(factors, tmp_path / "out.gguf", Recipe(parse_quant("q4_0")), quiet=True, dry_run=True)
        notes[len(settings)] = [note for note in report.notes if "--moments FILE" in note]
    assert not notes[0] and len(notes[1]) == 1


def test_bits_are_divided_by_errors_after_this_rounding(model: Maker, moments: Path, tmp_path: Path) -> None:
    recipe = Recipe(parse_quant("q4_0"), moments=str(moments), target=parse_target(None, 6.5))
    report = export(model("qwen3_moe", **SIZE), tmp_path / "out.gguf", recipe, dense=True, quiet=True)
    assert report.divided and report.bits_per_weight <= 6.5 and report.rounded is not None
    said = " ".join(report.divided)
    assert (
        "attn_q: " in said and "down: " in said
    )  # not of the experts alone: the moments say how large all are
    small = export(
        model("qwen3_moe", **SIZE),
        tmp_path / "small.gguf",
        replace(recipe, target=parse_target(None, 6.0)),
        dense=True,
        quiet=True,
    )
    assert small.bits_per_weight <= 6.0


@dataclass(frozen=True)
class Known:
    """Moments of which the diagonals are known: inputs of mean square ``squares`` in each channel."""

    squares: dict[str, float]

    def __contains__(self, name: str) -> bool:
        return name in self.squares

    def scale(self, name: str) -> float:
        return self.squares[name]

    def find(self, name: str) -> Roots:
        return Roots(torch.eye(4)[None])


def test_an_error_counts_by_its_share_of_the_stream() -> None:
    """Embeddings of mean square 4; attention adds 4, experts 8, of two experts one half each."""
    tensors = {
        "token_embd.weight": torch.ones(3, 4),
        "blk.0.attn_output.weight": torch.ones(4, 4) / 2,
        "blk.0.attn_v.weight": torch.ones(4, 4),
        "blk.0.ffn_down_exps.weight": torch.ones(2, 4, 4) / 2,
        "blk.0.ffn_up_exps.weight": torch.ones(2, 4, 4),
        "blk.0.ffn_norm.weight": torch.ones(4),
        "blk.1.ffn_up.weight": torch.ones(4, 4),
    }
    given = {name: Tensor(name, Whole(x)) for name, x in tensors.items()}
    moments = Known({"blk.0.attn_output.weight": 1.0, "blk.0.ffn_down_exps.weight": 1.0})
    found = counted(given, cast(Moments, moments))
    assert found is not None
    assert found["blk.0.attn_v.weight"] == pytest.approx(2.0 * (4 / 8) ** 0.5)
    assert found["blk.0.attn_output.weight"] == pytest.approx(4.0 * (4 / 8) ** 0.5)
    assert found["blk.0.ffn_up_exps.weight"] == pytest.approx((8 / 16) ** 0.5)
    assert found["blk.0.ffn_down_exps.weight"] == pytest.approx(2.0 * (8 / 16) ** 0.5)
    assert "blk.1.ffn_up.weight" not in found  # nothing is known of what follows it


def test_few_tokens_are_believed_less(moments: Path) -> None:
    """Of what lies off the diagonal, the share that stays grows with the tokens."""
    roots = Moments(moments).find("blk.0.ffn_gate_exps.weight")
    assert roots is not None
    n = len(roots.root)
    whole = matrix(roots, 1)
    few, many = (matrix(roots, 1, torch.full((n,), count)) for count in (10, 10_000_000))
    off = ~torch.eye(len(whole), dtype=torch.bool)
    for s in (few, many):
        torch.testing.assert_close(s.diagonal(), whole.diagonal())
    shares = [float((s[off] / whole[off]).median()) for s in (few, many)]
    assert 0 < shares[0] < 0.1 < 0.99 < shares[1] < 1, shares
    one = matrix(roots, 1, torch.tensor([0] * n))  # no token at all: the diagonal, and never NaN
    assert torch.equal(one, torch.diag(whole.diagonal()))


def test_moments_of_a_model_with_the_same_shapes(model: Maker, moments: Path, tmp_path: Path) -> None:
    """What nothing but the checksum tells apart is said."""
    recipe, dense = (
        Recipe(parse_quant("q4_0"), moments=str(moments)),
        {"dense": True, "quiet": True, "dry_run": True},
    )
    own = export(model("qwen3_moe", **SIZE), tmp_path / "own.gguf", recipe, **dense)
    assert not [note for note in own.notes if "another model" in note]
    other = tmp_path / "other"
    shutil.copytree(model("qwen3_moe", **SIZE), other)
    path = other / "model.safetensors"
    save_file(
        {k: v + 1 if "norm" not in k else v for k, v in load_file(path).items()}, path, {"format": "pt"}
    )
    report = export(other, tmp_path / "out.gguf", recipe, **dense)
    (note,) = [note for note in report.notes if "another model" in note]
    assert str(moments) in note and "mobe-gguf moments" in note


def test_experts_that_saw_little_are_named(model: Maker, tmp_path: Path) -> None:
    """One chunk of text is not enough for the inputs of all experts."""
    given = tmp_path / "few.safetensors"
    text = resources.path("models") / "calibration.txt"
    collect(model("qwen3_moe", **SIZE), text, given, chunks=1, ctx=64, quiet=True)
    recipe = Recipe(parse_quant("q4_0"), moments=str(given))
    report = export(model("qwen3_moe", **SIZE), tmp_path / "out.gguf", recipe, dense=True, quiet=True)
    (note,) = [note for note in report.notes if "fewer tokens" in note]
    known = Moments(given)
    few = (known.tokens("blk.0.ffn_down_exps.weight") < SIZE["moe_intermediate_size"]).nonzero().flatten()
    assert len(few) and f": {few[0]}" in note
    assert report.rounded is not None and np.isfinite(report.rounded.after)
