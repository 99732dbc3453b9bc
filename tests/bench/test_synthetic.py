"""The models that speed is measured on: the tools take them, and what is said about their work is the design's arithmetic."""

from __future__ import annotations

import os
import re
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
    each, own = shape.p * shape.d, 8 * shape.p**2
    assert shape.work(False, "f32") == synthetic.Work(4 * 3 * 8 * each, multiply=3 * 8 * each)
    # for each of gate and up: 403 M to combine, f of 8 matrices, the products of B's rows with x, and A's with that; down.
    # 50 M basis weights are read once a token
    work = shape.work(True, "f32")
    assert work.mix == 2 * 402_653_184 and work.evaluate == work.project == 2 * 8 * each
    assert work.multiply == 2 * own + 8 * each
    assert work.moved == 4 * (2 * (50_331_648 + own) + 8 * each)
    # all experts are in use at last, and each forms its matrix once
    many = 10_000
    work = shape.work(True, "f32", many)
    assert shape.experts_used(many) == pytest.approx(128)
    assert work.mix == pytest.approx(2 * 128 * 32 * each / many)
    assert work.multiply_adds - work.mix == 8 * each * 3 + 2 * own
    assert work.prompt == 2 * 8 * each and work.project == 0
    # B x once for all experts, and sums of numbers
    work = replace(shape, activation="none").work(True, "f32")
    assert work.multiply == 2 * (32 * each + 8 * 32 * shape.p + own) + 8 * each and work.evaluate == 0
    assert work.moved == 4 * (2 * (50_331_648 + own) + 8 * each)
    # down as well: as much again as gate or up, where its own matrix was
    work = replace(shape, activation="none", down=True).work(True, "f32")
    assert work.multiply == 3 * (32 * each + 8 * 32 * shape.p + own)
    assert work.moved == 4 * 3 * (50_331_648 + own)
    work, two = replace(shape, down=True).work(True, "f32"), shape.work(True, "f32")
    assert (work.mix, work.evaluate, work.project) == (1.5 * two.mix, 1.5 * two.evaluate, 1.5 * two.project)
    # rows of 1408 are not of whole blocks of q4_k: A and down are q5_0 then
    odd = synthetic.SHAPES["deepseek-v2-lite"]
    weights = 6 * odd.p * odd.d
    assert odd.work(False, "q4_k").moved == (2 * 4.5 + 5.5) / 8 * weights
    bases, own = 2 * 4 * odd.p * odd.d, 2 * 6 * odd.p**2
    assert odd.work(True, "q4_k").moved == (4.5 * bases + 5.5 * (own + weights)) / 8


def test_work_of_wide_bases() -> None:
    """Rows of A are as long as the rank, not as an expert is wide."""
    import synthetic

    shape = replace(synthetic.SHAPES["deepseek-v2-lite"], **synthetic.WIDE["deepseek-v2-lite"])
    bases, a, down = 2 * 2 * 1280 * 2048, 2 * 6 * 1408 * 1280, 6 * 1408 * 2048
    assert shape.work(True, "q4_k").moved == (4.5 * (bases + a) + 5.5 * down) / 8
    assert shape.work(True, "q4_k").multiply == bases + a + down + 2 * 6 * 2 * 1280


def test_bases_in_use_against_drawing() -> None:
    import numpy as np
    import synthetic

    shape = replace(synthetic.SHAPES["qwen3-30b"], terms=4)
    rng = np.random.default_rng(0)
    drawn = [len({b for _ in range(8) for b in rng.choice(32, 4, replace=False)}) for _ in range(3000)]
    assert shape.bases_used(8) == pytest.approx(np.mean(drawn), rel=0.01)
    assert replace(shape, terms=None).bases_used(1) == 32 and shape.bases_used(0) == 0


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
    options += ["--forms", "plain,wide,smaller,dense,terms4"]
    done = subprocess.run(
        [sys.executable, str(BENCH / "decode.py"), *options, "--layers", "1", "--dir", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    for form in ("rest", "plain", "wide", r"i?q\d\w+", "dense", "terms4"):
        assert len(re.findall(rf"│ +{form} │", done.stdout)) == 2, done.stdout
    assert done.stdout.startswith("Peaks of 1 threads"), done.stdout
