"""What a page says of files: against the files themselves, and the command that writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mobe_gguf.cli import main
from mobe_gguf.core import names
from mobe_gguf.evaluate.page import files as gathered
from mobe_gguf.export import Recipe, export
from mobe_gguf.formats.gguf import read_model
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint, reconstruct


@pytest.mark.parametrize(
    "options", [{}, {"projections": names.ALL_PROJECTIONS, "by_row": True}, {"g": 2, "m": 4}]
)
def test_weights_are_those_that_the_factors_stand_for(
    options: dict[str, object], mobe: Callable[..., Path], tmp_path: Path
) -> None:
    factors, file = mobe("qwen3_moe", **options), tmp_path / "mobe.gguf"
    export(factors, file, Recipe("f32"), quiet=True)
    weights, checkpoint = gathered.Weights(file), MobeCheckpoint(factors)
    assert tuple(weights.layers) == checkpoint.moe_layers
    for layer in weights.layers:
        for projection in weights.projections(layer):
            n, matrix = weights.experts(layer, projection)
            expected = reconstruct(checkpoint.layer(layer), projection)
            for e in (0, n - 1):
                torch.testing.assert_close(matrix(e), expected[e], atol=1e-5, rtol=1e-4)


def test_error_of_a_file(model: Callable[..., Path], tmp_path: Path) -> None:
    source = model("qwen3_moe")
    for quant in ("f32", "q8_0"):
        export(source, tmp_path / f"{quant}.gguf", Recipe(quant), allow_dense=True, quiet=True)
    found = list(gathered.errors(tmp_path / "f32.gguf", tmp_path / "q8_0.gguf", None))
    checkpoint = Checkpoint(source)
    assert [(layer, p) for layer, p, _ in found] == [
        (i, p) for i in checkpoint.moe_layers for p in names.ALL_PROJECTIONS
    ]
    layer, projection, error = found[0]
    n, made = gathered.Weights(tmp_path / "q8_0.gguf").experts(layer, projection)
    chosen = gathered.sample(n)
    w = torch.stack([checkpoint.expert(layer, projection, e) for e in chosen])
    d = torch.stack([made(e) for e in chosen]) - w
    assert error == pytest.approx(float(d.square().sum() / w.square().sum()), rel=1e-3) and 0 < error < 1e-3
    assert {e for _, _, e in gathered.errors(tmp_path / "f32.gguf", tmp_path / "f32.gguf", None)} == {0.0}


def test_bits_and_sizes_add_up(files: dict[str, Path]) -> None:
    file = read_model(files["mobe"])
    parts = gathered.by_layer(file)
    assert {"gate", "up", "down", "attention"} <= set(parts)
    gate, down = parts["gate"][0], parts["down"][0]
    assert gate.form.startswith("m 6, r ") and down.form == ""
    assert down.bits == pytest.approx(8.5) and down.types == "q8_0" and gate.types == "A q8_0, B q8_0"
    a, b, mix = (
        file.tensors[f"blk.0.ffn_gate_{name}"] for name in ("exps.weight", "basis.weight", "basis.mix")
    )
    n, p, _ = a.shape
    assert gate.bits == pytest.approx(8 * (a.n_bytes + b.n_bytes + mix.n_bytes) / (n * p * b.shape[-1]))
    assert sum(gathered.kinds(file).values()) == sum(t.n_bytes for t in file.tensors.values())


def test_eval_writes_a_page(files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    quick = ["--ctx", "64", "--chunks", "4", "-t", "1", "--text", str(text)]
    paths = [str(files[name]) for name in ("f16", "mobe", "q2_k")]
    result = CliRunner().invoke(main, ["eval", *paths, *quick, "--report", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    html = out.read_text()
    for key in ("quality", "bits", "errors", "sizes", "texts", "commands"):
        assert f'<section id="{key}">' in html
    assert 'id="routing"' not in html, "nothing is known of it without moments"
    assert 'class="part"' in html and "serve-compare" in html
    result = CliRunner().invoke(main, ["eval", *paths, *quick, "--report", str(tmp_path / "page.txt")])
    assert result.exit_code == 2 and "ends in .html" in result.stderr
    result = CliRunner().invoke(main, ["eval", *paths, *quick, "--moments", "m.safetensors"])
    assert result.exit_code == 2 and "--report" in result.stderr
