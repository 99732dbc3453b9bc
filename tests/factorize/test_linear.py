"""The linear form with few bases: its own problem against the projected one, and against Adam."""

from __future__ import annotations

import pytest
import torch

from mobe_gguf.core.formula import combine
from mobe_gguf.core.metric import Metric, Roots
from mobe_gguf.core.projected import Projected
from mobe_gguf.factorize import linear, solver
from mobe_gguf.factorize.down import fit_down
from mobe_gguf.factorize.linear import LinearProblem, suits
from mobe_gguf.factorize.solver import Settings, fit

N, P, D, M, R = 10, 24, 40, 3, 30


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric(kind: str) -> Metric:
    root = {"none": None, "channels": draw(N, 1, D).square(), "full": draw(D, 60, seed=4)}.get(kind)
    if kind == "full":
        return _double(Metric.of(root @ root.T, N, D))
    if kind == "roots":
        return _double(Metric.of(Roots(draw(N, D, 8), draw(N, D, seed=3).square()), N, D))
    return _double(Metric.of(root, N, D))


def _double(m: Metric) -> Metric:
    root, rest = (x if x is None else x.double() for x in (m.root, m.rest))
    return Metric(root, m.per_expert, rest)


def shared(noise: float = 0.1) -> torch.Tensor:
    """Experts made of three bases without an activation, and noise."""
    z = combine(draw(N, M, seed=1), draw(M, R, D, seed=2))
    w = draw(N, P, R, seed=3) @ z
    return (w / w.std() + noise * draw(N, P, D, seed=5)).float()


@pytest.mark.parametrize("kind", ["none", "channels", "full", "roots"])
@pytest.mark.parametrize("block", [3, N])
def test_loss_and_gradient_are_those_of_the_projected_problem(kind, block):
    """In float64: to rounding.  The gradient is half of it, of the sum and not of the mean."""
    at = metric(kind)
    w = at.apply(draw(N, P, D, seed=6))
    basis, mix = draw(M, R, D, seed=7), draw(N, M, seed=8)
    to_basis, to_mix = torch.empty_like(basis), torch.empty_like(mix)
    expected = Projected(w, "none", at, 1e-3, N).loss_and_gradient(basis, mix, to_basis, to_mix)
    problem = LinearProblem(w, at, 1e-3, block)
    point = problem.at(basis, mix)
    assert point.loss * problem.square / w.numel() == pytest.approx(expected, rel=1e-10)
    for ours, theirs in zip(point.gradient, (to_basis, to_mix), strict=True):
        assert torch.allclose(ours * 2 / w.numel(), theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "channels", "roots"])
def test_curvature(kind):
    """Against its definition, an expert at a time."""
    at = metric(kind)
    w = at.apply(draw(N, P, D, seed=6))
    basis, mix = draw(M, R, D, seed=7), draw(N, M, seed=8)
    found = LinearProblem(w, at, 1e-9, 4).at(basis, mix, True).curvature
    a = Projected(w, "none", at, 1e-9, N).transform(basis, mix).double()
    bases, columns = torch.zeros(M, R, M, R).double(), torch.zeros(D, D).double()
    mixes = torch.zeros(N, M, M).double()
    for i in range(N):
        one = at.slice(slice(i, i + 1), w) if at.root is not None else at
        own = a[i].T @ a[i]
        bases += torch.einsum("j,k,ab->jakb", mix[i], mix[i], own)
        root = one.adjoint(torch.eye(w.shape[2]).double()[None])[0]  # R^T, a column of R a row
        z = one.apply(combine(mix[i : i + 1], basis))[0]
        outside = torch.eye(w.shape[2]).double() - torch.linalg.pinv(z) @ z
        columns += root.T @ outside @ root / N
        weighed = [one.apply(b[None])[0] for b in basis]
        mixes[i] = torch.stack([torch.stack([(x * (own @ y)).sum() for y in weighed]) for x in weighed])
    ridge = 1e-5
    assert torch.allclose(found.bases, bases, rtol=ridge, atol=ridge * float(bases.abs().max()))
    assert torch.allclose(found.columns, columns, rtol=ridge, atol=ridge * float(columns.abs().max()))
    assert torch.allclose(found.mixes, mixes, rtol=ridge, atol=ridge * float(mixes.abs().max()))


def test_what_can_be_exact_nearly_is():
    """The limit is a tenth of a percent of what one basis leaves."""
    found = fit(shared(noise=0.0), Settings(M, R, activation="none"))
    one = fit(shared(noise=0.0), Settings(1, R, activation="none"))
    assert found.error < 1e-3 * one.error + 2e-4, (found.error, one.error)


@pytest.mark.parametrize("kind", ["none", "roots"])
@pytest.mark.parametrize("rounded", [None, "q4_0"])
def test_about_as_good_as_adam_with_three_times_the_steps(kind, rounded, monkeypatch):
    weight = Roots(draw(N, D, 8).float(), draw(N, D, seed=3).square().float()) if kind == "roots" else None
    w = shared()[:, :, :32] if rounded else shared()
    weight = Roots(weight.root[:, :32], weight.rest[:, :32]) if rounded and weight else weight
    settings = Settings(2, 20, activation="none", steps=100, basis_type=rounded)
    ours = fit(w.clone(), settings, weight=weight)
    monkeypatch.setattr(solver, "suits", lambda *_: False)
    theirs = fit(w.clone(), Settings(2, 20, activation="none", steps=300, basis_type=rounded), weight=weight)
    assert ours.objective < 1.15 * theirs.objective, (ours.objective, theirs.objective)


def test_groups_and_down():
    w = shared()
    together = fit(w.clone(), Settings(4, 16, 2, activation="none"))
    apart = [fit(x.clone(), Settings(2, 16, activation="none")) for x in w.chunk(2)]
    assert together.error == pytest.approx(sum(x.error for x in apart) / 2, rel=0.1)
    turned = fit_down(w.transpose(1, 2).contiguous(), Settings(2, 16, activation="none", transposed=True))
    assert turned.error == pytest.approx(fit(w.clone(), Settings(2, 16, activation="none")).error, rel=0.1)


def test_the_same_again():
    first, second = (fit(shared(), Settings(2, 28, activation="none", steps=12)) for _ in range(2))
    assert torch.equal(first.basis, second.basis) and torch.equal(first.transform, second.transform)


def test_when_it_is_used():
    assert suits("none", "scalar", 8, None)
    assert not suits("tanh", "scalar", 8, None) and not suits("none", "scalar", 8, 2)
    assert not suits("none", "scalar", 9, None) and not suits("none", "row", 2, None)


def test_a_block_is_never_nothing():
    assert linear.linear_block(8, 2048, 7168, 3584) == 1
    assert linear.linear_block(8, 96, 256, 96) == 8
