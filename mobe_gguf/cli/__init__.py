"""The ``mobe-gguf`` command.  Each subcommand is a module, imported only when it is used."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import click

from mobe_gguf import __version__
from mobe_gguf.core.errors import Interrupted
from mobe_gguf.core.files import check_name

#: Subcommand -> one line of help, in the order of use.  The module of the same name holds ``command``.
COMMANDS = {
    "build": "Get, patch, compile and install the llama.cpp runtime.",
    "plan": "Show what fits this machine, how good and how fast: plain and factorized files.",
    "compress": "Make the best GGUF file of a size: calibrate, fit, round, write, verify, measure.",
    "convert": "Convert a Hugging Face model of any family to a plain GGUF file.",
    "sample": "Sample text from a GGUF file, to calibrate on.",
    "moments": "Run a text through a model and sum the second moments of its inputs.",
    "factorize": "Turn a MoE checkpoint into MoBE factors.",
    "export": "Write a MoBE checkpoint as a GGUF file.",
    "reconstruct": "Write a MoBE checkpoint as an ordinary model directory.",
    "inspect": "Show what a model directory or GGUF file holds.",
    "verify": "Check a GGUF file: structure, shapes, finite values.",
    "eval": "Compare GGUF files with the original: KL divergence, perplexity, size.",
    "serve-compare": "Send a prompt to two GGUF files and compare the answers in a browser.",
    "ablate": "Repeat the paper's studies on a model: bases, activations, error and KL divergence.",
    "demo": "Run the whole path on the tiny model that ships with the project.",
}


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C within the block; otherwise it would end the program at once and leave unfinished files
    behind."""
    before = signal.getsignal(signal.SIGTERM)
    ours = threading.current_thread() is threading.main_thread() and before not in (signal.SIG_IGN, None)
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


class LazyGroup(click.Group):
    """Loads a command's module only when it is called, so that ``--help`` does not wait for torch.

    A command ended by Ctrl-C or SIGTERM has exit code 130; one that can say what is kept raises Interrupted itself.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for arg in args:
            check_name(arg)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _terminable():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as e:
                raise Interrupted("stopped") from e

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"mobe_gguf.cli.{name.replace('-', '_')}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mobe-gguf")
def main() -> None:
    """Compress mixture-of-experts models into shared bases and run them with llama.cpp.

    \b
    A first run:
      mobe-gguf build                                  get and compile the runtime
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/         fit the factors
      mobe-gguf export mobe/ out.gguf --quant q4_k     write them as GGUF
      llama-cli -m out.gguf                            run

    Exit code 0: done; 1: it failed, and the message says why; 2: wrong usage; 130: stopped by Ctrl-C or SIGTERM.
    """
