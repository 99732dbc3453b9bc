"""Where labels go."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobe_gguf.evaluate.labels import crosses, inside, overlaps, place

FRAME = (0.0, 0.0, 600.0, 400.0)
POINTS = st.lists(st.tuples(st.floats(0, 600), st.floats(0, 400)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=25)
@given(POINTS, st.data())
def test_labels_cover_nothing_and_stay_inside(points: list[tuple[float, float]], data: st.DataObject) -> None:
    sizes = [(data.draw(st.floats(10, 200)), 14.0) for _ in points]
    taken = [(500.0, 0.0, 600.0, 60.0)]
    boxes = [box for box in place(points, sizes, FRAME, taken, 5.0) if box is not None]
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for i, box in enumerate(boxes):
        assert inside(box, FRAME)
        assert not any(overlaps(box, other) for other in [*boxes[:i], *marks, *taken])


def test_all_find_a_place_where_there_is_room() -> None:
    points = [(40.0 + 50 * i, 200.0 + 6 * i) for i in range(10)]
    assert None not in place(points, [(90.0, 14.0)] * 10, FRAME, (), 5.0)


def test_a_label_that_fits_nowhere_is_left_out() -> None:
    assert place([(300.0, 200.0)], [(900.0, 14.0)], FRAME, (), 5.0) == [None]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (((0, 0), (10, 10)), True),
        (((0, 5), (20, 5)), True),
        (((5, 0), (5, 20)), True),
        (((0, 0), (3, 3)), False),
        (((0, 20), (20, 20)), False),
        (((0, 12), (12, 24)), False),
    ],
)
def test_lines_through_boxes(line: tuple[tuple[float, float], tuple[float, float]], expected: bool) -> None:
    assert crosses(line, (4.0, 4.0, 8.0, 8.0)) is expected
