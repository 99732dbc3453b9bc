"""``mobe-gguf sample``."""

from __future__ import annotations

from pathlib import Path

import click

from mobe_gguf.cli import options
from mobe_gguf.core.errors import UsageError


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.gguf")
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.txt")
@click.option(
    "--tokens", "-n", type=click.IntRange(min=1), default=100_000, show_default=True, metavar="N",
    help="Tokens to write in all.",
)  # fmt: skip
@click.option(
    "--ctx", "-c", type=click.IntRange(min=2), default=512, show_default=True, metavar="N",
    help="Most tokens of a document; the next one begins anew.",
)  # fmt: skip
@click.option(
    "--parallel", "-np", type=click.IntRange(1, 256), default=16, show_default=True, metavar="N",
    help="Documents that are written at once. More are faster and take more memory.",
)  # fmt: skip
@click.option("--temp", type=float, default=1.0, show_default=True, metavar="T", help="Temperature.")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, metavar="N",
    help="Same seed, same text.",
)  # fmt: skip
@options.threads
@options.placement
@options.quiet
def command(
    file: Path,
    out: Path,
    tokens: int,
    ctx: int,
    parallel: int,
    temp: float,
    seed: int,
    threads: int | None,
    gpu_layers: str | None,
    cpu_moe: bool,
    n_cpu_moe: int | None,
    quiet: bool,
) -> None:
    """Sample text from a GGUF file, to calibrate on where text of the kind that the model knows is not at hand.

    Each document begins with a random token and is drawn from the model's own distribution from there on, without control tokens. A file of
    few bits serves as well: of a model that is too large for this machine in full, take one that fits. docs/calibration.md compares
    texts.

    \b
    Example:
      mobe-gguf sample qwen3-q3_k.gguf sampled.txt
      mobe-gguf moments Qwen3-30B-A3B/ moments.safetensors --text sampled.txt

    Exit code 0: done; 1: it failed, and the message says why; 2: wrong usage; 130: stopped, and nothing is written.
    """
    import time

    from mobe_gguf.calibrate.sample import sample_text
    from mobe_gguf.core.files import describe_size
    from mobe_gguf.core.progress import duration, say
    from mobe_gguf.runtime.sample import Sampling

    options.llama_placement(gpu_layers, cpu_moe, n_cpu_moe)
    if gpu_layers == "auto":
        raise UsageError("--gpu-layers auto: sample does not count memory; give a number of layers, or all")
    settings = Sampling(
        tokens, ctx, parallel, temp, seed, threads,
        -1 if gpu_layers in (None, "all") else int(gpu_layers), cpu_moe, n_cpu_moe or 0,
    )  # fmt: skip
    began = time.monotonic()
    found = sample_text(file, out, settings, quiet)
    if not quiet:
        spent = time.monotonic() - began
        say(
            f"{out}: {found.tokens} tokens in {len(found.documents)} documents, {describe_size(out.stat().st_size)}, "
            f"{duration(spent)}. To calibrate on it:\n  mobe-gguf moments MODEL moments.safetensors --text {out}"
        )
