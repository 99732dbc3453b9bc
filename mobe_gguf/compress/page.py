"""The HTML page of a compression: what ``report`` prints, and details of the result by layer."""

from __future__ import annotations

import shlex
from pathlib import Path

from mobe_gguf.compress.pipeline import Result
from mobe_gguf.compress.report import LABELS
from mobe_gguf.core.progress import duration
from mobe_gguf.evaluate import facts_of
from mobe_gguf.evaluate.page import sections
from mobe_gguf.evaluate.page.data import Page, Section
from mobe_gguf.formats.moments import Moments

#: Names of the points in the picture: our files, and llama-quantize's.
OURS, THEIRS = "rounded by moments", "llama-quantize, imatrix"


def of_compression(
    result: Result, original: Path | None, moments: Path, text: Path, threads: int | None, again: str
) -> Page:
    """``original``: the file that all were compared with, None if nothing was measured; ``again``: the command that was
    given.

    MobeError if a file cannot be read or llama-server does not run.
    """
    known = Moments(moments) if moments.is_file() else None
    made = f"the {LABELS.get(result.kind, result.kind)} file"
    measured, about = None, list[Section]()
    if original is not None and result.rows:
        names = list(result.rows)
        measured = sections.Measured(
            reference=facts_of(original),
            rows=list(result.rows.values()),
            labels=[LABELS.get(name, name) for name in names],
            series=[OURS if name in LABELS else THEIRS for name in names],
            text=text,
            chosen=names.index(result.kind),
            speeds=[result.speeds.get(name) for name in names],
        )
        about = sections.about_file(original, result.out, known, text, threads)
    else:
        found = [
            sections.bits(result.out),
            sections.routing(known) if known else None,
            sections.sizes([result.out]),
        ]
        about = [section for section in found if section is not None]
    about.append(
        sections.commands(
            [
                ("Run the file:", shlex.join(["llama-cli", "-m", str(result.out)])),
                ("Serve it:", shlex.join(["llama-server", "-m", str(result.out)])),
                ("Make it again:", again),
            ]
        )
    )
    facts = [(f"time of {name}", duration(seconds)) for name, seconds in result.seconds.items()]
    return sections.page(result.out.name, f"It is {made}; {result.why}.", measured, about, facts)
