"""A page as HTML, by the template ``page.html.j2``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
import markupsafe

from mobe_gguf.core.atomic import atomic_path, check_output
from mobe_gguf.core.errors import UsageError
from mobe_gguf.evaluate.page import charts
from mobe_gguf.evaluate.page.data import Bars, Generations, Lines, Page, Scatter, Section

#: Most bytes of a page.
MOST = 3_000_000


def check(path: Path) -> None:
    """UsageError or MobeError if the page could not be written; called before the work."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {path}: expected a name that ends in .html")
    check_output(path)


def write(page: Page, path: Path) -> None:
    """Write the page to ``path``, whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(render(page), encoding="utf-8")


def render(page: Page) -> str:
    """The page as HTML in UTF-8.  If it would be too large, tables keep their first rows and say so."""
    for most in (100_000, 1000, 200, 50):
        made = _template().render(page=page, drawn=[_drawn(section, most) for section in page.sections])
        if len(made.encode()) < MOST:
            break
    return made


@dataclass(frozen=True)
class Drawn:
    """A section with its pictures.  ``legend``: ``(number of the color, name)``; ``rows``: the table's shown rows;
    ``hidden``: how many are left out."""

    section: Section
    kind: str
    narrow: markupsafe.Markup
    wide: markupsafe.Markup
    remark: str
    legend: list[tuple[int, str]]
    rows: list[tuple[bool, list[str]]]
    hidden: int


def _drawn(section: Section, most: int) -> Drawn:
    body = section.body
    narrow = wide = remark = ""
    if body is not None:
        narrow, _ = charts.drawing(body, charts.NARROW, section.title)
        wide, remark = charts.drawing(body, charts.WIDE, section.title)
    table = section.table
    rows = [] if table is None else [(i in table.marked, list(row)) for i, row in enumerate(table.rows)]
    return Drawn(
        section,
        "none" if body is None else str(type(body).__struct_config__.tag),
        markupsafe.Markup(narrow),  # made by ElementTree, which escapes
        markupsafe.Markup(wide),
        remark,
        list(enumerate(_legend(section))),
        rows[:most],
        max(0, len(rows) - most),
    )


def _legend(section: Section) -> list[str]:
    body = section.body
    if isinstance(body, Scatter):
        return charts.names_of_series(body.dots)
    if isinstance(body, Lines):
        return [line.label for line in body.lines]
    return list(body.parts) if isinstance(body, Bars) else []


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mobe_gguf.evaluate.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["Generations"] = Generations
    return environment.get_template("page.html.j2")
