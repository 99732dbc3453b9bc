"""The models that speed is measured on: the tools take them, and what is said about their work is the design's arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def test_work_of_the_published_shapes() -> None:
    import synthetic

    shape = synthetic.SHAPES["qwen3-30b"]
    each = shape.p * shape.d
    assert shape.multiply_adds(False) == 3 * 8 * each
    # for each of gate and up: 403 M to combine, and the products of B's rows with x, and A's with that
    assert shape.multiply_adds(True) == 2 * (402_653_184 + 8 * each + 8 * shape.p**2) + 8 * each
    # 50 M basis weights, once a token
    assert shape.weights_read(True) == 2 * (50_331_648 + 8 * shape.p**2) + 8 * each
    # all experts are in use at last, and each forms its matrix once
    many = 10_000
    assert shape.experts_used(many) == pytest.approx(128)
    combine = 2 * 128 * 32 * each / many
    assert shape.multiply_adds(True, many) == pytest.approx(
        combine + 8 * each * 3 + 16 * shape.p**2, rel=1e-9
    )
    assert replace(shape, terms=2).weights_read(True) == 2 * (16 * each + 8 * shape.p**2) + 8 * each


def test_experts_in_use_against_drawing() -> None:
    import numpy as np
    import synthetic

    shape = synthetic.SHAPES["small"]
    rng = np.random.default_rng(0)
    drawn = [
        len({e for _ in range(3) for e in rng.choice(shape.n, shape.k, replace=False)}) for _ in range(4000)
    ]
    assert shape.experts_used(3) == pytest.approx(np.mean(drawn), rel=0.01)


def test_decoding_bench_prints_every_form(tmp_path: Path) -> None:
    options = ["--shapes", "small", "--quants", "q4_k", "--rounds", "1", "--batches", "1,4", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCH / "decode.py"), *options, "--layers", "1", "--dir", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    for form in ("plain", "dense", "terms4", "none"):
        assert done.stdout.count(f"│ {form:>6} │") == 2, done.stdout
