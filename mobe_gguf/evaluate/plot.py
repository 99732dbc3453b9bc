"""KL divergence against file size, drawn with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobe_gguf.core.atomic import atomic_path, destination
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate.labels import is_far, leader, place
from mobe_gguf.evaluate.report import short_names

if TYPE_CHECKING:
    from mobe_gguf.evaluate.measure import Row

FORMATS = ("png", "svg", "pdf")

#: factorized -> (legend, marker, color)
STYLES = {False: ("plain", "o", "tab:blue"), True: ("MoBE", "D", "tab:red")}

#: Sizes of the figure in inches; if labels find no place, the next larger one is tried.
SIZES = ((9.0, 6.0), (12.0, 8.0), (16.0, 11.0))

#: Radius of a point in pixels.
MARK = 6.0


def check(path: Path) -> None:
    """MobeError if the plot could not be drawn or written; called before the work."""
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
    """Draw ``rows`` into ``path``; returns those whose KL divergence is not a positive number and cannot be drawn.

    A line joins the plain files that no smaller plain file beats.  MobeError as :func:`check`, or if no row can be
    drawn.
    """
    path = Path(path)
    check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [row for row in rows if 0 < row.divergence.kl.value < math.inf]
    if not drawn:
        raise MobeError(f"{path}: no file has a KL divergence above zero, so there is nothing to plot")
    for size in SIZES:
        figure = Figure(figsize=size, layout="constrained")
        if _draw(figure, FigureCanvasAgg(figure), drawn):
            break
    with atomic_path(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower(), dpi=150)
    return [row for row in rows if row not in drawn]


def _draw(figure: Any, canvas: Any, drawn: Sequence[Row]) -> bool:
    """Draw points, frontier and labels.  False if some label found no place and was left out."""
    from matplotlib.ticker import LogFormatter

    unit, name = (1e9, "GB") if max(row.facts.n_bytes for row in drawn) >= 1e10 else (1e6, "MB")
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
    return _label(canvas, axes, points, _labels(drawn), [drawn.index(row) for row in best])


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that are better than every smaller one, by size."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.facts.n_bytes, row.divergence.kl.value)):
        if not best or row.divergence.kl.value < best[-1].divergence.kl.value:
            best.append(row)
    return best


def _bars(rows: Sequence[Row]) -> list[list[float]]:
    """Standard errors below and above, except those that are not finite or would reach zero on the logarithmic axis."""
    pairs = [(row.divergence.kl.value, row.divergence.kl.error) for row in rows]
    errors = [error if 0 <= error < value else 0.0 for value, error in pairs]
    return [errors, errors]


def _label(
    canvas: Any, axes: Any, points: Sequence[tuple[float, float]], labels: Sequence[str], best: Sequence[int]
) -> bool:
    """Write each label beside its point where it covers nothing, not even the line through the ``best`` points.  False
    if some label found no such place and was left out."""
    canvas.draw()
    renderer, inverse = canvas.get_renderer(), axes.transData.inverted()
    style = {"fontsize": 8, "ha": "center", "va": "center"}
    texts = [axes.text(*point, label, **style) for point, label in zip(points, labels, strict=True)]
    sizes = [(box.width + 4, box.height + 2) for box in (t.get_window_extent(renderer) for t in texts)]
    pixels = [(float(x), float(y)) for x, y in axes.transData.transform(points)]
    frame = (axes.bbox.x0 + 2, axes.bbox.y0 + 2, axes.bbox.x1 - 2, axes.bbox.y1 - 2)
    legend = axes.get_legend().get_window_extent(renderer)
    line = list(pairwise(pixels[i] for i in best))
    boxes = place(pixels, sizes, frame, [(legend.x0, legend.y0, legend.x1, legend.y1)], MARK, line)
    for text, pixel, box in zip(texts, pixels, boxes, strict=True):
        if box is None:
            text.remove()
            continue
        text.set_position(inverse.transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)))
        if is_far(pixel, box):
            ends = inverse.transform(leader(pixel, box))
            axes.plot(ends[:, 0], ends[:, 1], color="gray", linewidth=0.5, zorder=1)
    return None not in boxes


def _labels(rows: Sequence[Row]) -> list[str]:
    """File names without their common beginning: ``q4_k_m``, ``mobe-q4_k`` for ``model-q4_k_m``,
    ``model-mobe-q4_k``."""
    names = short_names([row.facts.path for row in rows])
    shared = os.path.commonprefix(names)
    shared = shared[: shared.rfind("-") + 1]
    return [name.removeprefix(shared) for name in names] if len(set(names)) > 1 else names
