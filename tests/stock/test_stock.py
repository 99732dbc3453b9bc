"""Files without factors: the patched build answers as the unpatched one did when ``record.py`` asked it.

Files with factors: the unpatched build refuses them.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from parity.llama import greedy, nmse
from parity.loader import Loader

from stock.record import (
    FILES,
    GOLDEN_ARRAYS,
    GOLDEN_TEXT,
    N_TOKENS,
    PROMPT,
    REFUSED,
    run_stock,
)

#: Tokens must be equal.  Logits cannot be, bit by bit, on any processor but the one that recorded them: the order of
#: sums depends on its vectors' width.
LIMIT = 1e-10


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN_TEXT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_same_tokens_and_logits(name, golden, tmp_path):
    file, arrays = FILES[name](), np.load(GOLDEN_ARRAYS)
    assert file.digest() == golden["files"][name], "the file is not the recorded one: python -m stock.record"
    answer = greedy(file.write(tmp_path / "model.gguf"), PROMPT, N_TOKENS)
    assert answer["prompt"].tolist() == arrays[f"{name}.prompt"].tolist()
    assert answer["tokens"].tolist() == arrays[f"{name}.tokens"].tolist()
    error = nmse(arrays[f"{name}.logits"], answer["logits"])
    assert error < LIMIT, f"normalized squared error {error:.2g}"


@pytest.mark.parametrize("name", FILES)
def test_same_bits_as_an_unpatched_build(name, stock_lib, tmp_path):
    """Where both run on one processor."""
    stock = run_stock(stock_lib, FILES[name]())
    patched = greedy(FILES[name]().write(tmp_path / "model.gguf"), PROMPT, N_TOKENS)
    assert all(np.array_equal(stock[key], patched[key]) for key in ("prompt", "tokens", "logits"))


@pytest.mark.parametrize("name", REFUSED)
def test_unpatched_build_refuses_factors(name, golden, stock_lib, tmp_path):
    with Loader(stock_lib) as loader:
        outcome = loader.load(REFUSED[name]().write(tmp_path / "model.gguf"))
    assert not outcome.loaded and outcome.signal is None
    assert outcome.errors.splitlines()[0] == golden["refused"][name]
