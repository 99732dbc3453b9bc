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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_by_what_this_run_did(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("units", 10) as bar:
        bar.found(7, "finished earlier")
        clock[0] = 20.0
        bar.advance(1, "one more")
    said = capsys.readouterr().err.splitlines()
    assert said == ["[7/10] finished earlier", "[8/10] one more, 40 s left"]


def test_time_left_of_several_stages(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """What a stage took in relation to what was expected holds for those to come; what is skipped says nothing."""
    with progress.stages({"a": 1.0, "b": 2.0, "c": 4.0, "d": 3.0}) as stages:
        stages.skip("a")
        with stages.stage("b"), progress.bar("b", 2):
            clock[0] = 6.0  # three times what was expected
        assert stages.left() == pytest.approx(3 * 7)
        with stages.stage("c", bars=2):
            with progress.bar("one", 2) as bar:
                clock[0] = 9.0
                bar.advance(1, "half of the first")
            with progress.bar("two", 1) as bar:
                clock[0] = 12.0
                bar.advance(0.5)
                assert stages.left() == pytest.approx((12 / (2 + 4 * 0.75)) * (4 * 0.25 + 3))
    assert capsys.readouterr().err.splitlines() == ["[2/3 c 1/2] half of the first, 3 s left, 18 s in all"]
