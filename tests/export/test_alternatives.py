"""``--target-size`` chooses the form of each projection: factors that stand for the original stay, others become ordinary
experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core import names, resources
from mobe_gguf.evaluate.verify import verify
from mobe_gguf.export import Recipe, export, parse_quant, parse_target
from mobe_gguf.export.alternatives import best
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.families import family_of
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.quant.allocate import Option
from tests.export.handmade import make_mobe

Maker = Callable[..., Path]

#: Rows that blocks of 32 divide.
SIZE = {"moe_intermediate_size": 64}
#: The only projection whose factors are exact.
EXACT = (1, "gate")


@pytest.fixture(scope="module")
def factors(model: Maker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Random factors of gate and up, the original, whose gate of one layer they stand for, and its moments."""
    root = tmp_path_factory.mktemp("alternatives")
    source = model("qwen3_moe", **SIZE)
    made = make_mobe(source, root / "factors", m=2, r=32, activation="none")
    layer = MobeCheckpoint(made).layer(EXACT[0])
    original = root / "original"
    shutil.copytree(source, original)
    tensors, family = (
        load_file(original / "model.safetensors"),
        family_of(json.loads((original / "config.json").read_text())),
    )
    mix, basis = layer.mix(EXACT[1]), layer.basis(EXACT[1])
    for e in range(len(mix)):
        product = layer.transform(EXACT[1], e) @ torch.einsum("j,jrd->rd", mix[e], basis)
        tensors[family.expert_weight(*EXACT[:1], e, EXACT[1])] = product.contiguous()
    save_file(tensors, original / "model.safetensors")
    moments = root / "m.safetensors"
    collect(original, resources.path("models") / "calibration.txt", moments, chunks=12, quiet=True)
    return made, original, moments


def written(
    given: tuple[Path, Path, Path], out: Path, original: Path | None
) -> tuple[set[tuple[int, str]], list[str]]:
    """The factorized projections of the file that ``--target-bpw`` makes, and what is said of it."""
    factors, _, moments = given
    recipe = Recipe(parse_quant("q4_0"), moments=str(moments), target=parse_target(None, 9.0))
    report = export(factors, out, recipe, original=original, quiet=True)
    assert not verify(out).problems
    file = read_gguf(out)
    found = {(i, p) for i in (0, 1, 2) for p in ("gate", "up") if names.basis_name(i, p) in file.tensors}
    for i, p in ((i, p) for i in (0, 1, 2) for p in ("gate", "up")):
        assert (names.mix_name(i, p) in file.tensors) == ((i, p) in found)
        assert file.tensors[names.transform_name(i, p)].shape[-1] == (32 if (i, p) in found else 64)
    assert (names.key_version(file.keys["general.architecture"]) in file.keys) == bool(found)
    return found, report.divided


def test_the_better_form_of_each_projection(factors: tuple[Path, Path, Path], tmp_path: Path) -> None:
    found, said = written(factors, tmp_path / "mixed.gguf", factors[1])
    assert found == {EXACT}
    assert "1 of 6 factorized projections keep their factors; in the rest plain is better" in said


def test_without_the_original_all_stay_factors(factors: tuple[Path, Path, Path], tmp_path: Path) -> None:
    found, _ = written(factors, tmp_path / "factors.gguf", None)
    assert len(found) == 6


def test_a_file_without_any_factors_is_an_ordinary_one(
    model: Maker, factors: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Of another original the factors are worth nothing; the file has the tensors and the keys of a plain one."""
    given = factors[0], factors[1], factors[2]
    found, said = written(given, tmp_path / "plain.gguf", model("qwen3_moe", **SIZE))
    assert not found and any(line.startswith("0 of 6 factorized projections") for line in said)
    export(
        model("qwen3_moe", **SIZE),
        tmp_path / "dense.gguf",
        Recipe(parse_quant("q4_0")),
        dense=True,
        quiet=True,
    )
    mine, dense = (read_gguf(tmp_path / name) for name in ("plain.gguf", "dense.gguf"))
    assert mine.tensors.keys() == dense.tensors.keys()
    assert {n: tuple(t.shape) for n, t in mine.tensors.items()} == {
        n: tuple(t.shape) for n, t in dense.tensors.items()
    }
    assert not any(".mobe." in key for key in mine.keys)


def test_options_that_no_other_beats() -> None:
    options = [Option("a", 10, 3.0), Option("b", 20, 4.0), Option("c", 20, 2.0), Option("d", 30, 2.0)]
    assert [o.type for o in best(options)] == ["a", "c"]
