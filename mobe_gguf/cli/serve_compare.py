"""``mobe-gguf serve-compare``."""

from __future__ import annotations

from pathlib import Path

import click

from mobe_gguf.cli import options


@click.command("serve-compare")
@click.argument("left", type=click.Path(path_type=Path), metavar="A.gguf")
@click.argument("right", type=click.Path(path_type=Path), metavar="B.gguf")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="N",
    help="Port of the page.  [default: a free one]",
)
@click.option(
    "--ctx", "-c", type=click.IntRange(min=64), default=4096, show_default=True, metavar="N",
    help="Tokens that a prompt and its answer may have.",
)  # fmt: skip
@options.threads
@options.placement
@options.quiet
def command(
    left: Path,
    right: Path,
    port: int,
    ctx: int,
    threads: int | None,
    gpu_layers: str | None,
    cpu_moe: bool,
    n_cpu_moe: int | None,
    quiet: bool,
) -> None:
    """Send a prompt to two GGUF files and compare the answers in a browser: differing tokens marked, speeds shown.

    Two llama-servers and a page run on this computer until Ctrl-C; if one of the servers ends, all do. They listen on 127.0.0.1 alone.
    From another computer: ssh -L PORT:127.0.0.1:PORT, then open the page there. Both files must fit into memory together.

    \b
    Examples:
      mobe-gguf serve-compare model-q8_0.gguf mobe-q4_k.gguf
      mobe-gguf serve-compare model-q4_k.gguf mobe-q4_k.gguf --port 8000 -t 8

    Exit code 1: a server failed, and the message says why; 2: wrong usage; 130: stopped.
    """
    from mobe_gguf.core.progress import say
    from mobe_gguf.evaluate.side_by_side import running

    options.check_stdout()
    more = [*options.llama_placement(gpu_layers, cpu_moe, n_cpu_moe), "-c", str(ctx), "-np", "1"]
    more += [] if threads is None else ["-t", str(threads)]
    with running(left, right, port, more) as found:
        click.echo(found.address)
        if not quiet:
            say(f"open {found.address} in a browser; Ctrl-C ends it and both servers")
        found.wait()
