"""Progress on stderr: a bar on a terminal, one line a unit elsewhere.

Only this module, ``cli/`` and the ``report`` modules print.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Names of files and tensors are shown as they are: not as rich's markup (``[bold]``), nor its emoji (``:key:``).
VERBATIM: dict[str, Any] = dict(markup=False, emoji=False)

#: Logs, tables and bars meant for a person go here; data goes to stdout.
console = Console(stderr=True, **VERBATIM)


def say(line: str) -> None:
    """One line of the log, on stderr, as it is: what a library function is doing, or a warning.  Never a result."""
    console.print(line, highlight=False, soft_wrap=True)


class Bar:
    """One bar over ``total`` units of work.  ``quiet`` shows nothing at all."""

    def __init__(self, label: str, total: float, progress: Progress | None, quiet: bool):
        self._progress = progress
        self._quiet = quiet
        self._label = label
        self._total = total
        self._done = 0.0
        self._start = time.monotonic()
        self._task = progress.add_task(label, total=total) if progress else None

    @property
    def is_live(self) -> bool:
        """True if :meth:`update` shows anything."""
        return self._progress is not None

    def update(self, label: str) -> None:
        """Change the text beside the bar (terminal only)."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=label)

    def advance(self, amount: float = 1.0, line: str | None = None) -> None:
        """Count ``amount`` units done; ``line`` is printed, above the bar or alone where there is none."""
        self._done += amount
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=amount)
            if line:
                self._progress.console.print(line, highlight=False, soft_wrap=True)
        elif line and not self._quiet:
            spent = time.monotonic() - self._start
            left = spent / self._done * (self._total - self._done) if self._done else 0.0
            console.print(f"[{self._done:g}/{self._total:g}] {line}, {left:.0f} s left", highlight=False)


@contextlib.contextmanager
def bar(label: str, total: float, quiet: bool = False) -> Iterator[Bar]:
    """A progress bar for long work: ``with bar("factorize", 8) as b: b.advance(1, "layer 0 ...")``."""
    if quiet or not console.is_terminal:
        yield Bar(label, total, None, quiet)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(label, total, progress, quiet)
