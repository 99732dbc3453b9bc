"""The pictures of a page as SVG, for a given width: narrow for phones, or wide; text has the same size in both."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from itertools import pairwise

from mobe_gguf.evaluate.labels import Box, is_far, leader, place
from mobe_gguf.evaluate.page.canvas import (
    FONT,
    LINE,
    Canvas,
    linear_ticks,
    log_ticks,
    number,
    short,
    width_of,
)
from mobe_gguf.evaluate.page.data import Bars, Body, Cell, Dot, HeatMap, Lines, Scatter

#: Width of a picture on a phone, and on all other screens.
NARROW, WIDE = 330, 760

#: Radius in pixels of a chosen point, and of any other.
CHOSEN, ORDINARY = 6.5, 4.5


def drawing(body: Body, width: float, title: str) -> tuple[str, str]:
    """The SVG of a section's body and a remark for its caption; both are empty if it has no picture."""
    makers: dict[type, Callable[..., tuple[str, str]]] = {
        Scatter: scatter, HeatMap: heat, Lines: lines, Bars: bars,
    }  # fmt: skip
    make = makers.get(type(body))
    return ("", "") if make is None else make(body, Canvas(width, title))


def names_of_series(dots: Sequence[Dot]) -> list[str]:
    """Names of the series, in the order of their first point."""
    return list(dict.fromkeys(dot.series for dot in dots))


def drawable(dots: Sequence[Dot]) -> list[Dot]:
    """The points that a logarithmic axis can show."""
    return [dot for dot in dots if 0 < dot.y < math.inf and math.isfinite(dot.x)]


def frontier(dots: Sequence[Dot]) -> list[Dot]:
    """The points, ordered by x, whose y is below that of every point before."""
    best: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x, dot.y)):
        if not best or dot.y < best[-1].y:
            best.append(dot)
    return best


def scatter(body: Scatter, canvas: Canvas) -> tuple[str, str]:
    """Points with a frontier and labels beside them."""
    dots = drawable(body.dots)
    if not dots:
        return "", "No value is above zero, so nothing can be drawn."
    wide = canvas.width > 500
    height, top, bottom = (430.0 if wide else 400.0), 1.6 * LINE, 2.6 * LINE
    low, high = min(dot.y for dot in dots), max(dot.y for dot in dots)
    room = 1.6 if high / low < 10 else (high / low) ** 0.12
    low, high = low / room, high * room
    ticks = log_ticks(low, high)
    left = 8 + max(width_of(number(tick)) for tick in ticks)
    x0, x1 = min(dot.x for dot in dots), max(dot.x for dot in dots)
    pad = 0.08 * (x1 - x0) or 0.1 * abs(x1) or 1.0
    x0, x1 = x0 - pad, x1 + pad
    right, base = canvas.width - 6, height - bottom

    def at(dot: Dot, y: float | None = None) -> tuple[float, float]:
        share = math.log((dot.y if y is None else y) / low) / math.log(high / low)
        return left + (dot.x - x0) / (x1 - x0) * (right - left), base - share * (base - top)

    canvas.text(0, LINE / 2, body.y_label, style="t title")
    for tick in ticks:
        y = base - math.log(tick / low) / math.log(high / low) * (base - top)
        canvas.line(left, y, right, y, "grid")
        canvas.text(left - 6, y, number(tick), "end")
    _x_axis(canvas, (x0, x1), (left, right), base, body.x_label)
    best = frontier(dots)
    line = [at(dot) for dot in best]
    canvas.path(line, "frontier")
    series = names_of_series(body.dots)
    for dot in sorted(dots, key=lambda dot: dot.chosen):
        (x, y), size = at(dot), CHOSEN if dot.chosen else ORDINARY
        number_of = series.index(dot.series)
        if 0 < dot.error < dot.y:
            canvas.line(
                x, at(dot, dot.y - dot.error)[1], x, at(dot, dot.y + dot.error)[1], f"e c{number_of % 8}"
            )
        if dot.chosen:
            canvas.shape("circle", "ring", cx=x, cy=y, r=size + 5)
        canvas.mark(number_of, x, y, size, f"{dot.label}: {number(dot.x)}, {dot.y:.5f} ± {dot.error:.5f}")
    spans = [
        (at(dot)[0] - 1.5, at(dot, dot.y + dot.error)[1], at(dot)[0] + 1.5, at(dot, dot.y - dot.error)[1])
        for dot in dots
        if 0 < dot.error < dot.y
    ]
    left_out = _label(
        canvas, dots, [at(dot) for dot in dots], (left + 2, top, right - 1, base - 2), spans, line
    )
    said = f"{left_out} labels found no room; the table has all files. " if left_out else ""
    if len(dots) < len(body.dots):
        said += f"{len(body.dots) - len(dots)} points of no value above zero are not drawn. "
    return canvas.svg(height), said


def _x_axis(
    canvas: Canvas,
    values: tuple[float, float],
    pixels: tuple[float, float],
    base: float,
    label: str,
    whole: bool = False,
) -> None:
    (x0, x1), (left, right) = values, pixels
    canvas.line(left, base, right, base, "axis")
    end = -math.inf
    for tick in linear_ticks(x0, x1, 4 if canvas.width < 500 else 8):
        if whole and tick % 1:
            continue
        x, half = left + (tick - x0) / (x1 - x0 or 1.0) * (right - left), width_of(number(tick)) / 2
        if x - half < end + 4 or x + half > canvas.width:
            continue
        end = x + half
        canvas.line(x, base, x, base + 4, "axis")
        canvas.text(x, base + 0.85 * LINE, number(tick), "middle")
    canvas.text(right, base + 1.9 * LINE, label, "end", "t title")


def _label(
    canvas: Canvas,
    dots: Sequence[Dot],
    points: list[tuple[float, float]],
    frame: Box,
    taken: Sequence[Box],
    line: Sequence[tuple[float, float]],
) -> int:
    """Write the labels without covering ``taken`` or the ``line``; returns how many found no place."""
    shown = [short(text, 16 if canvas.width < 500 else 30) for text in _without_prefix(dots)]
    sizes = [(width_of(text) + 2, FONT + 1.5) for text in shown]
    boxes = place(points, sizes, frame, taken, CHOSEN + 3, list(pairwise(line)))
    for dot, point, text, box in zip(dots, points, shown, boxes, strict=True):
        if box is None:
            continue
        if is_far(point, box):
            (x, y), (end, foot) = leader(point, box)
            canvas.line(x, y, end, foot, "leader")
        canvas.text(
            (box[0] + box[2]) / 2,
            (box[1] + box[3]) / 2,
            text,
            "middle",
            "t label chosen" if dot.chosen else "t label",
        )
    return sum(box is None for box in boxes)


def _without_prefix(dots: Sequence[Dot]) -> list[str]:
    texts = [dot.label for dot in dots]
    shared = os.path.commonprefix(texts)
    shared = shared[: shared.rfind("-") + 1]
    return [text.removeprefix(shared) for text in texts] if len(set(texts)) > 1 else texts


def heat(body: HeatMap, canvas: Canvas) -> tuple[str, str]:
    """Cells colored by their value; columns that do not fit beside each other continue below."""
    values = [
        cell.value for row in body.cells for cell in row if cell is not None and math.isfinite(cell.value)
    ]
    if not values:
        return "", ""
    low, high = min(values), max(values)
    labels = [short(row, 16 if canvas.width < 500 else 24) for row in body.rows]
    left = 8 + max(map(width_of, labels))
    room = canvas.width - left - 2
    per_block = min(len(body.columns), max(1, int(room // 11)))
    blocks = -(-len(body.columns) // per_block)
    per_block = -(-len(body.columns) // blocks)
    cell, tall = min(46.0, room / per_block), max(16.0, min(26.0, room / per_block))
    y = 0.0
    for block in range(blocks):
        columns = range(block * per_block, min(len(body.columns), (block + 1) * per_block))
        said = f"{body.across} {body.columns[columns[0]]} to {body.columns[columns[-1]]}"
        fits = int(canvas.width / (FONT * 0.605))
        x = min(left, canvas.width - width_of(short(said, fits)))
        canvas.text(x, y + LINE / 2, short(said, fits), style="t title")
        y += 1.3 * LINE
        for row, label in enumerate(labels):
            canvas.text(left - 6, y + tall / 2, label, "end")
            for k, column in enumerate(columns):
                found = body.cells[row][column]
                box = (left + k * cell + 0.5, y + 0.5, left + (k + 1) * cell - 0.5, y + tall - 0.5)
                _cell(canvas, box, found, low, high)
            y += tall
        y += 0.5 * LINE
    return canvas.svg(_scale(canvas, y, low, high, body.unit)), ""


def _cell(canvas: Canvas, box: Box, found: Cell | None, low: float, high: float) -> None:
    if found is None or not math.isfinite(found.value):
        canvas.cell(box, None, "nothing", "empty")
        return
    canvas.cell(box, (found.value - low) / (high - low) if high > low else 0.5, found.said)
    if found.dotted:
        canvas.shape("circle", "dot", cx=(box[0] + box[2]) / 2, cy=(box[1] + box[3]) / 2, r=2.4)


def _scale(canvas: Canvas, y: float, low: float, high: float, unit: str) -> float:
    """Draw the scale of colors; returns the y at its end."""
    first, last = f"{low:.3g}", f"{high:.3g} {unit}"
    x = width_of(first) + 6
    canvas.text(0, y + LINE / 2, first)
    for k in range(10):
        canvas.cell((x + 9 * k, y + 2, x + 9 * k + 9, y + LINE - 2), k / 9, "")
    canvas.text(x + 96, y + LINE / 2, last)
    return y + 1.2 * LINE


def lines(body: Lines, canvas: Canvas) -> tuple[str, str]:
    """Lines with their points; the y axis begins at 0."""
    points = [p for line in body.lines for p in line.points if math.isfinite(p[1])]
    if not points:
        return "", ""
    height, top, bottom = 300.0, 1.6 * LINE, 2.6 * LINE
    high = max(y for _, y in points) * 1.08 or 1.0
    ticks = linear_ticks(0, high, 5)
    left = 8 + max(width_of(number(tick)) for tick in ticks)
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    pad = 0.03 * (x1 - x0) or 0.5
    right, base = canvas.width - 6, height - bottom
    canvas.text(0, LINE / 2, body.y_label, style="t title")
    for tick in ticks:
        y = base - tick / high * (base - top)
        canvas.line(left, y, right, y, "grid")
        canvas.text(left - 6, y, number(tick), "end")
    _x_axis(canvas, (x0 - pad, x1 + pad), (left, right), base, body.x_label, body.whole)
    for k, line in enumerate(body.lines):
        places = [
            (left + (x - x0 + pad) / (x1 - x0 + 2 * pad) * (right - left), base - y / high * (base - top))
            for x, y in line.points
            if math.isfinite(y)
        ]
        canvas.path(places, f"line c{k % 8}")
        finite = [p for p in line.points if math.isfinite(p[1])]
        for (x, y), (layer, value) in zip(places, finite, strict=True) if len(places) < 100 else ():
            canvas.mark(k, x, y, 3.0, f"{line.label}, {body.x_label} {layer:g}: {value:.4g}")
    return canvas.svg(height), ""


def bars(body: Bars, canvas: Canvas) -> tuple[str, str]:
    """Bars one below the other, each with its label and total above."""
    most = max((sum(bar.parts) for bar in body.bars), default=0.0)
    if most <= 0:
        return "", ""
    y, room = 0.0, canvas.width - 2
    for bar in body.bars:
        total = f"{sum(bar.parts):.4g} {body.unit}"
        fits = int((room - width_of(total) - 12) / (FONT * 0.605))
        canvas.text(0, y + LINE / 2, short(bar.label, fits))
        canvas.text(room, y + LINE / 2, total, "end")
        y += 1.15 * LINE
        ends = [0.0]
        for part in bar.parts:
            ends.append(ends[-1] + part / most * room)
        for k, (begin, end) in enumerate(pairwise(ends)):
            if end > begin:
                said = f"{body.parts[k]}: {bar.parts[k]:.4g} {body.unit}"
                gap = 1.0 if end - begin > 3 else 0.0
                canvas.cell((begin, y, end - gap, y + 22), None, said, f"bar c{k % 8}")
        y += 22 + 0.8 * LINE
    return canvas.svg(y), ""
