"""Initial bases and mix: each basis has the strongest directions of a run of experts, and each expert uses its run's basis."""

from __future__ import annotations

import torch

#: Number of products with the Gram matrix; few suffice, because the subspace is only a start.
POWER_STEPS = 3


def initial_basis(
    w: torch.Tensor, n_basis: int, rank: int, scale: float, seed: int, device: torch.device
) -> torch.Tensor:
    """``[m, r, d]`` on ``device``: the rows of basis j are orthogonal, with standard deviation ``scale``, and span
    (nearly) the top-r right singular directions of the j-th run of n/m experts of w ``[n, p, d]``.

    Uses subspace iteration: an exact decomposition of a d x d matrix for every basis would take longer than the fit.
    (Rotating the runs' bases towards each other, which A can undo, was tried and made no difference.)
    """
    n, _, d = w.shape
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(n_basis, rank, d, device=device)
    for j in range(n_basis):
        run = w[j * n // n_basis : (j + 1) * n // n_basis].reshape(-1, d).to(device)
        q = torch.randn(d, rank, generator=generator).to(device)
        for _ in range(POWER_STEPS):
            q = torch.linalg.qr(run.T @ (run @ q))[0]
        out[j] = q.T * (scale * d**0.5)
    return out


def initial_mix(n: int, n_basis: int, rank: int | None, seed: int) -> torch.Tensor:
    """``[n, m]`` or, with a ``rank``, ``[n, m, r]``: each expert uses its run's basis, plus noise so that equal experts differ."""
    mix = 1e-3 * torch.randn(n, n_basis, generator=torch.Generator().manual_seed(seed))
    for j in range(n_basis):
        mix[j * n // n_basis : (j + 1) * n // n_basis, j] += 1.0
    return mix if rank is None else mix[:, :, None].repeat(1, 1, rank)
