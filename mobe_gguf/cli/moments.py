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
    "texts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Text of the kind that the model will be used on, some hundred thousand tokens. Plain text, or .jsonl with one chat a "
    "line, to which the model's chat template is applied. Repeatable.  [default: models/calibration of this "
    "project: prose, documentation, code, dialogue, mathematics, many languages]",
)
@options.ctx
@options.chunks()
@options.keep
@click.option(
    "--rank",
    type=int,
    metavar="K",
    help="Keep K directions instead, and all of down's inputs. OUT takes 2 n d K bytes a layer for n experts with d inputs.",
)
@options.gradients
@options.memory
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="cpu, cuda, cuda:N, or several, as cuda:0,cuda:1, which share the text.",
)
@options.ray
@options.resume
@options.quiet
@options.as_json
def command(
    model: Path,
    out: Path,
    texts: tuple[Path, ...],
    memory: str | None,
    device: str,
    ray: str | None,
    quiet: bool,
    as_json: bool,
    **settings: object,
) -> None:
    """Run a text through MODEL and sum the second moments of every matrix's inputs, for `--moments` of factorize and export.

    MODEL is a Hugging Face model directory, or a GGUF file (llama.cpp runs it if it is not of qwen3moe or qwen2moe). transformers
    (version 5) runs one layer at a time, so the model need not fit into memory. One layer must. If its experts do not, they are read one
    after the other. FP8 and GGUF weights are dequantized. The router weighs the inputs of experts, with --gradients the loss does too.
    Finished layers stay in OUT.work, with the states of all tokens after the last of them (2 bytes a token and channel). --resume
    continues from there. docs/calibration.md has memory and time by model.

    \b
    Example:
      mobe-gguf moments Qwen3-30B-A3B/ moments.safetensors --text calibration.txt --text chats.jsonl --memory 16G
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --moments moments.safetensors --for q4_k

    Exit code 0: done; 1: it failed, and the message says why; 2: wrong usage; 130: stopped.
    """
    from mobe_gguf.calibrate.moments import collect, report
    from mobe_gguf.cli.factorize import check_devices
    from mobe_gguf.core.files import parse_size

    check_devices(device, ray)
    budget = None if memory is None else parse_size(memory, "--memory")
    try:
        about = collect(model, texts, out, device=device, ray=ray, memory=budget, quiet=quiet, **settings)  # type: ignore[arg-type]
    except KeyboardInterrupt as e:
        raise Interrupted("stopped; finished layers are kept, --resume continues") from e
    if as_json:
        click.echo(json.dumps(about | {"file": str(out), "bytes": out.stat().st_size}, indent=2))
    elif not quiet:
        click.echo(report(about, out), err=True)
