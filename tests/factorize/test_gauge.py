"""The gauge of a linear form changes no product, and what rounding costs in it is least."""

from __future__ import annotations

import torch

from mobe_gguf.core.formula import combine
from mobe_gguf.core.metric import Metric
from mobe_gguf.factorize.gauge import flat_gauge

N, P, R, D, M = 6, 12, 8, 20, 2


def forms(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Metric]:
    """A, bases whose rows differ in size by a factor of a hundred, mix, and a metric for each expert."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 1, R)
    basis = torch.randn(M, R, D, generator=g) * sizes[:, None]
    return (
        torch.randn(N, P, R, generator=g),
        basis,
        torch.randn(N, M, generator=g),
        Metric(torch.randn(N, D, D, generator=g), per_expert=True),
    )


def cost(transform: torch.Tensor, basis: torch.Tensor, mix: torch.Tensor, metric: Metric) -> float:
    """``sum_a M_aa G_aa``: what noise of a relative size costs."""
    z = metric.apply(combine(mix, basis))
    m, g = (transform.mT @ transform).sum(0).diagonal(), (z @ z.mT).sum(0).diagonal()
    return float(m @ g)


def test_rounding_costs_least() -> None:
    transform, basis, mix, metric = forms()
    new = flat_gauge(transform, basis, mix, metric, 0)
    turn = torch.linalg.lstsq(
        basis.transpose(1, 2).reshape(-1, R), new.transpose(1, 2).reshape(-1, R)
    ).solution.T
    torch.testing.assert_close(turn @ basis, new, rtol=1e-3, atol=1e-3)  # one T for all bases
    other = transform @ torch.linalg.inv(turn)
    torch.testing.assert_close(
        other @ combine(mix, new), transform @ combine(mix, basis), rtol=1e-2, atol=1e-2
    )
    z = metric.apply(combine(mix, basis))
    m, g = (transform.mT @ transform).sum(0).double(), (z @ z.mT).sum(0).double()
    roots = torch.linalg.eigvals(m @ g).real.clamp_min(0).sqrt()
    least = float(roots.sum() ** 2 / R)
    assert (
        least <= cost(other, new, mix, metric) < 1.5 * least
    )  # a random rotation is not quite flat in 8 dimensions
    assert cost(transform, basis, mix, metric) > 1.2 * cost(other, new, mix, metric)


def test_nothing_to_turn() -> None:
    transform, basis, mix, metric = forms()
    assert flat_gauge(torch.zeros_like(transform), basis, mix, metric, 0) is basis
    assert flat_gauge(transform, basis, torch.zeros_like(mix), metric, 0) is basis
