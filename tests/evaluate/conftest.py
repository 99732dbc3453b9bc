"""The shipped model in a few types, and with random factors; a text of it.  Nothing here is written into."""

from __future__ import annotations

from pathlib import Path

import pytest
from export.handmade import make_mobe

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.evaluate import heldout
from mobe_gguf.export import Recipe, export, parse_quant

MODEL = resources.path("models") / "tiny-moe"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``f16``, ``q8_0``, ``q2_k`` of the shipped model; ``mobe``: q8_0 with random factors."""
    if not runtime.is_built():
        pytest.skip("the runtime is not installed: run mobe-gguf build")
    folder = tmp_path_factory.mktemp("evaluate")
    mobe = make_mobe(MODEL, folder / "factors", m=6)
    paths = {}
    for name, model, quant in (
        *((quant, MODEL, quant) for quant in ("f16", "q8_0", "q2_k")),
        ("mobe", mobe, "q8_0"),
    ):
        paths[name] = folder / f"{name}.gguf"
        export(model, paths[name], Recipe(parse_quant(quant)), allow_dense=True, quiet=True)
    return paths


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 5,000 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(heldout().read_text(encoding="utf-8")[:16_000] + "\n", encoding="utf-8")
    return path
