"""Sums of second moments, and roots of them.

A sum ``S`` ``[d, d]`` becomes ``root root^T + diag(rest)``, root ``[d, k]``.  With k = d the root is S's Cholesky factor,
O(d^3 / 3), 15 to 25 times as quick as S's directions.  Where a layer's matrices share their inputs' strongest directions Q
``[d, k]`` (:class:`Subspace`), only the sums of ``Q^T x`` are needed: ``[k, k]`` each, whatever d is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.metric import FLOOR

#: Number of products with S in the search for its strongest directions.
POWER_STEPS = 2
#: From this many channels on, only the upper half of a sum is computed, in blocks of columns.
HALF = 2048
#: Default limit of the directions that are kept.  Up to this many channels all directions are computed, whatever is kept.
MOST = 1024


def add_products(sums: torch.Tensor, x: torch.Tensor) -> None:
    """``sums += x^T x``, sums ``[d, d]``, x ``[T, d]`` float32.  With many channels only the blocks on and above the diagonal
    are computed, see :func:`mirror`."""
    d = len(sums)
    if d < HALF:
        if sums.device.type == "cpu":
            rows = x.contiguous().numpy()
            sums += torch.from_numpy(rows.T @ rows)  # numpy knows x^T x: BLAS syrk, half the work
        else:
            sums.addmm_(x.T, x)
        return
    step = _step(d)
    for begin in range(0, d, step):
        end = min(begin + step, d)
        sums[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:])


def _step(d: int) -> int:
    return max(HALF // 8, -(-d // 8))


def mirror(sums: torch.Tensor) -> torch.Tensor:
    """Fill in, in place, the lower half that :func:`add_products` left out."""
    d = len(sums)
    if d >= HALF:
        step = _step(d)
        for begin in range(0, d, step):
            end = min(begin + step, d)
            sums[end:, begin:end] = sums[begin:end, end:].T
    return sums


def directions(sums: torch.Tensor, keep: float) -> int:
    """How many directions of ``sums`` ``[d, d]`` hold the share ``keep`` of its trace.

    The result is d if more than half of the directions are needed and d is at most MOST, because a root with a separate
    diagonal would take no less space.  Otherwise it is at most MOST.
    """
    d = len(sums)
    if (keep >= 1 and d <= MOST) or not float(sums.diagonal().double().sum()) > 0:
        return min(d, MOST)
    values = torch.linalg.eigvalsh(sums.double()).flip(0) if d <= MOST else strongest(sums, MOST)[0]
    return _enough(values, sums, keep)


def _enough(values: torch.Tensor, sums: torch.Tensor, keep: float) -> int:
    d, total = len(sums), float(sums.diagonal().double().sum())
    enough = (values.double().cumsum(0) >= keep * total).nonzero()
    found = int(enough[0]) + 1 if len(enough) else min(d, MOST)
    return d if 2 * found > d and d <= MOST else found


@dataclass(frozen=True)
class Subspace:
    """The strongest directions ``basis`` ``[d, k]`` of the average input of many matrices, and the ``mean``
    ``basis^T S basis``, ``[k, k]``, of that average S."""

    basis: torch.Tensor
    mean: torch.Tensor

    @classmethod
    def of(cls, sums: torch.Tensor, keep: float, rank: int | None) -> Subspace:
        """That holds the share ``keep`` of the energy of ``sums`` ``[d, d]``, or ``rank`` directions.  O(k d^2), once."""
        values, vectors = strongest(sums, min(len(sums), MOST if rank is None else rank))
        k = _enough(values, sums, keep) if rank is None else len(values)
        return cls(vectors[:, :k].contiguous(), torch.diag(values[:k]))

    def root(self, sums: torch.Tensor, diagonal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(root [d, k], rest [d])`` of one matrix's input: its sums in the subspace ``[k, k]``, and the ``diagonal``
        ``[d]`` of its full sums, which the result keeps.  O(d k^2)."""
        found, diagonal = (self.basis @ cholesky(sums)).float().cpu(), diagonal.cpu().float()
        energy = found.square().sum(-1)  # may exceed the whole: parts outside the subspace may oppose it
        found *= (diagonal / energy.clamp_min(1e-30)).clamp_max(1).sqrt()[:, None]
        return found, (diagonal - energy).clamp_min(FLOOR)


def strongest(sums: torch.Tensor, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``(values [k], vectors [d, k])``, strongest first, by subspace iteration (Halko et al., arXiv 0909.4061): O(k d^2)."""
    q = torch.randn(len(sums), k, generator=torch.Generator().manual_seed(seed)).to(sums)
    for _ in range(POWER_STEPS + 1):
        q = torch.linalg.qr(sums @ q)[0]
    values, vectors = torch.linalg.eigh(q.T @ sums @ q)
    return values.flip(0), (q @ vectors).flip(1)


def cholesky(sums: torch.Tensor) -> torch.Tensor:
    """A root ``[d, d]`` of ``sums``, float32; of ``sums`` and FLOOR on the diagonal where a pivot is below FLOOR."""
    s = sums.to(torch.float64, copy=True)
    found, failed = torch.linalg.cholesky_ex(s)
    if int(failed) or float(found.diagonal().square().min()) < FLOOR:
        s.diagonal().add_(FLOOR)
        found, failed = torch.linalg.cholesky_ex(s)
    if int(failed):  # rounding of float32 sums made it indefinite by more than FLOOR
        values, vectors = torch.linalg.eigh(s)
        found = vectors * values.clamp_min(FLOOR).sqrt()
    return found.float()


def root(sums: torch.Tensor, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(root [d, k], rest [d])`` of ``sums`` ``[d, d]``, float32 on the CPU; rest is None where k = d.

    root root^T + diag(rest) has the diagonal of ``sums``, up to FLOOR.
    """
    if k == len(sums):
        return cholesky(sums).cpu(), None
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
