"""Bases rounded in the metric that their experts make of an error."""

from __future__ import annotations

import torch

from mobe_gguf.core.formula import combine
from mobe_gguf.core.metric import Metric
from mobe_gguf.export.basis_rounding import basis_metric
from mobe_gguf.quant.rounding.rounder import Rounder
from mobe_gguf.runtime import ggml

N, M, P, R, D = 8, 2, 24, 32, 128
TYPE = "q4_0"


def made(n: int = N, m: int = M) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Metric]:
    """A, mix, bases, and a metric for each expert with few strong directions."""
    g = torch.Generator().manual_seed(0)
    strong = torch.randn(D, D, generator=g) * torch.arange(1, D + 1) ** -0.7
    own = torch.randn(n, D, D, generator=g) * 0.02
    return (
        torch.randn(n, P, R, generator=g),
        torch.randn(n, m, generator=g),
        torch.randn(m, R, D, generator=g),
        Metric(strong + own, per_expert=True),
    )


def test_what_the_transforms_take_care_of_costs_nothing() -> None:
    """Of one expert with one basis, a change of Z within its rows."""
    transform, mix, bases, metric = made(1, 1)
    k = basis_metric(lambda e: transform[e], slice(0, 1), mix, bases, metric)
    s = metric.root[0] @ metric.root[0].T  # type: ignore[index]
    within = torch.randn(4, R, generator=torch.Generator().manual_seed(1)) @ bases[0]
    costs = [float(((within @ x) * within).sum()) for x in (k, s)]
    assert 0 <= costs[0] < 0.01 * costs[1]
    other = torch.randn(4, D, generator=torch.Generator().manual_seed(2))
    costs = [float(((other @ x) * other).sum()) for x in (k, s)]
    assert 0.01 * costs[1] < costs[0] < costs[1]


def test_less_is_lost_than_by_rounding_to_nearest() -> None:
    transform, mix, bases, metric = made()
    w = metric.apply(transform @ combine(mix, bases))

    def lost(stored: torch.Tensor) -> float:
        z = metric.apply(combine(mix, stored))
        gram = z @ z.mT + 1e-4 * torch.eye(R) * (z @ z.mT).diagonal(dim1=1, dim2=2).mean()
        solved = torch.linalg.solve(gram, z @ w.mT).mT
        return float((w - solved @ z).square().sum() / w.square().sum())

    k = basis_metric(lambda e: transform[e], slice(0, N), mix, bases, metric)
    flat = bases.view(-1, D)
    root = metric.root
    assert root is not None
    weights = (root @ root.mT).mean(0).diagonal().numpy().copy()
    found = {
        "nearest": ggml.quantize(flat.numpy(), TYPE, weights),
        "by moments": Rounder(k).encode(flat, TYPE)[0],
    }
    errors = {
        name: lost(torch.from_numpy(ggml.dequantize(data, TYPE, D)).view(bases.shape))
        for name, data in found.items()
    }
    assert errors["by moments"] < 0.8 * errors["nearest"], errors
