"""``mobe-gguf convert``."""

from __future__ import annotations

from pathlib import Path

import click

from mobe_gguf.cli import options


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.gguf")
@click.option(
    "--outtype", type=click.Choice(["auto", "bf16", "f16", "f32", "q8_0"]), default="auto", show_default=True,
    help="Type of the matrices; auto keeps the source's, in 16 bits.",
)  # fmt: skip
@click.option(
    "--tokenizer-pre", metavar="NAME", help="Name of llama.cpp's pre-tokenizer, if it is not recognized."
)  # fmt: skip
@options.quiet
def command(model: Path, out: Path, outtype: str, tokenizer_pre: str | None, quiet: bool) -> None:
    """Convert a Hugging Face model of any family to a plain GGUF file, by llama.cpp's converter.

    For families that mobe-gguf does not read as directories: plan, compress, moments, factorize and export take the GGUF file. Python
    code out of MODEL is not run. Needs no more memory than its largest tensors, and disk space for OUT.gguf.

    \b
    Examples:
      mobe-gguf convert gpt-oss-20b/ gpt-oss.gguf
      mobe-gguf moments gpt-oss.gguf moments.safetensors
      mobe-gguf factorize gpt-oss.gguf factors/ --moments moments.safetensors

    Exit code 0: done; 1: it failed, and the message says why; 2: wrong usage; 130: stopped.
    """
    from mobe_gguf.core.files import describe_size
    from mobe_gguf.core.progress import say
    from mobe_gguf.evaluate.inspect import describe
    from mobe_gguf.export.hf_to_gguf import convert_model
    from mobe_gguf.models.hub import resolve

    model = resolve(model, quiet)
    convert_model(model, out, outtype, tokenizer_pre, quiet)
    if quiet:
        return
    found = describe(out)
    experts = (
        f"{found.n_expert} experts in {len(found.layers)} layers" if found.layers else "no routed experts"
    )
    say(f"{out}: {found.arch}, {experts}, {describe_size(found.n_bytes)}")
