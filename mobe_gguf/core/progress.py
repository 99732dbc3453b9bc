"""Progress on stderr: a bar on a terminal, elsewhere one line for each unit.

Only this module, ``cli/`` and the ``report`` modules print.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: File and tensor names are shown literally: rich's markup (``[bold]``) and emoji (``:key:``) are off.
VERBATIM: dict[str, Any] = dict(markup=False, emoji=False)

#: Logs, tables and bars meant for a person go here; data goes to stdout.
console = Console(stderr=True, **VERBATIM)


def say(line: str) -> None:
    """Print one log line on stderr, literally: what a library function is doing, or a warning.  Never a result."""
    console.print(line, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``, ``12 days``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"


#: A stage that is killed loses at most this many seconds of its time, and one step of its bar.
KEEP = 5.0


class Stages:
    """One display for work in several stages: the current stage, its progress, the time left for all.

    ``expected``: estimated seconds of each stage, in order.  Once a stage is done only their ratios count: the time of
    finished stages shows how fast this machine is.  ``seconds``: what each stage took, those of ``before`` (earlier runs)
    included.  ``keep`` gets it whenever a stage ends, and every KEEP seconds while it advances.
    """

    def __init__(
        self,
        expected: Mapping[str, float],
        before: Mapping[str, float] | None = None,
        keep: Callable[[dict[str, float]], None] = lambda seconds: None,
    ):
        self.expected = dict(expected)
        self.seconds = dict(before or {})
        self.keep = keep
        self._kept = time.monotonic()
        self._done: set[str] = set()
        self._now: str | None = None
        self._began = self._share = 0.0
        self._bars, self._bar = 1, -1

    @contextlib.contextmanager
    def stage(self, name: str, bars: int = 1) -> Iterator[None]:
        """The code inside is stage ``name``, which shows ``bars`` bars, one after the other."""
        self._now, self._began, self._share = name, time.monotonic(), 0.0
        self._bars, self._bar = bars, -1
        try:
            yield
            self._done.add(name)
        finally:
            self._count()
            self._now = None

    def _count(self) -> None:
        """Add the time since the last call to the stage's."""
        now = time.monotonic()
        if self._now is not None:
            self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._began
        self._began = self._kept = now
        self.keep(self.seconds)

    def skip(self, name: str) -> None:
        """An earlier run did stage ``name``: it takes no time and does not count for this machine's speed."""
        self.expected.pop(name, None)

    def next_bar(self) -> None:
        """Another bar of the stage begins."""
        self._bar = min(self._bar + 1, self._bars - 1)

    def at(self, share: float) -> None:
        """Set the share of the bar that is done."""
        self._share = (self._bar + share) / self._bars
        if time.monotonic() - self._kept > KEEP:
            self._count()

    def left(self) -> float:
        """Seconds left for all stages."""
        counted = {name for name in self._done if name in self.expected}
        spent, foreseen = sum(self.seconds[n] for n in counted), sum(self.expected[n] for n in counted)
        now = self.expected.get(self._now or "", 0.0)
        if self._now:
            spent += self.seconds.get(self._now, 0.0) + time.monotonic() - self._began
        foreseen += now * self._share
        speed = spent / foreseen if foreseen and spent else 1.0
        to_come = sum(s for name, s in self.expected.items() if name not in counted and name != self._now)
        return speed * (to_come + now * (1 - self._share))

    def label(self) -> str:
        """``3/9 fit``."""
        order = list(self.expected)
        if self._now not in order:
            return self._now or ""
        return f"{order.index(self._now) + 1}/{len(order)} {self._now}"


_stages: ContextVar[Stages | None] = ContextVar("stages", default=None)


@contextlib.contextmanager
def stages(
    expected: Mapping[str, float],
    before: Mapping[str, float] | None = None,
    keep: Callable[[dict[str, float]], None] = lambda seconds: None,
) -> Iterator[Stages]:
    """Show all bars inside as parts of one display, see :class:`Stages`."""
    made = Stages(expected, before, keep)
    token = _stages.set(made)
    try:
        yield made
    finally:
        _stages.reset(token)


class Bar:
    """One bar over ``total`` units of work.  ``quiet`` shows nothing at all."""

    def __init__(self, label: str, total: float, progress: Progress | None, quiet: bool):
        self._progress = progress
        self._quiet = quiet
        self._label = label
        self._total = total
        self._done = self._found = 0.0
        self._start = time.monotonic()
        self._stages = _stages.get()
        if self._stages is not None:
            self._stages.next_bar()
        self._task = progress.add_task(self._described(label), total=total, left="") if progress else None

    @property
    def is_live(self) -> bool:
        """True if :meth:`update` shows anything."""
        return self._progress is not None

    def update(self, label: str) -> None:
        """Change the text beside the bar (terminal only)."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=self._described(label), left=self._left())

    def advance(self, amount: float = 1.0, line: str | None = None) -> None:
        """Count ``amount`` units done; ``line`` is printed, above the bar or alone where there is none."""
        self._count(amount)
        self._tell(amount, line, self._left())

    def found(self, amount: float = 1.0, line: str | None = None) -> None:
        """Count ``amount`` units that an earlier run did.  They do not count in the estimate of the time left."""
        self._found += amount
        self._count(amount)
        self._tell(amount, line, "")

    def _count(self, amount: float) -> None:
        self._done += amount
        if self._stages is not None and self._total:
            self._stages.at(min(1.0, self._done / self._total))

    def _tell(self, amount: float, line: str | None, left: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=amount, left=left)
            if line:
                self._progress.console.print(line, highlight=False, soft_wrap=True)
        elif line and not self._quiet:
            head = f"[{self._described('')}{self._done:g}/{self._total:g}]"
            console.print(f"{head} {line}" + (f", {left}" if left else ""), highlight=False, soft_wrap=True)

    def _described(self, label: str) -> str:
        """``label`` with the stage that the bar belongs to."""
        return f"{self._stages.label()} {label}" if self._stages is not None else label

    def _left(self) -> str:
        here = self._done - self._found
        if not here:
            return ""
        left = (time.monotonic() - self._start) / here * (self._total - self._done)
        said = f"{duration(left)} left"
        return said if self._stages is None else f"{said}, {duration(self._stages.left())} in all"


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
        TextColumn("{task.fields[left]}", markup=False),
    )
    with Progress(*columns, console=console, transient=_stages.get() is not None) as progress:
        yield Bar(label, total, progress, quiet)
