"""``mobe-gguf reconstruct``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from mobe_gguf.cli import options
from mobe_gguf.cli.wab import wab_files, wab_options
from mobe_gguf.core.progress import console


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "f16", "f32"]),
    help="Type of all matrices.  [default: config.json's for the experts; other tensors keep theirs]",
)
@click.option(
    "--max-shard-size",
    default="5G",
    show_default=True,
    metavar="SIZE",
    help="Largest size of a safetensors file (5G, 500M; powers of ten).",
)
@wab_options
@options.dry_run
@options.as_json
@options.quiet
def command(
    model: Path,
    out: Path,
    dtype: str | None,
    max_shard_size: str,
    wab: tuple[Path, ...],
    activation: str | None,
    wab_layers: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Multiply the MoBE checkpoint MODEL out into an ordinary model directory, for transformers, vLLM or lm-eval.

    MODEL may be an id on the Hugging Face hub. OUT has the original's architecture and size; the factors' errors remain. Experts
    are computed one after the other. An interrupted run resumes at the unfinished shard. OUT appears when it is whole.

    \b
    Examples:
      mobe-gguf reconstruct mobe/ dense/
      mobe-gguf reconstruct original/ dense/ --wab trained/ --activation silu
    """
    from mobe_gguf.core.errors import Interrupted
    from mobe_gguf.core.files import amount, describe_size, parse_size
    from mobe_gguf.export.reconstruct import open_factors, reconstruct_model
    from mobe_gguf.export.shards import left_by
    from mobe_gguf.models.hub import resolve

    size = parse_size(max_shard_size, "--max-shard-size")
    said = wab_files(wab, activation, wab_layers)
    model = resolve(model, quiet)
    checkpoint = open_factors(model, said)
    try:
        result = reconstruct_model(
            checkpoint, out, dtype=dtype, max_shard_size=size, dry_run=dry_run, quiet=quiet
        )
    except KeyboardInterrupt as e:
        raise Interrupted(f"stopped; {left_by(out, 'finished shards are')}") from e
    if not quiet:
        done = "would be written" if dry_run else f"written in {result.seconds:.1f} s"
        kept = f", {result.files_kept} files kept from an interrupted run" if result.files_kept else ""
        lines = [*(f"note: {note}" for note in result.notes)]
        lines.append(
            f"{out}: {result.architecture}, {result.n_experts} experts in {result.dtype}, {amount(result.n_params)} "
            f"parameters, {describe_size(result.n_bytes)} in {len(result.files)} files {done}{kept}"
        )
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
