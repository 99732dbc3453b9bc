"""``mobe-gguf verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mobe_gguf.cli import options


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--sums",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare with the checksums in this file, which `sha256sum *.gguf` printed.",
)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also run the first layers of this Hugging Face model in transformers and those of FILE in llama.cpp, on the same tokens.",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="MoE layers that --model compares.",
)
@options.as_json
@options.quiet
def command(
    file: Path, sums: Path | None, model: Path | None, layers: int, as_json: bool, quiet: bool
) -> None:
    """Check a GGUF file: structure, shapes, finite values.

    FILE is any GGUF file. For the first file of a split model, all its files are checked. Every fault is listed with its tensor
    and the reason, and the exit code is 1. Tensors whose values are too small for their type are mentioned.
    """
    from mobe_gguf.core.errors import MobeError
    from mobe_gguf.core.files import describe_size, why_not_written
    from mobe_gguf.evaluate.verify import read_sums, verify

    verdict = verify(file, sums=None if sums is None else read_sums(sums), quiet=quiet)
    compared = None
    if model is not None and not verdict.problems:
        from mobe_gguf.export.agreement import agreement

        try:
            compared = agreement(file, model, layers)
        except OSError as e:
            raise MobeError(f"{model}: its first layers cannot be written: {why_not_written(e)}") from e
        verdict.problems += [(str(file), problem) for problem in compared.problems]
        verdict.notes += compared.notes
    if as_json:
        found = {
            "path": str(file),
            "whole": not verdict.problems,
            "files": [str(f) for f in verdict.files],
            "tensors": verdict.n_tensors,
            "bytes": verdict.n_bytes,
            "problems": [{"where": where, "problem": problem} for where, problem in verdict.problems],
            "notes": verdict.notes,
            "sha256": verdict.sums,
        }
        if compared is not None:
            found["layers"] = compared.n_layers
            found["graph_error"] = compared.graph[compared.n_layers]
            found["file_error"] = compared.file[compared.n_layers]
        click.echo(json.dumps(found, indent=2))
    elif not verdict.problems:
        count = f"{len(verdict.files)} files, " if len(verdict.files) > 1 else ""
        sizes = f"{count}{verdict.n_tensors} tensors, {describe_size(verdict.n_bytes)}"
        click.echo(f"{file}: whole: {sizes}{', checksums as expected' if sums else ''}")
    if compared is not None and not as_json and not quiet:
        click.echo(f"{file}: {compared.line()}")
    if not as_json and not quiet:
        for note in verdict.notes:
            click.echo(f"{file}: {note}", err=True)
    if verdict.problems and not as_json:
        for where, problem in verdict.problems:
            click.echo(f"{where}: {problem}" if where != str(file) else f"{file}: {problem}", err=True)
    sys.exit(1 if verdict.problems else 0)
