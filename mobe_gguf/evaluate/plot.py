"""KL divergence against file size, drawn with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobe_gguf.core.atomic import atomic_path, destination
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate.report import short_names

if TYPE_CHECKING:
    from mobe_gguf.evaluate.measure import Row

FORMATS = ("png", "svg", "pdf")

#: factorized -> (legend, marker, color)
STYLES = {False: ("plain", "o", "tab:blue"), True: ("MoBE", "D", "tab:red")}

#: Places of a label beside its point, in points, near ones first; the first that is free is taken.
OFFSETS = tuple(
    (x * distance, y * distance)
    for distance in (7, 14, 22, 32, 44)
    for x, y in ((1, 1), (1, -1), (-1, -1), (-1, 1), (1, 0), (0, 1.4), (0, -1.4))
)


def check(path: Path) -> None:
    """Before the work: MobeError if the plot could not be drawn or written after it."""
    if path.suffix.lstrip(".").lower() not in FORMATS:
        raise UsageError(f"--plot {path}: expected a name that ends in {', '.join('.' + f for f in FORMATS)}")
    parent = destination(path).absolute().parent
    if not parent.is_dir():
        raise MobeError(f"--plot {path}: there is no directory {parent}; make it, or name another file")
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise MobeError(
            "--plot needs matplotlib, which is not installed: python -m pip install 'mobe-gguf[plot]'"
        ) from e


def plot(rows: Sequence[Row], path: str | os.PathLike[str]) -> list[Row]:
    """Draw ``rows`` into ``path``; returns those that could not be drawn, their KL divergence being no positive number.

    A line joins the plain files that no smaller plain file beats.  MobeError as :func:`check`, or if none can be drawn.
    """
    path = Path(path)
    check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    drawn = [row for row in rows if 0 < row.divergence.kl.value < math.inf]
    if not drawn:
        raise MobeError(f"{path}: no file has a KL divergence above zero, so there is nothing to plot")
    unit, name = (1e9, "GB") if max(row.facts.n_bytes for row in drawn) >= 1e10 else (1e6, "MB")
    figure = Figure(figsize=(9, 6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.set_xlabel(f"file size, {name}")
    axes.set_ylabel("KL divergence from the reference, nats per token")
    axes.grid(True, which="both", alpha=0.25, linewidth=0.6)
    axes.margins(0.1, 0.1)
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    best = frontier([row for row in drawn if not row.facts.factorized])
    axes.plot(
        [row.facts.n_bytes / unit for row in best],
        [row.divergence.kl.value for row in best],
        color=STYLES[False][2],
        alpha=0.4,
        linewidth=1,
    )
    for factorized, (legend, marker, color) in STYLES.items():
        group = [row for row in drawn if row.facts.factorized is factorized]
        if not group:
            continue
        axes.errorbar(
            [row.facts.n_bytes / unit for row in group],
            [row.divergence.kl.value for row in group],
            yerr=_bars(group),
            fmt=marker,
            color=color,
            elinewidth=1,
            label=legend,
        )
    axes.legend(loc="upper right")
    points = [(row.facts.n_bytes / unit, row.divergence.kl.value) for row in drawn]
    _label(canvas, axes, points, _labels(drawn))
    with atomic_path(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower(), dpi=150)
    return [row for row in rows if row not in drawn]


def frontier(rows: Sequence[Row]) -> list[Row]:
    """By size, those that are better than every smaller one."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.facts.n_bytes, row.divergence.kl.value)):
        if not best or row.divergence.kl.value < best[-1].divergence.kl.value:
            best.append(row)
    return best


def _bars(rows: Sequence[Row]) -> list[list[float]]:
    """Standard errors below and above; none that is no number or would reach zero on the logarithmic axis."""
    pairs = [(row.divergence.kl.value, row.divergence.kl.error) for row in rows]
    errors = [error if 0 <= error < value else 0.0 for value, error in pairs]
    return [errors, errors]


def _label(canvas: Any, axes: Any, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write each label beside its point where it covers no other label or point, if there is such a place."""
    from matplotlib.transforms import Bbox

    canvas.draw()
    renderer = canvas.get_renderer()
    centers = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in centers]
    taken.append(axes.get_legend().get_window_extent(renderer))
    for point, label in zip(points, labels, strict=True):
        for offset in OFFSETS:
            text = _annotate(axes, point, label, offset)
            box = _extent(text, renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            box = _extent(_annotate(axes, point, label, OFFSETS[0]), renderer)
        taken.append(box)


def _annotate(axes: Any, point: tuple[float, float], label: str, offset: tuple[float, float]) -> Any:
    """``label`` at ``offset`` from ``point``, with a line to it where that is far."""
    x, y = offset
    far = max(abs(x), abs(y)) > 14
    return axes.annotate(
        label,
        point,
        xytext=offset,
        textcoords="offset points",
        ha="left" if x > 0 else "right" if x < 0 else "center",
        va="center",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.5} if far else None,
    )


def _extent(text: Any, renderer: Any) -> Any:
    """The box of an annotation's letters; its own method takes its line in."""
    from matplotlib.text import Text

    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def _labels(rows: Sequence[Row]) -> list[str]:
    """File names, without what all begin with: ``q4_k_m``, ``mobe-q4_k`` of ``model-q4_k_m``, ``model-mobe-q4_k``."""
    names = short_names([row.facts.path for row in rows])
    shared = os.path.commonprefix(names)
    shared = shared[: shared.rfind("-") + 1]
    return [name.removeprefix(shared) for name in names] if len(set(names)) > 1 else names
