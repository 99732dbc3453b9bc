"""bench/factorize.py: the published algorithm is what it says, and the table compares like with like."""

from __future__ import annotations

import importlib.util
import io
import math
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from .test_solver import shared_structure


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[2] / "bench" / "factorize.py"
    spec = importlib.util.spec_from_file_location("bench_factorize", path)
    module = sys.modules["bench_factorize"] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # not longer: bench/factorize.py would hide tests/factorize
        patch.syspath_prepend(path.parent)  # for the files beside it
        spec.loader.exec_module(module)
    return module


def test_the_published_start(bench):
    """Bases are singular vectors of the runs; A times its own basis is the best of that rank; the logits one-hot."""
    w = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    transform, basis, logits = bench.published_start(w, 3, 4)
    assert torch.allclose(basis @ basis.transpose(1, 2), torch.eye(4).expand(3, 4, 4), atol=1e-5)
    assert logits.tolist() == [[1, 0, 0]] * 2 + [[0, 1, 0]] * 2 + [[0, 0, 1]] * 2
    own = basis.repeat_interleave(2, 0)
    assert torch.allclose(transform, w @ own.transpose(1, 2), atol=1e-5)
    rest = (w - transform @ own).reshape(3, -1).square().sum(1)
    assert torch.allclose(rest, torch.linalg.svdvals(w.view(3, 10, 8))[:, 4:].square().sum(1), rtol=1e-4)
    with pytest.raises(ValueError, match="6 experts are not 4 equal runs"):
        bench.published_start(w, 4, 4)


def test_the_published_steps(bench):
    """Errors as by the formula, never rising, and learning."""
    w = shared_structure()
    errors = list(bench.published(w, 3, 24, 40))
    assert len(errors) == 41 and errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]
    x = w / w.std()
    transform, basis, logits = bench.published_start(x, 3, 24)
    u = torch.einsum("nm,mrd->nrd", logits.softmax(-1), basis)
    first = (x - transform @ (u * torch.sigmoid(u))).square().sum() / x.square().sum()
    assert errors[0] == pytest.approx(float(first), rel=1e-4)


def test_a_row_names_the_first_budget_that_is_as_good(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CACHE", tmp_path)
    theirs = bench.Run([1.0] * 5 + [0.5] * 5 + [0.2], 100.0, 3_000_000)
    ours = {25: 0.6, 50: 0.3, 75: 0.15, 100: 0.1}
    asked = []

    def run(case, method, steps, threads):
        asked.append((method, steps))
        return theirs if method == "published" else bench.Run([math.inf, ours[steps]], steps / 25, 1_000_000)

    monkeypatch.setattr(bench, "in_process", run)
    rows = list(bench.rows(bench.Case("tiny", 0, "up"), [5, 10], 100, 1, Console(file=io.StringIO())))
    assert rows[0] == ["tiny 0 up", "5", "0.5000", "50.0", "50", "2.0", "25.0", "0.1000 (-80%)", "3 / 1"]
    assert rows[1][4:7] == ["75", "3.0", "33.3"]
    assert len(asked) == len(set(asked)), "no run is made twice"


def test_a_published_run_is_kept_and_said_to_be(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CACHE", tmp_path)
    made = []

    def run(case, method, steps, threads):
        made.append((case, steps))
        return bench.Run([1.0, 0.5], 3.0 + len(made), 2_000_000)

    monkeypatch.setattr(bench, "in_process", run)
    case = bench.Case("tiny", 0, "up")
    first, second = (bench.published_run(case, 1, 1, again=False) for _ in range(2))
    assert len(made) == 1 and not first.kept and second.kept
    assert (second.errors, second.seconds, second.peak) == (first.errors, first.seconds, first.peak)
    assert bench.published_run(case, 1, 1, again=True).seconds == 5.0 and len(made) == 2
    for other in ((bench.Case("tiny", 0, "gate"), 1, 1), (case, 2, 1), (case, 1, 2)):
        bench.published_run(*other, again=False)
    assert len(made) == 5, "another case, length or number of threads is another run"
    monkeypatch.setattr(bench, "PUBLISHED_RATE", 0.01)
    bench.published_run(case, 1, 1, again=False)
    assert len(made) == 6
    row = next(bench.rows(case, [1], 25, 1, Console(file=io.StringIO())))
    assert row[1] == "1*"


def test_shapes(bench):
    assert bench.Shape.of("qwen3-30b") == bench.Shape(48, 128, 768, 2048, 32)
    assert bench.Shape.of("qwen3-30b/16") == bench.Shape(48, 8, 768, 2048, 2)
    assert bench.Shape.of("2x4x16x32x2") == bench.Shape(2, 4, 16, 32, 2)
    for wrong in ("qwen3-30b/3", "qwen3-30b/64", "qwen3-30b/0", "qwen4", "2x4x16", "2x4x16x32xm"):
        with pytest.raises(click.UsageError, match="expected one of qwen3-30b, deepseek-v3"):
            bench.Shape.of(wrong)


def test_the_work_of_a_step_counts_its_products(bench):
    """Against torch's own count of one step; it knows nothing of the factorization and the inverse."""
    from torch.utils.flop_counter import FlopCounterMode

    from mobe_gguf.core.metric import Metric
    from mobe_gguf.core.projected import Projected

    shape = bench.Shape(1, 6, 8, 16, 3)
    w = shape.experts(torch.device("cpu"))
    assert w.shape == (6, 8, 16)
    basis, mix = torch.randn(3, 8, 16), torch.randn(6, 3)
    with FlopCounterMode(display=False) as counter:
        Projected(w, "tanh", Metric(), 1e-6, 6).loss_and_gradient(
            basis, mix, torch.empty_like(basis), torch.empty_like(mix)
        )
    in_place = 6 * (8 * 8 * 16 + 3 * 8 * 16)  # A^T W and the gradient of B, which torch does not count
    assert shape.work("ours") - 6 * 8**3 == counter.get_total_flops() / 2 + in_place
    start = [torch.randn(6, 8, 8), basis, mix]
    with FlopCounterMode(display=False) as counter:
        list(bench.published_steps(w, start, 1))  # a step, and the loss after it
    assert shape.work("published") == counter.get_total_flops() / 2 - 6 * (8 * 8 * 16 + 3 * 8 * 16)


def test_large_layers(bench, monkeypatch):
    """The table for a GPU, on the CPU and small: both sides learn, and the hours are those of its own columns."""
    monkeypatch.setattr(bench, "apart", lambda function, *arguments: function(*arguments))
    options = ["--models", "large", "--shapes", "900000x8x16x32x2", "--large-steps", "6", "--steps", "50"]
    done = CliRunner().invoke(bench.main, options)
    assert done.exit_code == 0, done.output
    rows = [
        [c.strip() for c in x.strip("│").split("│")]
        for x in done.stdout.splitlines()
        if "900000x8x16x32x2" in x
    ]
    assert [r[1:3] for r in rows] == [["published", "6"], ["ours", "6"]]
    assert [r[7] for r in rows] == ["1000", "50"]
    for row in rows:
        assert 0 < float(row[3]) < 1
        hours = float(row[4]) * int(row[7]) * 2 * 900_000 / 3600  # so many layers that three digits show
        assert float(row[8].replace(",", "")) == pytest.approx(hours, rel=0.01)


def test_the_linear_form_against_adam(bench, monkeypatch):
    """Both are run, ours in its own method; a timed case is scaled to all experts."""
    import linear_form

    from mobe_gguf.factorize import solver

    small = dict(n=6, p=12, d=24, m=2, r=16, k=8)
    cases = {
        "whole": linear_form.LinearCase("whole", **small),
        "timed": linear_form.LinearCase("timed", timed=12, layers=3, **small),
    }
    monkeypatch.setattr(linear_form, "CASES", cases)
    monkeypatch.setattr(linear_form, "ADAM", 30)
    suits, said = solver.suits, []

    def apart(function, *arguments):
        monkeypatch.setattr(solver, "suits", suits)
        return function(*arguments)

    rows = [row for name in cases for row in linear_form.linear_rows(name, apart, said.append)]
    assert [row[1] for row in rows] == ["Adam", "ours"] * 2 and len(said) == 4
    assert 0 < float(rows[1][3].split()[0]) < 1 and rows[0][2] == "30" and int(rows[1][2]) <= 30
    assert rows[2][3] == rows[3][3] == "not run" and "on 16 cores" in rows[3][7]
