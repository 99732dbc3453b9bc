"""``--dense``: the file that the multiplied-out checkpoint would give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from parity.reference import multiply_out

from export.published import make_wab
from export.test_export import NAMED
from mobe_gguf.cli import main
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.formats.gguf import GgufFile, read_gguf
from mobe_gguf.models import mobe_checkpoint
from mobe_gguf.models.wab import WabFiles
from mobe_gguf.quant.allocate import BY_MOMENTS, LADDER

Maker = Callable[..., Path]


def f32(file: GgufFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    assert info.type == "f32"
    return np.fromfile(file.path, np.float32, info.n_bytes // 4, offset=info.offset).reshape(info.shape)


def unnamed(file: GgufFile) -> dict[str, Any]:
    return {key: value for key, value in file.keys.items() if key not in NAMED}


@pytest.mark.parametrize(
    ("family", "options", "batch"),
    [
        *((family, {}, 1 << 28) for family in tiny.FAMILIES),
        ("qwen3_moe", dict(g=2, r=32, activation="silu"), 1),
        ("qwen3_moe", dict(g=2, r=32, projections=ALL_PROJECTIONS), 40_000),
        ("mixtral", dict(by_row=True, r=24, projections=("down",)), 1),
        ("deepseek_v3", dict(g=4, by_row=True, activation="none", our_key=True), 1 << 28),
        ("qwen2_moe", dict(layers=(1,), projections=("up",), r=24), 30_000),
    ],
    ids=str,
)
def test_f32(
    family: str, options: dict[str, Any], batch: int, mobe: Maker, model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Same keys, but for the model's name, and same tensors, in the same order."""
    monkeypatch.setattr(mobe_checkpoint, "BATCH_BYTES", batch)
    source = mobe(family, **options)
    truth = multiply_out(source, tmp_path / "truth", model(family))
    export(source, tmp_path / "dense.gguf", Recipe("f32"), dense=True, quiet=True)
    export(truth, tmp_path / "truth.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    got, want = read_gguf(tmp_path / "dense.gguf"), read_gguf(tmp_path / "truth.gguf")
    assert unnamed(got) == unnamed(want) and got.arch == want.arch
    assert got.keys.get("general.size_label") == want.keys.get("general.size_label")
    assert not [key for key in got.keys if "mobe" in key]
    assert [(t.name, t.shape) for t in got.tensors.values()] == [
        (t.name, t.shape) for t in want.tensors.values()
    ]
    for name in want.tensors:
        if "_exps" in name:
            np.testing.assert_allclose(f32(got, name), f32(want, name), rtol=1e-5, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(f32(got, name), f32(want, name), err_msg=name)


@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0", "bf16"])
def test_types_are_those_of_the_original(quant: str, mobe: Maker, model: Maker, tmp_path: Path) -> None:
    recipe = Recipe(parse_quant(quant))
    ours = export(mobe("deepseek_v3"), tmp_path / "a.gguf", recipe, dense=True, quiet=True)
    plain = export(model("deepseek_v3"), tmp_path / "b.gguf", recipe, allow_dense=True, quiet=True)
    assert [(e.name, e.type, e.wanted, e.n_bytes) for e in ours.entries] == [
        (e.name, e.type, e.wanted, e.n_bytes) for e in plain.entries
    ]
    assert ours.n_params == ours.original_params == plain.n_params


def test_command(mobe: Maker, model: Maker, tmp_path: Path) -> None:
    """Of an ordinary model, the file is what it is."""
    source = model("olmoe")
    for given, out in ((source, "ordinary.gguf"), (mobe("olmoe"), "mobe.gguf")):
        done = CliRunner().invoke(
            main, ["export", str(given), str(tmp_path / out), "--quant", "f32", "--dense", "-q"]
        )
        assert done.exit_code == 0, done.stderr
    export(source, tmp_path / "plain.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert (tmp_path / "ordinary.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert read_gguf(tmp_path / "mobe.gguf").tensors["blk.1.ffn_up_exps.weight"].shape == (8, 48, 64)


def test_training_output(tmp_path: Path) -> None:
    """``--wab`` with ``--dense``: the experts of the original, but for sigma's rounding."""
    original = tiny.make_model("qwen3_moe", tmp_path / "original")
    said = WabFiles((make_wab(original, tmp_path / "wab", g=2, m=8, activation="tanh"),), "tanh")
    export(original, tmp_path / "dense.gguf", Recipe("f32"), dense=True, wab=said, quiet=True)
    export(original, tmp_path / "plain.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    got, want = read_gguf(tmp_path / "dense.gguf"), read_gguf(tmp_path / "plain.gguf")
    assert unnamed(got) == unnamed(want) and list(got.tensors) == list(want.tensors)
    for name in want.tensors:
        np.testing.assert_allclose(f32(got, name), f32(want, name), rtol=2**-10, atol=1e-6, err_msg=name)


def test_types_that_are_slow_somewhere_are_named(model: Maker, tmp_path: Path) -> None:
    """Of experts alone; where the types are chosen for a size, none of these is."""
    path = model("qwen3_moe", hidden_size=256, moe_intermediate_size=256)
    options = dict(dense=True, allow_dense=True, quiet=True, dry_run=True)
    of = {"ffn_up_exps": "tq1_0", "ffn_down_exps": "q2_0", "attn_q": "tq2_0"}
    found = export(path, tmp_path / "a.gguf", Recipe("q8_0", overrides=tuple(of.items())), **options).notes
    assert [note.split()[0] for note in found if "product" in note] == ["tq1_0"]
    found = export(path, tmp_path / "a.gguf", Recipe("q8_0"), **options).notes
    assert not any("product" in note for note in found)
    assert not set(of.values()) & {*LADDER, *BY_MOMENTS}
