"""The formula over all groups."""

from __future__ import annotations

import torch

from mobe_gguf.core.formula import combine


def combine_groups(mix: torch.Tensor, basis: torch.Tensor, n_group: int) -> torch.Tensor:
    """``sum_j alpha_ij B_j``, j over the group of i: mix ``[n, m/g]`` or ``[n, m/g, r]``, basis ``[m, r, d]`` -> ``[n, r, d]``."""
    pairs = zip(mix.chunk(n_group), basis.chunk(n_group), strict=True)
    return torch.cat([combine(a, b) for a, b in pairs])
