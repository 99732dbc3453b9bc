"""``export --sequential`` of factors: they stay as they are, and down is rounded for what they leave wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import combine_groups

from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core import names
from mobe_gguf.core.formula import activate
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.export.sequential import Unsuited
from mobe_gguf.factorize.job import prepare, run
from mobe_gguf.factorize.plan import Options
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.checkpoint import Checkpoint

from . import test_sequential
from .gguf_sources import raw
from .test_sequential import CHUNKS, SIZE, TEXT, check_continues, check_states, kept_states, states, tensor

Maker = Callable[..., Path]


def factorize(model: Path, out: Path, **options: Any) -> Path:
    options = {"bases": 6, "rank": 64, "steps": 60, "activation": "none"} | options
    return run(prepare(model, out, Options(**options)), quiet=True).out


@pytest.fixture(scope="module")
def made(model: Maker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, its moments, and factors of its gate and up."""
    folder, path = tmp_path_factory.mktemp("factors"), model("qwen3_moe", **SIZE)
    collect(path, TEXT, folder / "m.safetensors", chunks=CHUNKS, quiet=True)
    return (
        path,
        folder / "m.safetensors",
        factorize(path, folder / "f", moments=str(folder / "m.safetensors")),
    )


def write(factors: Path, out: Path, moments: Path, sequential: bool = True, **options: Any) -> Path:
    more = {"sequential": (TEXT,), "chunks": CHUNKS} if sequential else {}
    recipe = Recipe(parse_quant("q4_0"), moments=str(moments), rest=options.pop("rest", None))
    export(factors, out, recipe, quiet=True, **more, **options)
    return out


def matrices(file: Path, layer: int, projection: str) -> torch.Tensor:
    """All experts' matrices, as the file has them."""
    read, a = read_gguf(file), tensor(file, names.transform_name(layer, projection))
    if names.basis_name(layer, projection) not in read.tensors:
        return a
    basis, mix = (tensor(file, f(layer, projection)) for f in (names.basis_name, names.mix_name))
    activation, n_group = (read.keys[f(read.arch)] for f in (names.key_activation, names.key_group_count))
    z = activate(combine_groups(mix, basis, n_group), activation)
    return z @ a if projection == "down" else a @ z


def outputs(path: Path, file: Path | None, skip: int = 0) -> torch.Tensor:
    """The last hidden states by transformers with the experts and routers of ``file``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_sequential, "experts", matrices)
        return states(path, file=file, skip=skip)


def test_down_makes_up_for_factors(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """On the text, and on one that nothing has seen; the factors' bytes and the file's size do not change."""
    path, moments, factors = made
    plain = write(factors, tmp_path / "plain.gguf", moments, sequential=False)
    ours = write(factors, tmp_path / "ours.gguf", moments)
    assert plain.stat().st_size == ours.stat().st_size
    found, others = (read_gguf(file).tensors for file in (ours, plain))
    same = {name for name in found if raw(found[name]).tobytes() == raw(others[name]).tobytes()}
    assert {n for n in found if "gate_exps" in n or "basis" in n} <= same
    assert not any("down_exps" in name for name in same)
    for skip, gain in ((0, 0.85), (CHUNKS, 0.9)):
        right = outputs(path, None, skip)
        errors = [float((outputs(path, f, skip) - right).square().sum()) for f in (plain, ours)]
        assert errors[1] < gain * errors[0], errors


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "tanh"},
        {"mix": "row"},
        {"groups": 2},
        {"projections": ("up", "down")},
        {"layers": (1,)},
    ],
    ids=str,
)
def test_what_is_run_is_what_is_stored(
    options: dict[str, Any], made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every form of factors the rounded model's states are those of transformers with the file's experts."""
    path, moments, _ = made
    factors = factorize(path, tmp_path / "factors", **options)
    ran = kept_states(monkeypatch)
    ours = write(factors, tmp_path / "ours.gguf", moments)
    check_states(path, ran[0][1], outputs(path, ours))


def test_a_stopped_run_continues(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bytes, factors too."""
    _, moments, factors = made
    check_continues(lambda out: write(factors, out, moments), tmp_path, monkeypatch)


def test_factors_of_a_gguf_file(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """What is copied stays; with types for the rest down is rounded for the factors."""
    path, moments, _ = made
    source = tmp_path / "source.gguf"
    export(path, source, Recipe("f16"), dense=True, quiet=True)
    collect(source, TEXT, tmp_path / "m.safetensors", chunks=CHUNKS, quiet=True)
    factors = factorize(source, tmp_path / "factors")
    with pytest.raises(Unsuited, match="none are rounded"):
        write(factors, tmp_path / "copied.gguf", tmp_path / "m.safetensors")
    plain = write(factors, tmp_path / "plain.gguf", tmp_path / "m.safetensors", sequential=False, rest="q4_0")
    ours = write(factors, tmp_path / "ours.gguf", tmp_path / "m.safetensors", rest="q4_0")
    right = outputs(path, None, CHUNKS)
    errors = [float((outputs(path, f, CHUNKS) - right).square().sum()) for f in (plain, ours)]
    assert errors[1] < 0.9 * errors[0], errors


def test_the_original_is_needed(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, moments, _ = made
    moved = Path(shutil.copytree(path, tmp_path / "moved"))
    factors = factorize(moved, tmp_path / "factors")
    shutil.rmtree(moved)
    with pytest.raises(Unsuited, match="no longer at .*--original"):
        write(factors, tmp_path / "out.gguf", moments)
    assert not list(tmp_path.glob("out*"))
    assert write(factors, tmp_path / "out.gguf", moments, original=path).is_file()
    assert Checkpoint(path).n_layer
