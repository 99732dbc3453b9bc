"""``--target``: how many bases (and of what rank) each unit gets, so that all together cost what was asked for.

A unit is one projection of one layer.  What it is to minimise is the sum over units of ``weight * error``: the error is the
unit's own relative one in the metric that is minimised (measured by short fits, :func:`search`), the weight says how much
of the model hangs on it (:mod:`sensitivity`).  The cost is parameters, or bytes of the file that ``export`` will write.

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

#: A probe takes this share of the steps of a fit, but not fewer than LEAST_STEPS.  On a layer of the shipped model (m 6 of 24,
#: 300 steps: 0.0440) 30 steps end at 0.0817 and 60 at 0.0634, but what the next three bases take off is 0.032 and 0.028
#: against 0.024 after 300: slopes come out early, and they are what the allocation goes by.
PROBE_SHARE = 0.1
LEAST_STEPS = 30

#: A unit is probed around the number of bases that an even share would give it.  From that a first allocation follows, which
#: may go to MOST times the bases probed; what it comes to is probed too, unless it is within NEAR of what was, and the
#: final one goes no further than BEYOND.
BELOW, ABOVE, MOST, BEYOND, NEAR = 0.5, 1.5, 1.5, 1.1, 0.15

#: Ranks that are tried at most: p, and less down to half of it (less still where the budget has no room for that).
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


#: Cost of a unit of this size, in parameters or bytes.
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
    """Steps of a probe where a fit has ``steps``."""
    return min(steps, max(LEAST_STEPS, round(PROBE_SHARE * steps)))


def rank_candidates(p: int, d: int, rank: int | None, highest: int) -> tuple[int, ...]:
    """Ranks worth trying, largest first: the one that was asked for, or from ``highest`` down in steps that keep rows of A
    in whole blocks of 256 or 32 where p is (other rows would be stored in 16 bits)."""
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
    """What m may be: multiples of ``step`` (the groups) from ``least`` to ``most`` (the experts)."""

    least: int
    most: int
    step: int

    def even(self, cost: Cost, ranks: Iterable[int], allowance: float) -> list[Size]:
        """For each rank the largest size that ``allowance`` pays for; at most RANKS of them."""
        sizes = []
        for rank in ranks:
            m = most_bases(cost, rank, allowance, self.least, self.most, self.step)
            if m is not None:
                sizes.append(Size(m, rank))
        return sizes[:RANKS]

    def near(self, bases: int, factor: float) -> int:
        """``factor`` times as many bases, within the bounds."""
        m = self.step * round(bases * factor / self.step)
        return min(max(m, self.least), self.most - self.most % self.step)


def search(measure: Callable[[Size], float], even: Sequence[Size], choices: Choices) -> list[Point]:
    """Probe one unit: first the rank, at an even share of the budget, then m around that.

    Lower ranks are tried as long as they help: error against rank, at equal cost, has one minimum.
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
    """Sizes to probe once it is known about how much a unit will get: ``chosen``, which an extrapolation may have praised,
    and at the same cost (``even`` has those of all ranks) the next higher rank if that is more than ``points`` were about,
    else the next lower.
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
    """A size that a unit may get, what it costs and the error expected."""

    size: Size
    cost: int
    error: float


def options(points: Sequence[Point], cost: Cost, choices: Choices, reach: float) -> list[SizeOption]:
    """What the probes of one unit allow to choose from, by cost; each has a smaller error than all that cost less.

    Within a rank the logarithm of the error is linear in m between probes and goes on so, up to ``reach`` times the most
    that was probed and down to half of the least; of a rank that was probed once there is just that size.
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
    for _, error in known:  # more bases cannot be worse: where a short fit says so, it was too short
        ys.append(min([math.log(max(error, 1e-12)), *ys]))
    if len(xs) == 1:
        return math.exp(ys[0])
    i = min(max(bisect.bisect_right(xs, bases) - 1, 0), len(xs) - 2)
    t = (bases - xs[i]) / (xs[i + 1] - xs[i])
    return math.exp(ys[i] + t * (ys[i + 1] - ys[i]))


def allocate_sizes(
    choices: Mapping[Unit, Sequence[SizeOption]], weights: Mapping[Unit, float], budget: int
) -> dict[Unit, SizeOption]:
    """Of each unit's :func:`options` one, with the least ``sum of weight * error`` and costs of at most ``budget`` together.

    All units start at their cheapest; then whichever gains most for each unit of cost is enlarged, along the lower convex
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
    """A budget for all units together, in parameters or bytes, and what they may spend it on."""

    budget: int
    costs: Mapping[Unit, Cost]
    choices: Choices
    ranks: tuple[int, ...]

    def even(self, unit: Unit, allowance: float | None = None) -> list[Size]:
        """For each rank the size that the unit could have for ``allowance``, or if all had the same share of the budget;
        empty if none."""
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
        """The smallest budget that there are sizes for."""
        return sum(min(c(Size(self.choices.least, r)) for r in self.ranks) for c in self.costs.values())

    def nominal(self) -> dict[Unit, Size]:
        """The sizes of an even share, of the rank that uses most of it: what can be said before anything is probed."""
        return {unit: max(self.even(unit), key=self.costs[unit]) for unit in self.costs}

    def largest(self) -> Size:
        """What takes most memory of all that may be chosen or probed."""
        sizes = [Size(self._most(s.bases), s.rank) for unit in self.costs for s in self.even(unit)]
        return max(sizes, key=lambda s: s.bases * s.rank)

    def _most(self, bases: int) -> int:
        return self.choices.near(self.choices.near(self.choices.near(bases, ABOVE), MOST), BEYOND)
