"""``mobe-gguf export --dense``: an unpatched llama.cpp runs the file, with the answers of the MoBE file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from export.handmade import make_mobe
from parity.llama import greedy, nmse

from mobe_gguf.core import resources
from mobe_gguf.export import Recipe, export, parse_quant
from stock.record import N_TOKENS, PROMPT, run_stock_file

#: The same products in another order: as in ``parity/test_parity.py``.
LIMIT = 1e-10


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", dict(activation="silu")),
        ("deepseek_v2", dict(g=2, by_row=True)),
        ("bailing_moe", dict(r=32)),
        ("mixtral", dict(activation="none")),
        ("tiny-moe", dict(m=6)),
    ],
    ids=str,
)
def test_same_logits(family: str, options: dict[str, Any], stock_lib: Path, tmp_path: Path) -> None:
    shipped = resources.path("models") / family
    original = shipped if shipped.is_dir() else tiny.make_model(family, tmp_path / "original", seed=1)
    mobe = make_mobe(original, tmp_path / "mobe", **options)
    export(mobe, tmp_path / "mobe.gguf", Recipe("f32"), quiet=True)
    export(mobe, tmp_path / "dense.gguf", Recipe("f32"), dense=True, quiet=True)
    patched = greedy(tmp_path / "mobe.gguf", PROMPT, N_TOKENS)
    stock = run_stock_file(stock_lib, tmp_path / "dense.gguf")
    assert patched["tokens"].tolist() == stock["tokens"].tolist()
    error = nmse(patched["logits"], stock["logits"])
    print(f"normalized squared error {error:.1e}")
    assert error < LIMIT


def test_quantized(stock_lib: Path, tmp_path: Path) -> None:
    """A mix of types, as llama-quantize has it."""
    mobe = make_mobe(resources.path("models") / "tiny-moe", tmp_path / "mobe", m=6)
    export(mobe, tmp_path / "dense.gguf", Recipe(parse_quant("q4_k_m")), dense=True, quiet=True)
    answer = run_stock_file(stock_lib, tmp_path / "dense.gguf")
    assert np.isfinite(answer["logits"]).all() and len(answer["tokens"]) == N_TOKENS
