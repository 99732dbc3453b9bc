"""``mobe-gguf demo``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mobe_gguf.cli import options
from mobe_gguf.core.errors import Interrupted


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="[DIR]", default="demo")
def command(directory: Path) -> None:
    """Run the whole path on the tiny model that ships with the project.

    The model is factorized, the original and the MoBE checkpoint are exported, and sizes, held-out perplexity and generated text of
    both are shown. All files stay in DIR (default: demo). A second run reuses factors with the same settings.
    """
    from rich.console import Console

    from mobe_gguf.core.progress import VERBATIM
    from mobe_gguf.studies.demo import render, run

    options.check_stdout()
    try:
        demo = run(directory)
    except KeyboardInterrupt as e:
        raise Interrupted(
            f"stopped. What is finished is kept in {directory}; the same command resumes from there."
        ) from e
    out = Console(highlight=False, **VERBATIM)
    out.width = min(out.width, 100) if sys.stdout.isatty() else 100
    out.print(render(demo))
