"""The size that is predicted of a file is the one that export gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mobe_gguf.core.names import PROJECTIONS
from mobe_gguf.export import Recipe, export
from mobe_gguf.export.predict import predict
from mobe_gguf.factorize.job import prepare, run
from mobe_gguf.factorize.plan import Options
from mobe_gguf.models.checkpoint import Checkpoint


def test_a_file_with_factors_and_one_without(model: Callable[..., Path], tmp_path: Path) -> None:
    # alpha of 6 experts takes 72 bytes, and is padded
    original, recipe = model("qwen3_moe", num_experts=6), Recipe("q8_0")
    run(prepare(original, tmp_path / "mobe", Options(bases=3, rank=32, steps=1)), quiet=True)
    units = [(layer, p) for layer in Checkpoint(original).moe_layers for p in PROJECTIONS]
    found = predict(Checkpoint(original), units, recipe, (48, 32), groups=1, by_row=False, activation="tanh")
    expected = found.fixed + sum(found.unit(*unit, bases=3, rank=32) for unit in units)
    written = export(tmp_path / "mobe", tmp_path / "mobe.gguf", recipe, quiet=True).n_bytes
    plain = export(original, tmp_path / "plain.gguf", recipe, allow_dense=True, quiet=True).n_bytes
    assert written == expected
    assert 0 <= found.plain - plain < 200  # it has the three keys of factors
