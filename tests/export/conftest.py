"""MoBE checkpoints of the tiny models, made once for all tests of this folder; none of them writes into these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.handmade import make_mobe


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
