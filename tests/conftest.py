"""Tiny models, made once for all tests; none of them writes into these."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from export.handmade import make_mobe
from marks import marks

from mobe_gguf import runtime


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``runtime`` or ``unit`` for every test, ``slow`` for some: see ``marks``."""
    for item in items:
        name = getattr(item, "originalname", item.name)
        for mark in marks(f"{item.path.relative_to(Path(__file__).parent).as_posix()}::{name}"):
            item.add_marker(mark)


def pytest_collection_finish(session: pytest.Session) -> None:
    """A run of unit tests alone finds no runtime, as on a machine where none is built."""
    if not any(item.get_closest_marker("runtime") for item in session.items):
        runtime.read_stamp = lambda _: None


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model(family, **options)``: a random model of ``tiny.make_model``."""
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


@pytest.fixture(scope="session")
def mobe(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``mobe(family, **options)``: the model of that family with random factors, see ``make_mobe``."""
    made: dict[Any, Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = (family, repr(sorted(options.items())))
        if key not in made:
            made[key] = make_mobe(model(family), tmp_path_factory.mktemp("mobe") / family, **options)
        return made[key]

    return get
