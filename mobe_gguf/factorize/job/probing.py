"""The sizes of a ``--target`` job: short fits of every unit around an even share of the budget, then the allocation.

Results of probes are kept in ``OUT.work/probes/``, one file for each unit, and the chosen sizes in ``OUT.work/sizes.json``.
So a resumed job keeps the sizes of its finished units.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.files import format_size
from mobe_gguf.core.records import record
from mobe_gguf.factorize.job.state import Job
from mobe_gguf.factorize.plan import default_rank, parameters, widths_of
from mobe_gguf.factorize.spec import JobSettings
from mobe_gguf.factorize.target import (
    BEYOND,
    MOST,
    Choices,
    Goal,
    Point,
    Size,
    SizeOption,
    Unit,
    allocate_sizes,
    once_more,
    options,
    probe_steps,
    rank_candidates,
    search,
)
from mobe_gguf.formats.imatrix import ImatrixFile
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.original import Original
from mobe_gguf.models.residual import TRUST, layer_shares
from mobe_gguf.quant.recipe import Recipe

#: File with the chosen sizes.
SIZES = "sizes.json"


class FileSizes(Protocol):
    """Bytes of a GGUF file.  ``plain``: with ordinary experts.  ``fixed``: everything except the factors."""

    @property
    def plain(self) -> int: ...
    @property
    def fixed(self) -> int: ...
    def unit(self, layer: int, projection: str, bases: int, rank: int) -> int:
        """Bytes of one unit's factors."""


class Predict(Protocol):
    """Predicts the size of the file with factors of ``units`` in the types of ``recipe``, at any of ``ranks``.  It is
    ``export.predict``, which this package must not import."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        units: Iterable[Unit],
        recipe: Recipe,
        ranks: Iterable[int],
        *,
        groups: int,
        by_row: bool,
        activation: str,
    ) -> FileSizes: ...


@dataclass(frozen=True)
class Parameters:
    """A unit's :data:`Cost` where ``--target`` is a share; it can be passed to another process."""

    settings: JobSettings
    projection: str
    shape: tuple[int, int, int]

    def __call__(self, size: Size) -> int:
        return parameters(self.settings.solver(size, self.projection), *self.shape)


@dataclass(frozen=True)
class FileBytes:
    """A unit's :data:`Cost` where ``--target`` is a file's size."""

    file: FileSizes
    unit: Unit

    def __call__(self, size: Size) -> int:
        return self.file.unit(*self.unit, size.bases, size.rank)


def goal_of(
    checkpoint: Original, settings: JobSettings, imatrix: ImatrixFile | None, predict: Predict | None
) -> Goal | None:
    """The budget of ``--target``; None without it, and for a method without sizes to choose.

    ``predict``: predicts a file's size, for a target in bytes.

    UsageError if no sizes are that small, or a plain file is no larger; MobeError if the file's size cannot be predicted.
    """
    if settings.target is None or not settings.how.fitted:
        return None
    n, d = checkpoint.n_expert, checkpoint.n_embd
    p = widths_of(checkpoint, settings.layers)[0]  # ranks that every layer allows
    step = settings.groups
    choices = Choices(step * (settings.mix_terms or 1), n, step)
    ranks = _ranks(settings, p, d)
    units = settings.units()
    if isinstance(settings.target, float):
        shapes = {unit: (n, checkpoint.width(unit[0]), d) for unit in units}
        whole = sum(map(math.prod, shapes.values()))
        costs = {unit: Parameters(settings, unit[1], shape) for unit, shape in shapes.items()}
        goal = Goal(int(settings.target * whole), costs, choices, ranks)
        least = f"{goal.least / whole:.3f}"
    else:
        if checkpoint.directory is None:
            raise UsageError(
                "--target with a size is for Hugging Face directories; give a share, as --target 0.75"
            )
        if predict is None:
            raise ValueError("a target in bytes needs `predict`")
        recipe = Recipe(
            settings.quant or "",
            basis=settings.for_basis,
            transform=settings.for_transform,
            imatrix=(imatrix.path,) if imatrix else (),
        )
        form: dict[str, Any] = dict(groups=step, by_row=settings.mix == "row", activation=settings.activation)
        file = predict(checkpoint.directory, units, recipe, ranks, **form)
        if settings.target >= file.plain:
            raise UsageError(
                f"--target {format_size(settings.target)}: an ordinary {settings.quant} file takes "
                f"{format_size(file.plain)}, so there is nothing to factorize"
            )
        goal = Goal(settings.target - file.fixed, {u: FileBytes(file, u) for u in units}, choices, ranks)
        least = format_size(file.fixed + goal.least)
    if goal.budget < goal.least or not all(goal.even(unit) for unit in units):
        raise UsageError(
            f"--target is too little: with {choices.least} bases of rank {min(ranks)} in every unit it would be "
            f"--target {least}. Ask for more, or let fewer be factorized (--layers, --projections)."
        )
    return goal


def _ranks(settings: JobSettings, p: int, d: int) -> tuple[int, ...]:
    """Candidate ranks, without those that do not fit the types of the factors, if these are known."""
    ranks = []
    for rank in rank_candidates(p, d, settings.rank, default_rank(p, d)):
        with contextlib.suppress(UsageError):
            for projection in settings.projections:
                settings.solver(Size(settings.groups, rank), projection).resolved(p, d)
            ranks.append(rank)
    return tuple(ranks) or (settings.rank or default_rank(p, d),)


@dataclass(frozen=True)
class Probes:
    """A unit's measurements: around an even share, and around the size from a first allocation (None: not yet)."""

    first: tuple[Point, ...]
    again: tuple[Point, ...] | None = None

    @property
    def points(self) -> tuple[Point, ...]:
        return self.first + (self.again or ())


@dataclass(frozen=True)
class ProbePoint:
    """A :class:`Point` in JSON."""

    bases: int
    rank: int
    error: float


@dataclass(frozen=True)
class ProbeFile:
    """:class:`Probes` in JSON."""

    first: list[ProbePoint]
    again: list[ProbePoint] | None = None

    def probes(self) -> Probes:
        def points(found: list[ProbePoint]) -> tuple[Point, ...]:
            return tuple(Point(Size(p.bases, p.rank), p.error) for p in found)

        return Probes(points(self.first), None if self.again is None else points(self.again))


@dataclass(frozen=True)
class SizeFile:
    """The chosen sizes, by ``"layer.projection"``."""

    units: dict[str, Size]


def probe_unit(
    job: Job,
    unit: Unit,
    known: Probes | None,
    sizes: Sequence[Size],
    fit: Callable[[Size, int, Callable[[float, float], None]], float],
    on_step: Callable[[float, float], None],
) -> Probes:
    """Measure one unit and store the results: first by :func:`search`, later at ``sizes``.

    ``fit(size, steps, on_step)`` returns the error in the metric that is minimised.
    """
    assert job.goal is not None
    even, done = job.goal.even(unit), 0
    steps = probe_steps(job.settings.steps)
    expected = len(sizes) if known else min(2, len(even)) + 2

    def measure(size: Size) -> float:
        nonlocal done
        error = fit(size, steps, lambda share, e: on_step(min(1.0, (done + share) / expected), e))
        done += 1
        return error

    if known is None:
        probes = Probes(tuple(search(measure, even, job.goal.choices)))
    else:
        probes = Probes(known.first, tuple(Point(size, measure(size)) for size in sizes))
    write_probes(job, unit, probes)
    return probes


def write_probes(job: Job, unit: Unit, probes: Probes) -> None:
    again = None if probes.again is None else [_as_json(p) for p in probes.again]
    job.workspace.write(
        job.workspace.probe_name(unit), {"first": [_as_json(p) for p in probes.first], "again": again}
    )


def _as_json(point: Point) -> dict[str, Any]:
    return asdict(point.size) | {"error": point.error}


def read_probes(job: Job, unit: Unit) -> Probes | None:
    """An earlier run's measurements; None if there is no complete file."""
    try:
        found = record(ProbeFile, job.workspace.read(job.workspace.probe_name(unit)))
        return found.probes() if found.first else None
    except (OSError, ValueError):
        return None


def read_sizes(job: Job) -> dict[Unit, Size] | None:
    """The sizes that an earlier run chose; None if there is no complete file."""
    try:
        found = record(SizeFile, job.workspace.read(SIZES)).units
        return {u: found[_key(u)] for u in job.settings.units()}
    except (OSError, ValueError, KeyError):
        return None


def _key(unit: Unit) -> str:
    return f"{unit[0]}.{unit[1]}"


def layer_weights(job: Job) -> tuple[dict[int, float], str]:
    """The weight of errors in each layer, and a line that explains it."""
    shares = None
    if job.imatrix is not None:
        shares = layer_shares(job.checkpoint, job.imatrix, job.settings.layers)
    if shares is not None:
        said = ", ".join(f"{layer}: {share:.2f}" for layer, share in shares.items())
        weights = {layer: share**TRUST for layer, share in shares.items()}
        return (
            weights,
            f"share of each layer's experts in the residual stream, which their errors are weighed by: {said}",
        )
    why = "the imatrix has no inputs of down" if job.imatrix is not None else "there is no --imatrix"
    return dict.fromkeys(job.settings.layers, 1.0), (
        f"errors of all layers weigh alike: {why} to tell how much hangs on each"
    )


def to_probe_again(
    job: Job, probes: Mapping[Unit, Probes], weights: Mapping[int, float]
) -> dict[Unit, list[Size]]:
    """Sizes still to be measured for each unit, after a first allocation."""
    assert job.goal is not None
    chosen = _allocate(job, {unit: p.first for unit, p in probes.items()}, weights, MOST)
    return {
        unit: once_more(probes[unit].first, option.size, job.goal.even(unit, option.cost))
        for unit, option in chosen.items()
    }


def choose(job: Job, probes: Mapping[Unit, Probes], weights: Mapping[int, float]) -> dict[Unit, Size]:
    """Choose sizes for all units and store them in ``sizes.json``."""
    chosen = _allocate(job, {unit: p.points for unit, p in probes.items()}, weights, BEYOND)
    kept = {
        _key(unit): asdict(option.size) | {"weight": weights[unit[0]], "expected": option.error}
        for unit, option in chosen.items()
    }
    job.workspace.write(SIZES, {"units": kept})
    return {unit: option.size for unit, option in chosen.items()}


def _allocate(
    job: Job, points: Mapping[Unit, Sequence[Point]], weights: Mapping[int, float], reach: float
) -> dict[Unit, SizeOption]:
    goal = job.goal
    assert goal is not None
    return allocate_sizes(
        {unit: options(found, goal.costs[unit], goal.choices, reach) for unit, found in points.items()},
        {unit: weights[unit[0]] for unit in points},
        goal.budget,
    )
