"""The HTML page: a pure function of data, safe with any names, never too large; and what is gathered for it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate import page as pages
from mobe_gguf.evaluate.page import canvas, charts
from mobe_gguf.evaluate.page.data import Dot, HeatMap, Lines, Page, PageTable, Scatter, Section
from mobe_gguf.evaluate.page.render import MOST
from mobe_gguf.evaluate.page.texts import Step, pair

from . import made_up


class Tags(HTMLParser):
    """All tags and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_it_needs_nothing_else_and_names_do_no_harm() -> None:
    html = pages.render(made_up.page())
    tags = Tags(html).found
    assert not [tag for tag, _ in tags if tag in ("script", "img", "iframe", "object", "form")]
    links = {value for _, attributes in tags for name, value in attributes.items() if name in ("href", "src")}
    assert {link for link in links if link and not link.startswith("#")} == {"data:,"}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in html and "&lt;script&gt;alert" in html
    assert not re.search(r"url\(|@import", html)


def test_numbers_are_tables_too() -> None:
    html = pages.render(made_up.page())
    for dot in made_up.dots(16):
        assert f"<td>{dot.label}</td>" in html
    assert "2 points of no value above zero are not drawn" in html


def test_a_page_without_sections() -> None:
    assert "<h1>a</h1>" in pages.render(Page("a", "b"))


def test_pages_stay_small() -> None:
    table = PageTable(["where", "what"], [[f"row {i}", "x" * 400] for i in range(20_000)])
    html = pages.render(Page("a", "b", [], [Section("t", "T", "note", None, table)]))
    assert len(html.encode()) < MOST and "19000 more rows are left out." in html


@pytest.mark.parametrize("width", [charts.NARROW, charts.WIDE])
def test_odd_numbers_are_drawn(width: int) -> None:
    one = Scatter("x", "y", [Dot("a", 5.0, 0.01, "plain")])
    same = Scatter("x", "y", [Dot(f"a{i}", 5.0, 0.01, "plain") for i in range(9)])
    far = Scatter("x", "y", [Dot("a", 1e-3, 1e-9, "plain"), Dot("b", 4e5, 7.0, "MoBE")])
    for body in (one, same, far, Lines("x", "y", []), HeatMap([], [], [], "", "")):
        svg, _ = charts.drawing(body, width, "title")
        assert "nan" not in svg and "inf" not in svg
    none = Scatter("x", "y", [Dot("a", 5.0, 0.0, "plain")])
    assert charts.drawing(none, width, "t")[0] == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.1, 3.15), (-5.0, 900.0), (1e-9, 2e-9), (4.0, 4.0)])
def test_linear_ticks(low: float, high: float) -> None:
    ticks = canvas.linear_ticks(low, high, 5)
    assert 1 <= len(ticks) <= 7 and all(low <= tick <= high * (1 + 1e-9) for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(1e-9, 9.0), (0.002, 0.0031), (0.9, 1.1), (0.5, 700.0)])
def test_log_ticks(low: float, high: float) -> None:
    ticks = canvas.log_ticks(low, high)
    assert 1 <= len(ticks) <= 9 and all(low <= tick <= high for tick in ticks)


def test_short_names_keep_both_ends() -> None:
    assert (
        canvas.short("abcdefghijklmnop", 9) == "abc…lmnop"[:4] + "lmnop" and canvas.short("abc", 3) == "abc"
    )


def step(id: int) -> Step:
    return Step(id, f" {id}", ((f" {id}", 0.5),))


def test_texts_are_marked_where_they_part() -> None:
    found = pair("p", ("a", "b"), [step(i) for i in (1, 2, 3, 4, 5)], [step(i) for i in (1, 2, 9, 4, 5)])
    assert found.same == 2 and found.left.choices == [("␣3", 0.5)]
    assert [token.kind for token in found.left.tokens] == ["", "", "part", "", ""]
    found = pair("p", ("a", "b"), [step(i) for i in (1, 2, 3, 7)], [step(i) for i in (1, 5, 6, 3)])
    assert [token.kind for token in found.right.tokens] == ["", "part", "own", ""]
    same = pair("p", ("a", "b"), [step(1), step(2)], [step(1), step(2)])
    assert same.same == 2 and not any(t.kind for t in (*same.left.tokens, *same.right.tokens))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ends in .html"):
        pages.check(tmp_path / "a.pdf")
    with pytest.raises(MobeError, match="no such directory"):
        pages.check(tmp_path / "none" / "a.html")


def test_data_are_plain() -> None:
    """They go through JSON, so a page can be kept and drawn again; what is no number is drawn as nothing."""
    made = made_up.page()
    sections = made.sections[1:]
    again = msgspec.json.decode(msgspec.json.encode(sections), type=list[Section])
    assert pages.render(Page("a", "b", [], again)) == pages.render(Page("a", "b", [], sections))
    assert "NaN" not in pages.render(made)
