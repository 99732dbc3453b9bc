"""``mobe-gguf moments``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mobe_gguf.cli import options
from mobe_gguf.core.errors import Interrupted


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.safetensors")
@click.option(
    "--text",
    "-f",
    type=click.Path(path_type=Path),
    metavar="FILE",
    required=True,
    help="Plain text of the kind that the model will be used on: some hundred thousand tokens.",
)
@options.ctx
@options.chunks()
@click.option(
    "--rank",
    type=int,
    default=256,
    show_default=True,
    metavar="K",
    help="Directions kept of each expert's moments, the rest as a diagonal: OUT takes 2 n d K bytes a layer.",
)
@options.device
@options.quiet
@options.as_json
def command(model: Path, out: Path, text: Path, device: str, as_json: bool, **settings: object) -> None:
    """Gather what each expert is fed on a text, for `mobe-gguf factorize --moments`.

    MODEL is a Hugging Face model directory; transformers (version 5) runs it over the text, whole, so it must fit into the
    memory of the device. For each expert the second moments of its inputs are summed, weighted by the router: 4 n (d d + p p)
    bytes a layer (n experts, d hidden size, p expert size), as many layers at once as half of the memory left holds. For FP8
    weights transformers wants the package accelerate as well.

    \b
    Example:
      mobe-gguf moments Qwen3-30B-A3B/ moments.safetensors --text calibration.txt --device cuda
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --moments moments.safetensors --for q4_k

    Exit code 0: done; 1: it failed, and the message says why; 2: wrong usage; 130: stopped.
    """
    from mobe_gguf.calibrate.moments import collect
    from mobe_gguf.cli.factorize import check_device

    check_device(device)
    try:
        about = collect(model, text, out, device=device, **settings)  # type: ignore[arg-type]
    except KeyboardInterrupt as e:
        raise Interrupted("stopped; nothing was written") from e
    if as_json:
        click.echo(json.dumps(about | {"file": str(out), "bytes": out.stat().st_size}, indent=2))
