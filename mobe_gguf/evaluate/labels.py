"""Place the labels of points: beside their point, inside the picture, not covering another label, point or line.

Used for matplotlib's plots and for the HTML page.  Pure geometry: boxes are ``(left, low, right, high)`` in any unit;
the axes may point either way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]
Point = tuple[float, float]

#: Directions to try: right and left before up and down, because a label beside its point is easier to read.
DIRECTIONS = tuple(
    math.radians(angle)
    for angle in (0, 180, 25, -25, 155, -155, 50, -50, 130, -130, 75, -75, 105, -105, 90, -90)
)
#: Distances from the point, in heights of a label.
DISTANCES = (0.7, 1.0, 1.5, 2.1, 2.9, 3.8, 4.9, 6.2, 7.7, 9.4, 11.4, 13.6)
#: From this distance on a line joins label and point.
FAR = 1.3


def overlaps(a: Box, b: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(box: Box, frame: Box) -> bool:
    """Whether ``box`` lies in ``frame``."""
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def leader(point: Point, box: Box) -> tuple[Point, Point]:
    """The line from a point to the nearest edge of its label."""
    return point, (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))


def is_far(point: Point, box: Box) -> bool:
    """Whether a label lies so far from its point that a line should join them."""
    begin, end = leader(point, box)
    return math.dist(begin, end) >= FAR * (box[3] - box[1])


def crosses(line: tuple[Point, Point], box: Box) -> bool:
    """Whether a line runs through a box (Liang and Barsky's clipping)."""
    (x0, y0), (x1, y1) = line
    begin, end = 0.0, 1.0
    for start, step, low, high in ((x0, x1 - x0, box[0], box[2]), (y0, y1 - y0, box[1], box[3])):
        if step == 0:
            if not low < start < high:
                return False
            continue
        near, far = sorted(((low - start) / step, (high - start) / step))
        begin, end = max(begin, near), min(end, far)
    return begin < end


def place(
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    taken: Sequence[Box],
    mark: float,
    drawn: Sequence[tuple[Point, Point]] = (),
) -> list[Box | None]:
    """A box for each point's label of ``(width, height)``; None for a label that finds no place.

    Labels must not cover the points (``mark`` to each side), the boxes ``taken`` or the lines ``drawn``.  They are
    placed one after the other.  Several orders are tried, until one leaves no label without a place.  O(labels^2) for
    each of 192 candidates.
    """
    reach = 4 * max((w for w, _ in sizes), default=0.0)
    crowd = [sum(math.dist(p, q) < reach for q in points) for p in points]
    numbers = range(len(points))
    orders = (
        sorted(numbers, key=lambda i: (-crowd[i], i)),
        sorted(numbers, key=lambda i: points[i]),
        sorted(numbers, key=lambda i: points[i], reverse=True),
        sorted(numbers, key=lambda i: points[i][1]),
        [*numbers[::2], *numbers[1::2]],
    )
    best: list[Box | None] | None = None
    for order in orders:
        found = _in_order(order, points, sizes, frame, (taken, drawn), mark)
        if best is None or found.count(None) < best.count(None):
            best = found
        if None not in best:
            break
    return best or []


def _in_order(
    order: Sequence[int],
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    free: tuple[Sequence[Box], Sequence[tuple[Point, Point]]],
    mark: float,
) -> list[Box | None]:
    """:func:`place` for labels in the given ``order``; ``free``: boxes and lines that they must not cover."""
    marks = [(x - mark, y - mark, x + mark, y + mark) for x, y in points]
    filled, lines = [*marks, *free[0]], [*free[1]]
    found: list[Box | None] = [None] * len(points)

    def fits(box: Box, i: int, strict: bool) -> bool:
        if not inside(box, frame) or any(overlaps(box, other) for other in filled):
            return False
        if any(crosses(line, box) for line in lines):
            return False
        if not is_far(points[i], box):
            return True
        # a leader may pass other points if there is no other way, but never cross a label
        own = leader(points[i], box)
        avoided = filled if strict else filled[len(marks) :]
        return not any(crosses(own, other) for other in avoided if other is not marks[i])

    for i in order:
        places = [_at(points[i], sizes[i], mark, d, a) for d in DISTANCES for a in DIRECTIONS]
        tried = ((box, strict) for strict in (True, False) for box in places)
        box = next((box for box, strict in tried if fits(box, i, strict)), None)
        found[i] = box
        if box is not None:
            filled.append(box)
            if is_far(points[i], box):
                lines.append(leader(points[i], box))
    return found


def _at(point: Point, size: tuple[float, float], mark: float, distance: float, angle: float) -> Box:
    """The box of a label in a direction from its point."""
    (x, y), (w, h) = point, size
    reached = distance * h + mark / 2
    x += math.cos(angle) * (reached + w / 2)
    y += math.sin(angle) * (reached + h / 2)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2
