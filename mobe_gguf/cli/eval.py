"""``mobe-gguf eval``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mobe_gguf.cli import options
from mobe_gguf.core.errors import Interrupted, MobeError, UsageError

if TYPE_CHECKING:  # imports that take their time
    from mobe_gguf.evaluate import EvalSettings, Row
    from mobe_gguf.evaluate.facts import Facts


@click.command()
@click.argument("reference", type=click.Path(path_type=Path), metavar="REFERENCE.gguf")
@click.argument("files", type=click.Path(path_type=Path), metavar="FILE.gguf...", nargs=-1, required=True)
@click.option(
    "--text",
    "-f",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Plain text to predict.  [default: the project's held-out text, which is meant for its tiny model alone]",
)
@options.ctx
@options.chunks()
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Plot KL divergence against file size.",
)
@options.report
@click.option(
    "--moments", type=click.Path(path_type=Path), metavar="FILE",
    help="Second moments from `mobe-gguf moments`. The report then shows output errors, and the tokens that each expert saw.",
)  # fmt: skip
@click.option(
    "--card", is_flag=True, help="Add each FILE's results to the README.md that export wrote beside it."
)
@click.option(
    "--experts",
    is_flag=True,
    help="Also the share of tokens that are sent to the same experts as in REFERENCE. All files run once more, on the CPU.",
)
@click.option(
    "--keep-logits",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep REFERENCE's predictions, as llama-perplexity --kl-divergence-base writes them.",
)
@options.threads
@options.placement
@options.as_json
@options.quiet
def command(
    reference: Path,
    files: tuple[Path, ...],
    text: Path | None,
    ctx: int,
    chunks: int | None,
    plot: Path | None,
    report_to: Path | None,
    moments: Path | None,
    card: bool,
    experts: bool,
    keep_logits: Path | None,
    threads: int | None,
    gpu_layers: str | None,
    cpu_moe: bool,
    n_cpu_moe: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the predictions of GGUF files with the original model's.

    REFERENCE is the original, quantized as little as the machine can run. Each FILE is a GGUF file with the same vocabulary, plain
    or MoBE. llama-perplexity runs REFERENCE once over the text, then every FILE. The result is the KL divergence (mean with
    standard error, percentiles), how often both predict the same token, perplexities and sizes. The second half of each chunk is
    evaluated.

    REFERENCE's predictions go to a temporary file in TMPDIR, 2 bytes for each evaluated token and entry of the vocabulary: 77 MB
    for a chunk of 512 tokens and a vocabulary of 150,000.

    \b
    Examples:
      mobe-gguf eval model-bf16.gguf model-q4_k_m.gguf mobe-q4_k.gguf --text wiki.test.raw --chunks 100
      mobe-gguf eval model-q8_0.gguf *.gguf --text book.txt --plot kl.png --json > kl.json
      mobe-gguf eval model-bf16.gguf mobe-q4_k.gguf --text wiki.test.raw --card
      mobe-gguf eval model-bf16.gguf mobe-q4_k.gguf model-q3_k.gguf --text wiki.test.raw --report mobe.html

    Exit code 0: done; 1: it failed, and the message says why (files done before are still shown); 2: wrong usage; 130: stopped.
    """
    from mobe_gguf.core.progress import console
    from mobe_gguf.evaluate import EvalSettings, compare, facts_of, heldout

    options.check_stdout()
    if plot is not None:
        from mobe_gguf.evaluate.plot import check

        check(plot)
    if moments is not None and report_to is None:
        raise UsageError("--moments is for the page of --report; name that, or leave --moments out")
    known = options.check_report(report_to, moments)
    if card:
        _check_cards(files)
    placement = options.llama_placement(gpu_layers, cpu_moe, n_cpu_moe)
    settings = EvalSettings(ctx, chunks, threads, placement, experts)
    if text is None:
        text = heldout()
        if not quiet:
            remark = "the project's held-out text; for any model but its tiny one, name a text with --text"
            console.print(f"{text.name}: {remark}", highlight=False, soft_wrap=True)
    rows: list[Row] = []
    failure: MobeError | None = None
    try:
        compare(reference, files, text, settings, keep_logits=keep_logits, quiet=quiet, on_row=rows.append)
    except KeyboardInterrupt:
        failure = Interrupted(f"stopped; {len(rows)} of {len(files)} files were done")
    except MobeError as e:
        failure = e
    if rows:
        facts = facts_of(reference)
        _show(facts, rows, text, settings, as_json)
        if card:
            _note(facts, rows, text, quiet)
    if failure is not None:
        raise failure
    if plot is not None:
        _plot(rows, plot, quiet)
    if report_to is not None:
        from mobe_gguf.evaluate.page import of_eval

        options.write_report(of_eval(facts_of(reference), rows, text, settings, known), report_to, quiet)


def _check_cards(files: tuple[Path, ...]) -> None:
    """MobeError if no file has a card; called before anything is computed."""
    from mobe_gguf.export.card import card_of

    if not any(map(card_of, files)):
        raise MobeError(
            f"--card: beside {files[0]} is no README.md that mobe-gguf export wrote, that nobody changed and that has a line on "
            "it; leave --card out, or export it again"
        )


def _note(reference: Facts, rows: Sequence[Row], text: Path, quiet: bool) -> None:
    from mobe_gguf.core.progress import console
    from mobe_gguf.evaluate import report
    from mobe_gguf.export.card import card_of, note

    for row in rows:
        path = card_of(row.facts.path)
        if path is not None:
            note(path, row.facts.path, report.sentence(reference, row, text))
        if not quiet:
            said = f"noted in {path}" if path else "has no card"
            console.print(f"{row.facts.path}: {said}", highlight=False, soft_wrap=True)


def _show(reference: Facts, rows: Sequence[Row], text: Path, settings: EvalSettings, as_json: bool) -> None:
    from rich.console import Console

    from mobe_gguf.core.progress import VERBATIM
    from mobe_gguf.evaluate import report

    if as_json:
        click.echo(json.dumps(report.as_json(reference, rows, text, settings), indent=2, allow_nan=False))
        return
    out = Console(highlight=False, **VERBATIM)
    width = out.width if sys.stdout.isatty() else None
    out.width = width or 1000  # names are not wrapped in a pipe
    out.print(report.table(reference, rows, text, settings, width))


def _plot(rows: Sequence[Row], path: Path, quiet: bool) -> None:
    from mobe_gguf.core.progress import console
    from mobe_gguf.evaluate.plot import plot

    left_out = plot(rows, path)
    if not quiet:
        why = "".join(
            f"; without {row.facts.path.name}, whose KL divergence is no positive number" for row in left_out
        )
        console.print(f"{path}: written{why}", highlight=False, soft_wrap=True)
