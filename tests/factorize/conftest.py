"""Tiny models, made once for all tests of this folder, and one thread: the matrices are too small for more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model(family, **options)``: a model of ``tiny.make_model`` that no test may write into."""
    made: dict[Any, Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = (family, repr(sorted(options.items())))
        if key not in made:
            made[key] = tiny.make_model(family, tmp_path_factory.mktemp("models") / family, **options)
        return made[key]

    return get


@pytest.fixture
def own_model(model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``own_model(family, **options)``: a copy that the test may damage."""

    def get(family: str = "qwen3_moe", **options: Any) -> Path:
        return Path(shutil.copytree(model(family, **options), tmp_path / "own"))

    return get
