"""``mobe-gguf inspect``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mobe_gguf.cli import options


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE_OR_DIR")
@options.as_json
def command(path: Path, as_json: bool) -> None:
    """Show what a GGUF file, a MoBE checkpoint or a Hugging Face MoE model holds.

    Prints layers, experts (n, of which a token uses k; hidden size d, intermediate size p), bases (m of rank r), types, sizes and
    recorded errors. Only headers are read.
    """
    from rich.console import Console

    from mobe_gguf.core.progress import VERBATIM
    from mobe_gguf.evaluate.inspect import describe, layer_table, summary
    from mobe_gguf.export.report import size_table

    options.check_stdout()
    description = describe(path)
    if as_json:
        click.echo(json.dumps(description.as_json(), indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, **VERBATIM)
        console.print("\n".join(summary(description)), soft_wrap=True)
        console.print()
        console.print(layer_table(description.layers))
        console.print()
        console.print(size_table(description.entries))
    for problem in description.problems:
        click.echo(f"{path}: {problem}", err=True)
    if description.problems:
        sys.exit(1)
