"""The formula in torch: W_i ~ A_i . f( sum_j alpha_ij B_j ).  All other implementations are compared with it."""

from __future__ import annotations

import torch


def activate(u: torch.Tensor, activation: str) -> torch.Tensor:
    """f, element by element: one of ``names.ACTIVATIONS``."""
    if activation == "none":
        return u
    return torch.tanh(u) if activation == "tanh" else torch.nn.functional.silu(u)


def combine(mix: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """``sum_j alpha_ij B_j`` of one group: mix ``[n, m]`` or ``[n, m, r]``, basis ``[m, r, d]`` -> ``[n, r, d]``.

    Mix ``[n, m, 1, d]`` has one coefficient for each column: the row-wise mix of down, which is fitted transposed.
    """
    if mix.dim() == 2:
        return (mix @ basis.flatten(1)).view(mix.shape[0], *basis.shape[1:])
    if mix.dim() == 4:
        return combine(mix[:, :, 0], basis.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(mix.permute(2, 0, 1), basis.transpose(0, 1)).transpose(0, 1)
