"""The unpatched build, where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stock.record import stock_environment

#: Names a directory with the shared libraries of an unpatched build.
STOCK_VARIABLE = "MOBE_GGUF_STOCK_LIB"


@pytest.fixture(scope="session")
def stock_lib() -> Path:
    lib = Path(os.environ.get(STOCK_VARIABLE) or stock_environment().lib)
    if not (lib / "libllama.so").is_file():
        pytest.skip(
            f"no unpatched build: set {STOCK_VARIABLE}, or make one with python -m stock.record in tests/"
        )
    return lib
