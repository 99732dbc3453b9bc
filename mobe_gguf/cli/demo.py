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
    """Run `mobe-gguf compress` on the tiny model that ships with the project.

    The model is calibrated, rounded and factorized, and compared with the original and with llama-quantize's files of about the
    same size. The file that is best stays in DIR (default: demo), with its card; the command that was run is shown first. A stopped run
    resumes.
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
