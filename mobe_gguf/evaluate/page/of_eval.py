"""The page of ``mobe-gguf eval``: files compared with their original, the first file in detail."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mobe_gguf.evaluate.facts import Facts
from mobe_gguf.evaluate.measure import EvalSettings, Row
from mobe_gguf.evaluate.page import sections
from mobe_gguf.evaluate.page.data import Page
from mobe_gguf.evaluate.report import short_names
from mobe_gguf.formats.moments import Moments

#: Names of the points in the legend.
PLAIN, MOBE = "plain", "MoBE"


def of_eval(
    reference: Facts, rows: Sequence[Row], text: Path, settings: EvalSettings, moments: Moments | None
) -> Page:
    """The page of ``rows`` from ``compare``, at least one; errors and texts of the first file are computed here.

    MobeError if a file cannot be read or llama-server does not run.
    """
    labels = short_names([row.facts.path for row in rows])
    measured = sections.Measured(
        reference=reference,
        rows=rows,
        labels=labels,
        series=[MOBE if row.facts.factorized else PLAIN for row in rows],
        text=text,
    )
    file, original = rows[0].facts.path, reference.path
    about = sections.about_file(original, file, moments, text, settings.threads, settings.options)
    about.append(
        sections.commands(
            [
                ("Run the file:", shlex.join(["llama-cli", "-m", str(file)])),
                ("Compare it with the original, side by side in a browser:", shlex.join(["mobe-gguf", "serve-compare", str(original), str(file)])),
                ("Measure again:", shlex.join(_again(reference, rows, text, settings, moments))),
            ]
        )
    )  # fmt: skip
    others = f" and {len(rows) - 1} other {'files' if len(rows) > 2 else 'file'}" if len(rows) > 1 else ""
    facts = [
        ("original", str(original)),
        ("text", f"{text}, {rows[0].chunks} chunks of {settings.ctx} tokens, {rows[0].scored} evaluated"),
        *([("moments", str(moments.path))] if moments else []),
    ]
    return sections.page(file.name, f"Compared with {original.name}{others}.", measured, about, facts)


def _again(
    reference: Facts, rows: Sequence[Row], text: Path, settings: EvalSettings, moments: Moments | None
) -> list[str]:
    line = ["mobe-gguf", "eval", str(reference.path), *(str(row.facts.path) for row in rows)]
    line += ["--text", str(text), "--ctx", str(settings.ctx), "--chunks", str(rows[0].chunks)]
    line += [] if settings.threads is None else ["--threads", str(settings.threads)]
    line += [] if moments is None else ["--moments", str(moments.path)]
    return [*line, *settings.options, "--report", "report.html"]
