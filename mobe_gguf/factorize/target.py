"""``--target``: chooses the number and rank of bases for each unit, so that all units together meet a budget.

A unit is one projection of one layer.  The sum of ``weight * error`` over all units is minimised.  The error is the unit's
relative error in the metric of the fit, measured by short fits (:func:`search`).  The weight says how much the unit matters
to the model (``models.residual``).  The cost is in parameters, or in bytes of the file that ``export`` will write.

    chosen = allocate({unit: options(points, cost, ...), ...}, weights, budget)

Pure functions; ``job`` runs the fits and keeps their results.
"""

from __future__ import annotations

import bisect
import heapq
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.files import parse_size

#: ``(layer, projection)``.
Unit = tuple[int, str]

#: A probe takes this share of the steps of a fit, but at least LEAST_STEPS.  On a layer of the shipped model (m 6 of 24) the
#: error is 0.0440 after 300 steps, 0.0817 after 30 and 0.0634 after 60.  But three more bases reduce it by 0.032 after 30 steps
#: and 0.028 after 60, against 0.024 after 300: slopes settle early, and the allocation depends on slopes.
PROBE_SHARE = 0.1
LEAST_STEPS = 30

#: A unit is probed around the number of bases that an even share would give it.  A first allocation follows, with up to MOST
#: times the probed bases.  Its sizes are probed, too, unless they are within NEAR of a probed one.  The final allocation goes
#: no further than BEYOND.
BELOW, ABOVE, MOST, BEYOND, NEAR = 0.5, 1.5, 1.5, 1.1, 0.15

#: Maximum number of ranks to try: from p down to half of it (lower still if the budget is too small for these).
RANKS = 4


@dataclass(frozen=True, order=True)
class Size:
    """m (over all groups) and r of one unit."""

    bases: int
    rank: int


@dataclass(frozen=True)
class Point:
    """A probe: ``error`` relative, in the metric that is minimised."""

    size: Size
    error: float


#: The cost of a unit of a given size, in parameters or bytes.
Cost = Callable[[Size], int]


def parse_goal(text: str) -> float | int:
    """``"0.75"`` or ``"75%"`` -> 0.75, a share; ``"12.5GB"`` -> 12500000000, see :func:`parse_size`.  UsageError otherwise."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%)?", text.strip())
    if match is None:
        instead = "the share of the parameters to keep, as 0.75, or the size of the GGUF file, "
        return parse_size(text, "--target", instead)
    share = float(match[1]) / 100 if match[2] else float(match[1])
    if not 0 < share < 1:
        raise UsageError(
            f"--target {text}: a share of the parameters lies between 0 and 1; for a file's size add GB or MB"
        )
    return share


def probe_steps(steps: int) -> int:
    """Steps of a probe for a fit of ``steps``."""
    return min(steps, max(LEAST_STEPS, round(PROBE_SHARE * steps)))


def rank_candidates(p: int, d: int, rank: int | None, highest: int) -> tuple[int, ...]:
    """Ranks worth trying, largest first: the requested one, or from ``highest`` down.  If p consists of whole blocks of 256 or
    32, so do the ranks, because other rows of A would be stored in 16 bits."""
    if rank is not None:
        return (rank,)
    step = next(s for s in (256, 32, 1) if highest % s == 0)
    if highest // step <= 2 and step > 32:
        step = 32
    step *= max(1, math.ceil(highest / step / 2 / RANKS))
    return tuple(range(highest, 0, -step))


def most_bases(cost: Cost, rank: int, allowance: float, least: int, most: int, step: int) -> int | None:
    """The largest m of ``least, least + step, ... most`` with ``cost`` at most ``allowance``; None if there is none."""
    choices = range(least, most + 1, step)
    found = bisect.bisect_right(choices, allowance, key=lambda m: cost(Size(m, rank)))
    return choices[found - 1] if found else None


@dataclass(frozen=True)
class Choices:
    """Allowed values of m: multiples of ``step`` (the groups) from ``least`` to ``most`` (the experts)."""

    least: int
    most: int
    step: int

    def even(self, cost: Cost, ranks: Iterable[int], allowance: float) -> list[Size]:
        """For each rank the largest size within ``allowance``; at most RANKS of them."""
        sizes = []
        for rank in ranks:
            m = most_bases(cost, rank, allowance, self.least, self.most, self.step)
            if m is not None:
                sizes.append(Size(m, rank))
        return sizes[:RANKS]

    def near(self, bases: int, factor: float) -> int:
        """About ``factor`` times ``bases``, within the bounds."""
        m = self.step * round(bases * factor / self.step)
        return min(max(m, self.least), self.most - self.most % self.step)


def search(measure: Callable[[Size], float], even: Sequence[Size], choices: Choices) -> list[Point]:
    """Probe one unit: first ranks, at an even share of the budget, then values of m around the best.

    Lower ranks are tried as long as they help: at equal cost, the error as a function of rank has one minimum.
    """
    points: list[Point] = []
    best: Point | None = None
    for size in even:
        points.append(Point(size, measure(size)))
        if best is not None and points[-1].error >= best.error:
            break
        best = points[-1]
    assert best is not None, "the budget was checked before"
    for factor in (BELOW, ABOVE):
        size = Size(choices.near(best.size.bases, factor), best.size.rank)
        if all(p.size != size for p in points):
            points.append(Point(size, measure(size)))
    return points


def once_more(points: Sequence[Point], chosen: Size, even: Sequence[Size]) -> list[Size]:
    """Sizes to probe once a unit's share of the budget is roughly known.

    One is ``chosen``, because its expected error may be an extrapolation.  The other has the same cost and the next higher
    rank if this cost exceeds that of ``points``, else the next lower rank.  ``even``: the sizes of all ranks at that cost.
    """
    ranks = [size.rank for size in even]
    sizes = [chosen]
    if chosen.rank in ranks:
        more = (
            chosen.bases > max(p.size.bases for p in points if p.size.rank == chosen.rank) * (BELOW + 1) / 2
        )
        at = ranks.index(chosen.rank) + (-1 if more else 1)
        if 0 <= at < len(even):
            sizes.append(even[at])
    known = [p.size for p in points]
    return [
        s
        for s in sizes
        if not any(s.rank == k.rank and abs(s.bases - k.bases) <= NEAR * k.bases for k in known)
    ]


@dataclass(frozen=True)
class SizeOption:
    """A size that a unit may get, its cost and its expected error."""

    size: Size
    cost: int
    error: float


def options(points: Sequence[Point], cost: Cost, choices: Choices, reach: float) -> list[SizeOption]:
    """The sizes to choose from after one unit's probes, by cost; each has a smaller error than all cheaper ones.

    Within a rank the logarithm of the error is interpolated linearly in m.  It is extrapolated up to ``reach`` times the
    largest probed m and down to half of the smallest.  A rank that was probed once has only that size.
    """
    found: list[SizeOption] = []
    for rank in sorted({p.size.rank for p in points}):
        known = sorted((p.size.bases, p.error) for p in points if p.size.rank == rank)
        sizes = [m for m, _ in known]
        if len(known) > 1:
            sizes = list(
                range(choices.near(sizes[0], BELOW), choices.near(sizes[-1], reach) + 1, choices.step)
            )
        found += [SizeOption(Size(m, rank), cost(Size(m, rank)), _interpolated(known, m)) for m in sizes]
    found.sort(key=lambda o: (o.cost, o.error))
    best: list[SizeOption] = []
    for option in found:
        if not best or (option.cost > best[-1].cost and option.error < best[-1].error):
            best.append(option)
    return best


def _interpolated(known: Sequence[tuple[int, float]], bases: int) -> float:
    xs = [m for m, _ in known]
    ys: list[float] = []
    for _, error in known:  # more bases cannot be worse; if a fit finds so, it was too short
        ys.append(min([math.log(max(error, 1e-12)), *ys]))
    if len(xs) == 1:
        return math.exp(ys[0])
    i = min(max(bisect.bisect_right(xs, bases) - 1, 0), len(xs) - 2)
    t = (bases - xs[i]) / (xs[i + 1] - xs[i])
    return math.exp(ys[i] + t * (ys[i + 1] - ys[i]))


def allocate_sizes(
    choices: Mapping[Unit, Sequence[SizeOption]], weights: Mapping[Unit, float], budget: int
) -> dict[Unit, SizeOption]:
    """Choose one of each unit's :func:`options`: the sum of ``weight * error`` is least, the total cost at most ``budget``.

    All units start at their cheapest option.  Then the unit with the largest gain per cost is enlarged, along the lower convex
    hull of its curve (so this is the Lagrangian solution), until nothing more fits.  Ties go to the first unit.
    """
    order = list(choices)
    at = [0] * len(order)
    left = budget - sum(choices[u][0].cost for u in order)
    heap: list[tuple[float, int, int]] = []

    def push(number: int) -> None:
        unit, i = order[number], at[number]
        now, *rest = choices[unit][i:]
        steps = [
            (-weights[unit] * (now.error - then.error) / (then.cost - now.cost), number, j)
            for j, then in enumerate(rest, i + 1)
            if then.cost - now.cost <= left
        ]
        if steps:
            heapq.heappush(heap, min(steps))

    for number in range(len(order)):
        push(number)
    while heap:
        _, number, j = heapq.heappop(heap)
        unit = order[number]
        price = choices[unit][j].cost - choices[unit][at[number]].cost
        if price <= left:
            left -= price
            at[number] = j
        push(number)
    return {unit: choices[unit][i] for unit, i in zip(order, at, strict=True)}


@dataclass(frozen=True)
class Goal:
    """A budget for all units together, in parameters or bytes, and the sizes that they may have."""

    budget: int
    costs: Mapping[Unit, Cost]
    choices: Choices
    ranks: tuple[int, ...]

    def even(self, unit: Unit, allowance: float | None = None) -> list[Size]:
        """For each rank the size that the unit could have for ``allowance`` (default: an equal share of the budget); empty if
        none."""
        if allowance is not None:
            return self.choices.even(self.costs[unit], self.ranks, allowance)
        return self._even.get(unit, [])

    @cached_property
    def _even(self) -> dict[Unit, list[Size]]:
        yardstick = Size(self.choices.near(self.choices.most, 0.25), self.ranks[0])
        prices = {unit: cost(yardstick) for unit, cost in self.costs.items()}
        share = self.budget / sum(prices.values())
        return {u: self.choices.even(c, self.ranks, share * prices[u]) for u, c in self.costs.items()}

    @property
    def least(self) -> int:
        """The smallest budget that allows any sizes."""
        return sum(min(c(Size(self.choices.least, r)) for r in self.ranks) for c in self.costs.values())

    def nominal(self) -> dict[Unit, Size]:
        """The sizes at an even share, with the rank that uses most of it: an estimate before anything is probed."""
        return {unit: max(self.even(unit), key=self.costs[unit]) for unit in self.costs}

    def largest(self) -> Size:
        """The size with the highest memory use of all that may be chosen or probed."""
        sizes = [Size(self._most(s.bases), s.rank) for unit in self.costs for s in self.even(unit)]
        return max(sizes, key=lambda s: s.bases * s.rank)

    def _most(self, bases: int) -> int:
        return self.choices.near(self.choices.near(self.choices.near(bases, ABOVE), MOST), BEYOND)
