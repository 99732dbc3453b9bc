"""Measure files against the original, one after the other.  Results are kept if the job is stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from mobe_gguf.compress import rivals
from mobe_gguf.core.progress import Bar, bar
from mobe_gguf.core.records import plain, record
from mobe_gguf.core.workspace import Workspace
from mobe_gguf.evaluate import EvalSettings, Row, compare, facts_of
from mobe_gguf.evaluate.facts import Facts


class Measures:
    """Measurements of a job's files against ``original`` on ``text``.  ``workspace`` keeps them, and the original's
    logits."""

    def __init__(self, workspace: Workspace, original: Path, text: Path, settings: EvalSettings, quiet: bool):
        self.workspace, self.original, self.text = workspace, original, text
        self.settings, self.quiet = settings, quiet

    @property
    def reference(self) -> Facts:
        return facts_of(self.original)

    def rows(self, files: Mapping[str, Path]) -> dict[str, Row]:
        """The row of each file, by its name."""
        found = {name: row for name in files if (row := self._read(name)) is not None}
        logits = self.workspace.path / "logits"
        left = {name: path for name, path in files.items() if name not in found}
        names = iter(left)

        def keep(row: Row) -> None:
            name = next(names)
            found[name] = row
            self.workspace.write(f"measured/{name}.json", plain(row))

        if left:
            compare(
                self.original,
                left.values(),
                self.text,
                self.settings,
                keep_logits=logits,
                reuse_logits=logits.exists(),
                quiet=self.quiet,
                on_row=keep,
            )
        return {name: found[name] for name in files}

    def _read(self, name: str) -> Row | None:
        try:
            return record(Row, self.workspace.read(f"measured/{name}.json"))
        except (OSError, ValueError):
            return None  # not measured yet, or by another version

    def speeds(self, files: Mapping[str, Path]) -> dict[str, float]:
        """Tokens per second of each file: the median of several runs, more of them where they take no time.  Files take
        turns, so other load affects all alike."""
        runs: dict[str, list[float]] = {name: [] for name in files}

        def take_turns(progress: Bar) -> None:
            for name, path in files.items():
                runs[name].append(rivals.speed(path, self.settings.threads, self.settings.options))
                progress.advance()

        started = time.monotonic()
        with bar("speed", len(files), self.quiet) as progress:
            take_turns(progress)
        wanted = rivals.ENOUGH * len(files) / (time.monotonic() - started)
        rounds = max(rivals.RUNS, min(rivals.MOST_RUNS, int(wanted)))
        with bar("speed", (rounds - 1) * len(files), self.quiet) as progress:
            for _ in range(rounds - 1):
                take_turns(progress)
        return {name: sorted(found)[len(found) // 2] for name, found in runs.items()}
