"""The projected problem: value against the formula, gradient against autograd, blocks against the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.metric import Metric
from mobe_gguf.core.projected import (
    Projected,
    SingularError,
    activated,
    fast_products,
    solve_transform,
)

RIDGE = 1e-3  # large enough that its share of the gradient is seen


def problem(n=5, p=7, d=11, m=3, r=4, mix="scalar", metric="none", activation="tanh", block=2, seed=0):
    """``(Projected, basis, mix, root of the metric as [n, d, d])``, float64."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w, basis = randn(n, p, d), randn(m, r, d)
    alpha = randn(*{"scalar": (n, m), "row": (n, m, r), "column": (n, m, 1, d)}[mix])
    weight = {
        "none": None,
        "diagonal": randn(d).square(),
        "expert": randn(n, 1, d).square(),
        "full": (lambda x: x.T @ x)(randn(2 * d, d)),
    }[metric]
    metric = Metric.of(weight, n, d)
    if metric.root is None:
        root = torch.eye(d, dtype=torch.float64).expand(n, d, d)
    elif metric.per_expert:
        root = torch.diag_embed(metric.root.double())
    else:
        root = (metric.root if metric.root.dim() == 2 else metric.root.diag()).double().expand(n, d, d)
    return Projected(w @ root, activation, metric, RIDGE, block), basis, alpha, root


def loss_by_autograd(problem, basis, alpha, root):
    """The same loss written down plainly, A from torch's own least squares, all of it differentiable."""
    total = 0
    for i, w in enumerate(problem.w):
        weights = alpha[i].reshape(*alpha[i].shape, *[1] * (4 - alpha.dim()))
        z = activate((weights * basis).sum(0), problem.activation) @ root[i]
        ridge = problem.ridge * z.square().sum() / z.shape[0]
        a = torch.linalg.solve(z @ z.T + ridge * torch.eye(z.shape[0], dtype=z.dtype), z @ w.T).T
        total = total + (w - a @ z).square().sum() + ridge * a.square().sum()
    return total / problem.w.numel()


@pytest.mark.parametrize("activation", ["none", "silu", "tanh"])
@pytest.mark.parametrize("mix", ["scalar", "row", "column"])
@pytest.mark.parametrize("metric", ["none", "diagonal", "expert", "full"])
def test_gradient_is_that_of_autograd(activation, mix, metric):
    p, basis, alpha, root = problem(activation=activation, mix=mix, metric=metric)
    basis_grad, mix_grad = torch.empty_like(basis), torch.empty_like(alpha)
    loss = p.loss_and_gradient(basis, alpha, basis_grad, mix_grad)
    basis.requires_grad_()
    alpha.requires_grad_()
    expected = loss_by_autograd(p, basis, alpha, root)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    assert torch.allclose(basis_grad, basis.grad, rtol=1e-7, atol=1e-10)
    assert torch.allclose(mix_grad, alpha.grad, rtol=1e-7, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 6),
    p=st.integers(1, 6),
    d=st.integers(1, 9),
    m=st.integers(1, 4),
    r=st.integers(1, 6),
    block=st.integers(1, 7),
    mix=st.sampled_from(["scalar", "row"]),
    metric=st.sampled_from(["none", "diagonal", "expert", "full"]),
)
def test_blocks_give_the_same_as_the_whole(n, p, d, m, r, block, mix, metric):
    shape = dict(n=n, p=p, d=d, m=m, r=min(r, p, d), mix=mix, metric=metric)
    results = []
    for size in (block, n):
        q, basis, alpha, _ = problem(**shape, block=size)
        grads = torch.empty_like(basis), torch.empty_like(alpha)
        results.append((q.loss_and_gradient(basis, alpha, *grads), *grads))
    (loss, basis_grad, mix_grad), (loss2, basis_grad2, mix_grad2) = results
    assert loss == pytest.approx(loss2, rel=1e-9, abs=1e-12)
    assert torch.allclose(basis_grad, basis_grad2, rtol=1e-8, atol=1e-12)
    assert torch.allclose(mix_grad, mix_grad2, rtol=1e-8, atol=1e-12)


def test_an_exact_factorization_has_no_loss_and_no_gradient():
    p, basis, alpha, _ = problem()
    a = torch.randn(5, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = Projected(a @ activate(combine(alpha, basis), "tanh"), "tanh", Metric(), 1e-12, 2)
    grads = torch.empty_like(basis), torch.empty_like(alpha)
    assert p.loss_and_gradient(basis, alpha, *grads) < 1e-10
    assert max(g.abs().max() for g in grads) < 1e-9
    assert torch.allclose(p.transform(basis, alpha).double(), a, atol=1e-5)


def test_the_loss_does_not_change_with_the_scale_of_the_bases():
    p, basis, alpha, _ = problem(activation="none")
    grads = torch.empty_like(basis), torch.empty_like(alpha)
    losses = [p.loss_and_gradient(basis * scale, alpha, *grads) for scale in (1.0, 1e-3, 50.0)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)


def test_what_cannot_be_solved_is_reported():
    p, basis, alpha, _ = problem()
    grads = torch.empty_like(basis), torch.empty_like(alpha)
    for bad in (torch.zeros_like(basis), torch.full_like(basis, float("nan"))):
        with pytest.raises(SingularError):
            p.loss_and_gradient(bad, alpha, *grads)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(4),
        torch.ones(3, 1, 5),
        -torch.ones(5),
        torch.zeros(5),
        torch.tensor([1.0, float("nan")] * 2 + [1]),
    ],
)
def test_bad_input_weights(weight):
    with pytest.raises(MobeError, match="input weights"):
        Metric.of(weight, 2, 5)


def test_fast_products_last_as_long_as_somebody_is_inside():
    """Units are fitted in threads: the first in sets the precision, the last out puts back what was there."""
    torch.set_float32_matmul_precision("high")
    try:
        first, second = fast_products(), fast_products()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "medium"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(SingularError), fast_products():
            raise SingularError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_quick_tanh_is_tanh():
    u = torch.linspace(-30, 30, 100_001)
    assert (activated(u, "tanh") - torch.tanh(u)).abs().max() < 3e-7
    assert (activated(u.double(), "tanh") - torch.tanh(u.double())).abs().max() < 1e-15


def test_the_float32_solution_is_that_of_float64():
    """By the inverse, on a CPU: as good as the conditioning allows (here about 1e4, its square in the Gram matrix)."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 20, 60, generator=g) * torch.logspace(0, -2, 20)[:, None]
    w = torch.randn(3, 30, 60, generator=g)
    a, product = solve_transform(w, z, 1e-6)
    exact, product64 = solve_transform(w.double(), z.double(), 1e-6)
    assert torch.allclose(product.double(), product64, rtol=1e-4, atol=1e-4)
    assert ((a - exact) @ z.double()).norm() < 1e-3 * (exact @ z.double()).norm()


def claimed_and_true(patch: pytest.MonkeyPatch, rounds: bool) -> tuple[float, float]:
    """Loss by float32 products whose operands are rounded to bfloat16, as AMX does it, and that of float64, of a Z whose rows are
    alike, as those of a good basis are."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 1, 64, generator=g)
    basis = shared + 0.2 * torch.randn(4, 24, 64, generator=g)
    alpha, w = torch.randn(6, 4, generator=g), torch.randn(6, 32, 64, generator=g) * 0.1
    w += torch.bmm(torch.randn(6, 32, 24, generator=g), combine(alpha, basis))
    exact = Projected(w.double(), "none", Metric.of(None, 6, 64), 1e-6, 6)
    gradients = [torch.zeros_like(x, dtype=torch.float64) for x in (basis, alpha)]
    true = exact.loss_and_gradient(basis.double(), alpha.double(), *gradients) / exact.mean_square
    product = torch.bmm
    patch.setattr(torch, "bmm", lambda a, b: product(a.bfloat16().float(), b.bfloat16().float()))
    patch.setattr("mobe_gguf.core.projected.rounds_products", lambda: rounds)
    inexact = Projected(w, "none", Metric.of(None, 6, 64), 1e-6, 6)
    gradients = [torch.zeros_like(x) for x in (basis, alpha)]
    return inexact.loss_and_gradient(basis, alpha, *gradients) / inexact.mean_square, true


def test_products_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that rounds operands A is solved for, not multiplied by a rounded inverse: the loss that chooses the best step is
    nearly that of the basis."""
    claimed, true = claimed_and_true(monkeypatch, rounds=True)
    monkeypatch.undo()
    wrong, _ = claimed_and_true(monkeypatch, rounds=False)
    assert abs(claimed - true) < abs(wrong - true) / 4, (claimed, wrong, true)
