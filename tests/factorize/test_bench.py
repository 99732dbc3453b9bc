"""bench/factorize.py: the published algorithm is what it says, and the table compares like with like."""

from __future__ import annotations

import importlib.util
import io
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from .test_solver import shared_structure


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[2] / "bench" / "factorize.py"
    spec = importlib.util.spec_from_file_location("bench_factorize", path)
    module = sys.modules["bench_factorize"] = importlib.util.module_from_spec(spec)
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


def test_a_row_names_the_first_budget_that_is_as_good(bench, monkeypatch):
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
