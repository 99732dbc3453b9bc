"""What is shown on a terminal: names as they are."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from mobe_gguf.core import progress

#: A closing tag of nothing is an error of rich's markup; the others would be swallowed or replaced.
NAMES = ("a[/x]", "mo[bold]e", "blk:fire:w")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=100, **progress.VERBATIM)
    monkeypatch.setattr(progress, "console", console)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_bar(name: str, terminal: io.StringIO) -> None:
    with progress.bar(f"reconstruct {name}", 2) as bar:
        bar.advance(1, f"{name}: done")
    assert f"reconstruct {name}" in terminal.getvalue() and f"{name}: done" in terminal.getvalue()
    with progress.bar("values", 2) as bar:
        bar.update(name)
        bar.advance(2)
    assert name in terminal.getvalue().split("values")[-1]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_tables_and_lines(name: str, terminal: io.StringIO) -> None:
    table = Table("file", title=name)
    table.add_row(name)
    progress.console.print(table)
    progress.console.print(name)
    assert terminal.getvalue().count(name) == 3


def test_names_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        progress.console.print(name)
    assert capsys.readouterr().err.split() == list(NAMES)
