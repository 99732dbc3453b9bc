"""``mobe-gguf ablate``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mobe_gguf.cli import options
from mobe_gguf.core.errors import Interrupted, UsageError


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@options.layers("first, middle, last")
@options.projections
@click.option(
    "--bases",
    metavar="LIST",
    help="Numbers of bases to try, for instance 16,32.  [default: n/8, n/4, n/2 of n experts]",
)
@click.option(
    "--activations",
    metavar="LIST",
    help="Activations to try, of none,silu,tanh, each with n/4 bases.  [default: all]",
)
@click.option(
    "--wide",
    is_flag=True,
    help="Also compare numbers of bases with the ranks that keep the same share of the parameters, with tanh and with none.",
)
@options.steps(100)
@options.imatrix
@click.option(
    "--no-kl", is_flag=True, help="Leave out the KL divergence. Needs no GGUF files and no runtime."
)
@click.option(
    "--text",
    "-f",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Plain text for the KL divergence.  [default: the project's held-out text]",
)
@options.ctx
@options.chunks(16)
@options.threads
@options.device
@options.seed()
@click.option("--no-plot", is_flag=True, help="Draw no figures.")
@options.report
@options.resume
@options.as_json
@options.quiet
def command(
    model: Path,
    out: Path,
    layers: str | None,
    projections: str | None,
    bases: str | None,
    activations: str | None,
    wide: bool,
    steps: int,
    imatrix: str | None,
    no_kl: bool,
    text: Path | None,
    ctx: int,
    chunks: int,
    threads: int | None,
    device: str,
    seed: int,
    no_plot: bool,
    report_to: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Repeat the studies of MoBE's paper on a model: number of bases, activation, error and KL divergence.

    A few layers of MODEL, a Hugging Face directory, are factorized with several numbers of bases and with each activation. OUT
    gets ablation.json and four figures: error against the number of bases, error of each activation, the distribution of values
    before and after it, and KL divergence against error; with --wide a fifth, error over bases and rank at equal parameters. The defaults are a quick look. For the paper's effort, raise --layers
    and --steps.

    The KL divergence needs disk space beside OUT for the whole model as GGUF, original and factorized, one at a time.

    \b
    Examples:
      mobe-gguf ablate model/ study/
      mobe-gguf ablate model/ study/ --layers 0-47 --bases 16,32,48,64 --steps 500 --text wiki.test.raw
      mobe-gguf ablate model/ study/ --no-kl --activations tanh,none
      mobe-gguf ablate model/ study/ --no-kl --wide --imatrix imatrix.gguf

    Exit code 0: done; 1: it failed, and the message says why; 2: wrong usage; 130: stopped.
    """
    from mobe_gguf import runtime
    from mobe_gguf.cli.factorize import check_device
    from mobe_gguf.core.atomic import write_json
    from mobe_gguf.core.layers import parse_layers
    from mobe_gguf.core.workspace import work_directory
    from mobe_gguf.factorize.plan import parse_projections
    from mobe_gguf.models.checkpoint import Checkpoint
    from mobe_gguf.models.hub import resolve
    from mobe_gguf.studies import ablate
    from mobe_gguf.studies.ablate import report
    from mobe_gguf.studies.ablate.study import finish, summary

    check_device(device)
    if report_to is not None:
        from mobe_gguf.evaluate.page import check as check_page

        check_page(report_to)
    if not no_plot:
        from mobe_gguf.evaluate.plot import check
        from mobe_gguf.studies.ablate.plot import plot

        check(out.absolute().with_name("figure.png"))
    if not no_kl:
        runtime.tool("llama-perplexity")
    model = resolve(model, quiet)
    checkpoint = Checkpoint(model)
    asked = ablate.Asked(
        layers=None if layers is None else parse_layers(layers),
        projections=None if projections is None else parse_projections(projections),
        bases=None if bases is None else _numbers(bases),
        activations=None if activations is None else tuple(part.strip() for part in activations.split(",")),
        steps=steps,
        seed=seed,
        imatrix=imatrix,
        text=text,
        ctx=ctx,
        chunks=chunks,
        divergence=not no_kl,
        wide=wide,
    )
    study = ablate.settle(checkpoint, asked)
    try:
        rows = ablate.run(model, out, study, device=device, threads=threads, resume=resume, quiet=quiet)
    except KeyboardInterrupt as e:
        work = work_directory(out)
        raise Interrupted(f"stopped. What was measured is kept in {work}; run again with --resume.") from e
    found = summary(checkpoint, study, rows)
    if not no_plot:
        plot(study, rows, work_directory(out))
    write_json(work_directory(out) / "ablation.json", found)
    finish(out)
    if report_to is not None:
        from mobe_gguf.studies.ablate.page import of_study

        options.write_report(of_study(model, out, study, rows), report_to, quiet)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    from mobe_gguf.core.progress import VERBATIM

    Console(highlight=False, width=100, **VERBATIM).print(report.table(study, rows))


def _numbers(text: str) -> tuple[int, ...]:
    """``"16,32"`` -> (16, 32)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise UsageError(f"--bases {text}: expected whole numbers, as 16,32,64") from e
