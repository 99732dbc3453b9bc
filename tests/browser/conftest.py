"""The shipped model in two types."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.export import Recipe, export


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if not runtime.is_built():
        pytest.skip("the runtime is not installed: run mobe-gguf build")
    folder = tmp_path_factory.mktemp("two")
    for quant in ("q8_0", "q2_k"):
        export(
            resources.path("models") / "tiny-moe",
            folder / f"{quant}.gguf",
            Recipe(quant),
            allow_dense=True,
            quiet=True,
        )
    return folder / "q8_0.gguf", folder / "q2_k.gguf"
