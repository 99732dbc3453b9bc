"""Sums of second moments, and their strongest directions."""

from __future__ import annotations

import pytest
import torch

from mobe_gguf.calibrate import roots


def spectrum(d: int, power: float) -> torch.Tensor:
    """``[d, d]`` whose values fall as ``i^-power``."""
    q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(d)))[0]
    return (q * torch.arange(1.0, d + 1).pow(-power)) @ q.T


@pytest.mark.parametrize("d", [7, 300, 1500, 2100])
def test_half_of_the_products(d):
    x, y = torch.randn(2, 40, d, generator=torch.Generator().manual_seed(1))
    sums = torch.zeros(d, d)
    roots.add_products(sums, x)
    roots.add_products(sums, y)
    assert torch.allclose(roots.mirror(sums), x.T @ x + y.T @ y, atol=1e-3)


def test_as_many_directions_as_hold_the_energy(monkeypatch):
    s = spectrum(200, 2)
    values = torch.linalg.eigvalsh(s).flip(0).double()
    for keep in (0.5, 0.9, 0.99):
        k = roots.directions(s, keep)
        assert values[:k].sum() >= keep * values.sum() > values[: k - 1].sum()
    assert roots.directions(torch.eye(200), 0.999) == 200  # more than half: all
    assert roots.directions(s, 1) == 200
    monkeypatch.setattr(roots, "MOST", 64)  # many channels: by iteration, and no more than so many
    assert roots.directions(torch.eye(200), 0.999) == roots.directions(s, 1) == 64
    assert abs(roots.directions(s, 0.9) - int((values.cumsum(0) < 0.9 * values.sum()).sum()) - 1) <= 1


@pytest.mark.parametrize("most", [64, 1024])
def test_the_strongest_and_a_diagonal(most, monkeypatch):
    monkeypatch.setattr(roots, "MOST", most)
    s = spectrum(200, 2)
    found, rest = roots.root(s, 30)
    values, vectors = torch.linalg.eigh(s)
    best = (vectors[:, -30:] * values[-30:]) @ vectors[:, -30:].T
    assert (found @ found.T - best).norm() < 0.02 * best.norm()
    assert torch.allclose(found.square().sum(1) + rest, s.diagonal().clamp_min(1e-4), atol=1e-4)
    whole, none = roots.root(s, 200)
    assert none is None and torch.allclose(whole @ whole.T, s, atol=2e-4)


def test_no_direction_counts_for_nothing():
    """Sums of fewer tokens than channels have directions without energy: they get FLOOR, and the rest stays."""
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(2))
    whole = roots.cholesky(x.T @ x)
    assert torch.allclose(whole @ whole.T, x.T @ x + roots.FLOOR * torch.eye(50), atol=1e-4)
    s = spectrum(50, 0.5)
    assert torch.allclose(roots.cholesky(s) @ roots.cholesky(s).T, s, atol=1e-6)


def test_in_the_subspace_of_the_average():
    """What a matrix is fed within the strongest directions of the average, and its whole diagonal."""
    x = torch.randn(90, 60, generator=torch.Generator().manual_seed(3)) * torch.arange(1.0, 61).pow(-1)
    space = roots.Subspace.of(spectrum(60, 1) + x.T @ x, 1, 12)
    q, own = space.basis, (x[::2] @ space.basis).T @ (x[::2] @ space.basis)
    s = x[::2].T @ x[::2]
    found, rest = space.root(own, s.diagonal())
    assert q.shape == (60, 12) and torch.allclose(q.T @ found @ found.T @ q, q.T @ s @ q, atol=0.02)
    assert torch.allclose(found.square().sum(1) + rest, s.diagonal(), atol=2e-3)
