"""Sums of second moments, and their strongest directions."""

from __future__ import annotations

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.metric import FLOOR

#: Number of products with S in the search for its strongest directions.
POWER_STEPS = 2
#: From this many channels on, only the upper half of a sum is computed, in blocks of columns: 5/8 to 9/16 of the work.
HALF = 1024
#: Default limit of the directions that are kept.  Up to this many channels all directions are computed, whatever is kept.
MOST = 1024


def add_products(sums: torch.Tensor, x: torch.Tensor) -> None:
    """``sums += x^T x``, sums ``[d, d]``, x ``[T, d]``.  With many channels only the blocks on and above the diagonal are
    computed, see :func:`mirror`."""
    d = len(sums)
    if d < HALF:
        sums.addmm_(x.T, x)
        return
    step = max(HALF // 4, -(-d // 8))
    for begin in range(0, d, step):
        end = min(begin + step, d)
        sums[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:])


def mirror(sums: torch.Tensor) -> torch.Tensor:
    """Fill in, in place, the lower half that :func:`add_products` left out."""
    d = len(sums)
    if d >= HALF:
        step = max(HALF // 4, -(-d // 8))
        for begin in range(0, d, step):
            end = min(begin + step, d)
            sums[end:, begin:end] = sums[begin:end, end:].T
    return sums


def directions(sums: torch.Tensor, keep: float) -> int:
    """How many directions of ``sums`` ``[d, d]`` hold the share ``keep`` of its trace.

    The result is d if more than half of the directions are needed and d is at most MOST, because a root with a separate
    diagonal would take no less space.  Otherwise it is at most MOST: finding k directions is O(k d^2) for each expert, all
    of them O(d^3).
    """
    d, total = len(sums), float(sums.diagonal().double().sum())
    most = min(d, MOST)
    if (keep >= 1 and d <= MOST) or not total > 0:
        return most
    k = min(most, 128)
    while True:
        values = torch.linalg.eigvalsh(sums.double()).flip(0) if d <= MOST else strongest(sums, k)[0]
        enough = (values.double().cumsum(0) >= keep * total).nonzero()
        if len(enough):
            found = int(enough[0]) + 1
            return d if 2 * found > d and d <= MOST else found
        if len(values) >= most:
            return most
        k = min(2 * k, most)


def strongest(sums: torch.Tensor, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``(values [k], vectors [d, k])``, strongest first, by subspace iteration (Halko et al., arXiv 0909.4061): O(k d^2)."""
    q = torch.randn(len(sums), k, generator=torch.Generator().manual_seed(seed)).to(sums)
    for _ in range(POWER_STEPS + 1):
        q = torch.linalg.qr(sums @ q)[0]
    values, vectors = torch.linalg.eigh(q.T @ sums @ q)
    return values.flip(0), (q @ vectors).flip(1)


def root(sums: torch.Tensor, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(root [d, k], rest [d])`` of ``sums`` ``[d, d]``, float32 on the CPU; rest is None where k = d.

    root root^T + diag(rest) has the diagonal of ``sums``.
    """
    if k == len(sums):
        values, vectors = torch.linalg.eigh(sums.double())
        return (vectors * values.clamp_min(FLOOR).sqrt()).float().cpu(), None
    if len(sums) <= MOST:
        values, vectors = torch.linalg.eigh(sums.double())
        values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
    else:
        values, vectors = strongest(sums, k, seed)
    found = (vectors * values.clamp_min(0).sqrt()).float().cpu()
    rest = (sums.diagonal().cpu().float() - found.square().sum(-1)).clamp_min(FLOOR)
    return found, rest


def size_of(mean: torch.Tensor, what: str) -> float:
    """Mean of the diagonal; MobeError if it is not a valid scale."""
    size = float(mean.diagonal().double().mean())
    if size == 0:
        raise MobeError(f"{what}: fed nothing but zeros on this text")
    if not 0 < size < float("inf"):
        raise MobeError(f"{what}: what is fed is not finite on this text")
    return size
