"""The fast engines against the formulas as they are written, and what a rounder gives against libggml's decoder."""

import numpy as np
import pytest
import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.quant.rounding import TYPES, engine, reference
from mobe_gguf.quant.rounding.engine import Problem, feedback, sweep
from mobe_gguf.quant.rounding.native import Kernels, library
from mobe_gguf.quant.rounding.rounder import ROUNDED, Rounder
from mobe_gguf.quant.rounding.scales import Scales
from mobe_gguf.runtime import ggml

LEVELS = sorted(name for name, one in TYPES.items() if one.width == 1)
N = 512  # two blocks of the outer loop


def moments(n: int = N, seed: int = 3) -> torch.Tensor:
    """Correlated inputs of uneven size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, n)) / n**0.5 + np.eye(n)
    x = rng.standard_normal((3 * n, n)) @ mixed * np.exp(0.5 * rng.standard_normal(n))
    return torch.from_numpy(x.T @ x / len(x)).float()


def matrix(rows: int = 12, n: int = N) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(4).standard_normal((rows, n)) * 0.03).float()


def start(name: str, w: torch.Tensor, dtype: torch.dtype):
    one = TYPES[name]
    stored = one.unpack(ggml.quantize(w.numpy(), name, moments().diagonal().numpy().copy()))
    scales = Scales.of(one, stored, 1, "cpu", dtype)
    offset = scales.offset()
    grid = one.grid(stored).with_scales(scales.scale(), offset)
    codes = torch.from_numpy(stored.codes.astype(np.int64))[None]
    return one, stored, scales, grid, codes


@pytest.mark.parametrize("name", ["q3_k", "q4_k", "iq4_nl", "tq1_0", "q1_0"])
def test_blocks_change_nothing(name: str) -> None:
    w = matrix()
    problem, factor = Problem.of(moments().double()[None])
    _, _, scales, grid, codes = start(name, w, torch.float64)
    problem = problem.of_rows(w.double()[None])
    fed = feedback(problem, factor, grid)
    assert torch.equal(fed[0].long(), reference.feedback(problem.w[0], problem.s[0], grid))
    descended = codes.clone()
    sweep(problem, descended, scales, grid, solve=False)
    assert torch.equal(descended[0].long(), reference.descend(problem.w[0], problem.s[0], grid, codes[0]))


@pytest.mark.skipif(library() is None, reason="no C compiler")
@pytest.mark.parametrize("name", LEVELS)
def test_kernels_do_what_torch_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix()
    problem, factor = Problem.of(moments()[None])
    problem = problem.of_rows(w[None])
    costs = []
    for use in (True, False):
        if not use:
            monkeypatch.setattr(engine, "Kernels", type("None_", (), {"of": staticmethod(lambda *a: None)}))
        _, _, scales, grid, _ = start(name, w, torch.float32)
        assert not use or Kernels.of(grid, w) is not None
        codes = feedback(problem, factor, grid)
        found = [float(problem.cost(grid.values(codes)).sum())]
        for _ in range(2):
            grid, _ = sweep(problem, codes, scales, grid)
            found.append(float(problem.cost(grid.values(codes)).sum()))
        costs.append(found)
    assert np.allclose(costs[0], costs[1], rtol=2e-3), costs


@pytest.mark.parametrize("name", LEVELS)
def test_a_sweep_never_costs(name: str) -> None:
    w = matrix()
    problem, _ = Problem.of(moments()[None])
    problem = problem.of_rows(w[None])
    one, stored, scales, grid, codes = start(name, w, torch.float32)
    codes = codes.to(torch.uint8)
    before = float(problem.cost(grid.values(codes)).sum())
    for _ in range(3):
        grid, _ = sweep(problem, codes, scales, grid)
        cost = float(problem.cost(grid.values(codes)).sum())
        assert cost <= before * (1 + 1e-5)
        before = cost
    decoded = one.decode(scales.stored(codes, stored), N)
    assert np.allclose(decoded, grid.values(codes)[0].numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(ROUNDED))
def test_errors_in_the_metric_fall(name: str) -> None:
    s, w = moments(), matrix()
    data, outcome = Rounder(s).encode(w, name)
    assert data.shape == (len(w), ggml.type_info(name).row_bytes(N)) and ggml.is_valid(data, name)
    error = torch.from_numpy(ggml.dequantize(data, name, N)) - w
    plain = torch.from_numpy(
        ggml.dequantize(ggml.quantize(w.numpy(), name, s.diagonal().numpy().copy()), name, N)
    )
    cost, was = (float(((e @ s) * e).sum()) for e in (error, plain - w))
    assert outcome.after == pytest.approx(cost, rel=0.1) and outcome.before == pytest.approx(was, rel=0.1)
    assert cost < 0.9 * was


def test_rows_do_not_depend_on_each_other() -> None:
    s, w = moments(), matrix(48)
    rounder = Rounder(s)
    whole, _ = rounder.encode(w, "q3_k")
    parts = [rounder.encode(part, "q3_k")[0] for part in w.split(16)]
    decoded = [ggml.dequantize(data, "q3_k", N) for data in (whole, np.concatenate(parts))]
    # products of matrices are summed in another order for other shapes: a code at a tie may fall either way
    assert (decoded[0] != decoded[1]).mean() < 1e-2


def test_rows_of_zeros_and_unseen_columns() -> None:
    s, w = moments(), matrix()
    s[5], s[:, 5] = 0, 0
    w[3] = 0
    data, outcome = Rounder(s).encode(w, "q4_k")
    decoded = ggml.dequantize(data, "q4_k", N)
    assert np.isfinite(decoded).all() and not decoded[3].any() and np.isfinite(outcome.after)


def test_moments_of_few_tokens_are_damped() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((7, N))).float()
    data, outcome = Rounder(x.T @ x).encode(matrix(), "q2_k")
    assert outcome.damping > 0 and ggml.is_valid(data, "q2_k")


@pytest.mark.parametrize("what", ["zero", "nan", "indefinite"])
def test_what_no_moments_can_be(what: str) -> None:
    s = {"zero": torch.zeros(N, N), "nan": moments(), "indefinite": moments()}[what]
    if what == "nan":
        s[0, 0] = float("nan")
    if what == "indefinite":
        s = s - 2 * torch.outer(torch.ones(N), torch.ones(N)) * s.diagonal().mean()
        s.diagonal().add_(s.diagonal().abs().mean() * 4)
    with pytest.raises(MobeError, match="second moments must|not positive definite"):
        Rounder(s)
