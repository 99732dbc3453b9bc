"""What a page shows, as plain data: a title, figures, and sections of a few kinds.  ``render`` makes HTML of it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class PageTable(msgspec.Struct, frozen=True):
    """Rows of text under ``columns``; the first column is left-aligned.  ``marked``: rows that stand out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()


class Dot(msgspec.Struct, frozen=True):
    """One point; ``error``: standard error of y.  ``series`` decides color and shape, ``chosen`` points are larger."""

    label: str
    x: float
    y: float
    series: str
    error: float = 0.0
    chosen: bool = False


class Scatter(msgspec.Struct, frozen=True, tag="scatter"):
    """Points; the y axis is logarithmic, and less is better in x and y.  A line joins the points that no other point
    beats."""

    x_label: str
    y_label: str
    dots: Sequence[Dot]


class Cell(msgspec.Struct, frozen=True):
    """One cell of a heat map.  ``dotted``: it has a dot in it.  ``said``: its numbers in words."""

    value: float
    said: str
    dotted: bool = False


class HeatMap(msgspec.Struct, frozen=True, tag="heat"):
    """``cells[row][column]``, None for an empty one.  ``unit``: of the values; ``dot``: what a dot in a cell means;
    ``across``: what the columns are."""

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell | None]]
    unit: str
    across: str
    dot: str | None = None


class Line(msgspec.Struct, frozen=True):
    """``points``: (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]


class Lines(msgspec.Struct, frozen=True, tag="lines"):
    """Lines over a common x; the y axis is linear from 0.  ``whole``: x is a whole number, such as a layer's."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    whole: bool = False


class ChartBar(msgspec.Struct, frozen=True):
    """A horizontal bar of several parts."""

    label: str
    parts: Sequence[float]


class Bars(msgspec.Struct, frozen=True, tag="bars"):
    """Stacked bars; ``parts`` names the parts of each."""

    parts: Sequence[str]
    bars: Sequence[ChartBar]
    unit: str


class Token(msgspec.Struct, frozen=True):
    """``kind``: "" if both texts have the token, "own" if only this one has it, "part" at the first difference."""

    text: str
    kind: str = ""


class FileText(msgspec.Struct, frozen=True):
    """One file's text; ``choices``: at the first difference, the likeliest tokens and their probabilities."""

    name: str
    tokens: Sequence[Token]
    choices: Sequence[tuple[str, float]] = ()


class Generation(msgspec.Struct, frozen=True):
    """How the original and the result continue ``prompt``.  ``same``: number of tokens before the first difference."""

    prompt: str
    left: FileText
    right: FileText
    same: int


class Generations(msgspec.Struct, frozen=True, tag="generations"):
    texts: Sequence[Generation]


class Command(msgspec.Struct, frozen=True):
    """``line`` for a shell, and what it does."""

    what: str
    line: str


class Commands(msgspec.Struct, frozen=True, tag="commands"):
    commands: Sequence[Command]


Body = Scatter | HeatMap | Lines | Bars | Generations | Commands


class Section(msgspec.Struct, frozen=True):
    """``key``: its anchor in the page.  ``note``: one or two sentences under the heading."""

    key: str
    title: str
    note: str
    body: Body | None = None
    table: PageTable | None = None


class Figure(msgspec.Struct, frozen=True):
    """One number at the top of the page."""

    label: str
    value: str
    note: str = ""


class Page(msgspec.Struct, frozen=True):
    """A whole page.  ``facts``: ``(name, value)`` of what was used, shown at the end."""

    title: str
    lead: str
    figures: Sequence[Figure] = ()
    sections: Sequence[Section] = ()
    facts: Sequence[tuple[str, str]] = ()
