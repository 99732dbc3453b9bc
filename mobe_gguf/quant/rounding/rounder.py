"""From values and second moments to the bytes of a type.

    rounder = Rounder(s)                                      # S [n, n] of one matrix
    data, outcome = rounder.encode(w, "q3_k")                 # W [rows, n] -> uint8 [rows, bytes]

Initial scales are those of libggml's encoder, with S's diagonal as the importance of the columns.  Codes come from error
feedback, then from sweeps of coordinate descent over codes and scales (``engine``), until these gain little.  Finally each row is
scaled so that its output keeps its size.  Least squares makes it too small by the error, in every row alike, which does not
average out in the following layers.

Rows are independent: a row gets the same bytes whether it is encoded alone or with others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.quant.rounding import codebook
from mobe_gguf.quant.rounding.codebook_blocks import CODEBOOKS
from mobe_gguf.quant.rounding.engine import Problem, code_type, feedback, sweep
from mobe_gguf.quant.rounding.forms import TYPES, Stored, Type
from mobe_gguf.quant.rounding.grid import Levels
from mobe_gguf.quant.rounding.scales import Scales
from mobe_gguf.runtime import ggml

#: Maximum number of sweeps, and the share of the cost that a sweep must gain for another to follow.
SWEEPS = 6
GAIN = 0.02
#: Number of rows on which error feedback is compared with nearest codes.
SAMPLE = 64
#: Largest factor by which a row is resized, up or down.
MOST_SIZE = 1.5
#: Types whose encoder does not search for a scale: the largest value is one of the levels, or only signs are stored.  These
#: multiples of its scale are tried, by the squared error in the diagonal of S.
SEARCHED = ("tq1_0", "tq2_0", "q2_0")
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.52, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)


@dataclass
class Outcome:
    """Squared errors in the metric, summed over rows.  ``before``: of libggml's rounding with the diagonal of S.  ``after``: of
    the result.  ``size``: of W.  ``damping``: the largest that was needed."""

    before: float = 0.0
    after: float = 0.0
    size: float = 0.0
    damping: float = 0.0

    def add(self, other: Outcome) -> None:
        self.before += other.before
        self.after += other.after
        self.size += other.size
        self.damping = max(self.damping, other.damping)

    def __str__(self) -> str:
        size = self.size or 1.0
        return f"error {self.before / size:.2e} -> {self.after / size:.2e}"


#: Types that a rounder takes.
ROUNDED = frozenset((*TYPES, *CODEBOOKS))


class Rounder:
    """One matrix's second moments ``[n, n]``, prepared for encoding.  MobeError if they are not valid (``engine.Problem``).

    Holds S and its factor R, 8 n^2 bytes.
    """

    def __init__(self, s: torch.Tensor, device: torch.device | str = "cpu"):
        n = s.shape[-1]
        if s.shape != (n, n):
            raise MobeError(f"second moments have shape {list(s.shape)}, expected a square")
        self.device = torch.device(device)
        self.problem, self.factor = Problem.of(s.to(self.device, torch.float32)[None])
        self.diagonal = self.problem.s[0].diagonal().cpu().numpy().copy()

    def encode(self, w: torch.Tensor, type_name: str, name: str = "a matrix") -> tuple[np.ndarray, Outcome]:
        """``w`` ``[rows, n]`` of any float type.  MobeError names ``name`` if a value is NaN, Inf or too large."""
        values = w.to("cpu", torch.float32).contiguous()
        if type_name in CODEBOOKS:
            return self._by_codebook(values, type_name, name)
        one = TYPES[type_name]
        data = ggml.quantize(values.numpy(), type_name, self.diagonal, name=name)
        stored = one.unpack(data)
        problem = self.problem.of_rows(values.to(self.device)[None])
        if type_name in SEARCHED:
            stored = _search(one, stored, values, torch.from_numpy(self.diagonal))
        codes, scales, outcome = round_rows(problem, self.factor, one, stored)
        if type_name in SEARCHED:
            decoded = torch.from_numpy(ggml.dequantize(data, type_name, w.shape[-1])).to(self.device)
            outcome.before = float(problem.cost(decoded[None]).sum())
        return one.pack(scales.stored(codes, stored)), outcome

    def _by_codebook(self, w: torch.Tensor, type_name: str, name: str) -> tuple[np.ndarray, Outcome]:
        """Encode codebook types, where several columns, their signs and their scale are chosen together."""
        whole = w.to(self.device)[None]
        found = codebook.round_matrices(whole, self.problem.s, type_name, factor=self.factor, name=name)
        costs = list(found.costs.values())
        return found.data[0], Outcome(costs[0], costs[-1], found.size, self.problem.damping)


def round_rows(
    problem: Problem, factor: torch.Tensor, one: Type, stored: Stored, sweeps: int = SWEEPS
) -> tuple[torch.Tensor, Scales, Outcome]:
    """Codes ``[1, rows, n / width]`` and scales, starting from the scales of ``stored``."""
    device, w = problem.w.device, problem.w
    scales = Scales.of(one, stored, 1, device, torch.float32)
    grid = one.grid(stored, 1, device)
    kind = np.uint8 if code_type(grid) is torch.uint8 else np.int64
    codes = torch.from_numpy(stored.codes.astype(kind)).to(device)[None]
    fed = feedback(problem, factor, grid)
    some = slice(None, None, max(1, w.shape[1] // SAMPLE))
    near, better = (float(_cost_of(problem, grid.values(x, some), some)) for x in (codes, fed))
    if better < near:  # else the scales are wrong for most columns, and nearest codes are better
        codes = fed
    values = grid.values(codes)
    gradient = problem.gradient(values)
    cost = float((w - values).mul_(gradient).sum(dtype=torch.float64))
    first = before = cost * max(1.0, near / better) if better > 0 else cost
    for _ in range(sweeps):
        grid, changed = sweep(problem, codes, scales, grid, gradient=gradient, values=values)
        values = grid.values(codes)
        before, cost = cost, float((w - values).mul_(gradient).sum(dtype=torch.float64))
        if not changed or not before - cost > GAIN * before:
            break
    sizes = problem.sizes(factor)
    size = float(sizes.sum(dtype=torch.float64))
    after = cost
    if scales.d is not None:
        costs = (w - values).mul_(gradient).sum(-1)
        after = _keep_size(scales, sizes, (gradient * w).sum(-1), costs)
    if not np.isfinite(after):
        raise MobeError("rounding by moments gave values that are not finite; these moments cannot be used")
    return codes, scales, Outcome(first, after, size, problem.damping)


def _cost_of(problem: Problem, q: torch.Tensor, rows: slice) -> torch.Tensor:
    """The cost of ``rows`` only, with values ``q``."""
    return Problem(problem.w[:, rows], problem.s, problem.damping).cost(q).sum()


def _keep_size(scales: Scales, wanted: torch.Tensor, lost: torch.Tensor, costs: torch.Tensor) -> float:
    """Resize each row by ``f = <w, w> / <q, w>``; returns the total cost afterwards.  It follows from each row's ``<w, w>``,
    ``<w - q, w>`` and ``<w - q, w - q>``, the arguments."""
    found = wanted - lost
    share = torch.where(found > 0, wanted / found.clamp_min(1e-30), torch.ones_like(found))
    share = share.clamp(1 / MOST_SIZE, MOST_SIZE)
    scales.resize(share)
    # w - f q = (w - q) + (1 - f) q, with <w - q, q> = lost - cost and <q, q> = wanted - 2 lost + cost
    off, lost, costs = 1 - share.double(), lost.double(), costs.double()
    rows = costs + 2 * off * (lost - costs) + off * off * (wanted - 2 * lost + costs)
    return float(rows.sum().clamp_min(0))


def _search(one: Type, stored: Stored, w: torch.Tensor, weights: torch.Tensor) -> Stored:
    """``stored`` with its scales multiplied by the factors of least cost in a diagonal metric."""
    assert stored.d is not None
    n = w.shape[-1]
    shape = (len(w), n // one.block, one.block)
    best, chosen = None, stored.d
    for share in SHARES:
        d = (stored.d.astype(np.float32) * share).astype(np.float16)
        grid = one.grid(stored.replace(d=d))
        assert isinstance(grid, Levels)
        scale = grid.scale.repeat_interleave(one.group, -1)
        unit = w[None] * grid.inverse.repeat_interleave(one.group, -1)
        error = (grid.ladder[grid.nearest(unit)] * scale - w[None]).square() * weights
        cost = error.view(shape).sum(-1).numpy()
        if best is None:
            best = cost
            continue
        better = cost < best
        best, chosen = np.where(better, cost, best), np.where(better, d, chosen)
    return stored.replace(d=chosen)
