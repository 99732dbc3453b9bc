"""``mobe-gguf factorize``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mobe_gguf.cli import options
from mobe_gguf.core.errors import Interrupted, UsageError
from mobe_gguf.core.names import ACTIVATIONS


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--bases",
    type=click.IntRange(min=1),
    metavar="M",
    help="Basis matrices of a layer.  [default: a quarter of the experts]",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="R",
    help="Rows of a basis.  [default: rows of an expert's gate; d/2 if those are more than d]",
)
@click.option(
    "--target",
    metavar="SHARE|SIZE",
    help="Instead of --bases: the share of the parameters to keep, as 0.75, or with --quant the size of the GGUF file, as "
    "12.5GB (powers of ten). Bases (and rank) of each layer and projection follow from short fits: more where they take off "
    "more error.",
)
@click.option("--quant", metavar="TYPE", help="With --target SIZE: what export will be given as --quant.")
@click.option(
    "--method",
    type=click.Choice(["mobe", "svd", "molae", "d2moe"]),
    help="mobe, or one that it is compared with, at as many parameters: each expert's own SVD, one latent basis for all "
    "(MoLAE), a shared base and low-rank differences (D2-MoE).  [default: mobe]",
)
@click.option(
    "--groups",
    type=click.IntRange(min=1),
    metavar="G",
    help="Groups of experts, each with its own M/G bases.  [default: 1]",
)
@click.option(
    "--activation",
    type=click.Choice(sorted(ACTIVATIONS)),
    help="Function on the mixed bases. 'none' is cheapest to run: a token's experts share the products of the bases with it, if "
    "--mix is scalar and --groups 1.  [default: tanh]",
)
@click.option(
    "--mix",
    type=click.Choice(["scalar", "row"]),
    help="One coefficient for each expert and basis, or one for each row of the basis.  [default: scalar]",
)
@click.option(
    "--mix-terms",
    type=click.IntRange(min=1),
    metavar="S",
    help="Bases that an expert mixes at most: fewer run faster where not all experts are in use, on CPUs above all. Fitted "
    "with --moments and --for, 2 terms of 6 cost the shipped model 3 % of its layer error.  [default: all]",
)
@options.steps(500, unset=True)
@click.option(
    "--objective",
    type=click.Choice(["mse", "activation"]),
    help="Error of the matrices, or of their outputs on the inputs that --moments or --imatrix saw.  "
    "[default: activation with one of these, else mse]",
)
@options.imatrix
@click.option(
    "--moments",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="File of `mobe-gguf moments` for the original model: gate and up are fitted to what each expert is fed, far "
    "better than by --imatrix.",
)
@click.option(
    "--for",
    "for_both",
    metavar="TYPE",
    help="ggml type that the factors will be exported in, as q4_k: they are fitted so that rounding costs little.",
)
@click.option("--for-basis", metavar="TYPE", help="The same for the bases alone.  [default: that of --for]")
@click.option("--for-transform", metavar="TYPE", help="The same for the A's alone.  [default: that of --for]")
@options.layers("all")
@options.projections
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16"]),
    help="Type of the factors on disk.  [default: MODEL's own]",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="cpu, cuda or cuda:N; or several, as cuda:0,cuda:1, each with a process of its own that takes one unit (layer and "
    "projection) after the other.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Fit the units on a Ray cluster: HOST:PORT, auto (the one that runs here) or local (one of this machine alone); "
    "--device is cpu or cuda then. All machines must have mobe-gguf[ray] and see MODEL and OUT under the same paths.",
)
@options.seed(unset=True)
@options.resume
@options.dry_run
@click.option("-v", "--verbose", is_flag=True, help="Print the plan before the work.")
@options.quiet
@options.as_json
def command(
    model: Path,
    out: Path,
    layers: str | None,
    projections: str | None,
    target: str | None,
    quant: str | None,
    for_both: str | None,
    for_basis: str | None,
    for_transform: str | None,
    device: str,
    ray: str | None,
    resume: bool,
    dry_run: bool,
    verbose: bool,
    quiet: bool,
    as_json: bool,
    **settings: object,
) -> None:
    """Replace the gate and up matrices of a MoE's experts by shared bases.

    MODEL is a Hugging Face model directory (config.json, safetensors); OUT becomes a MoBE checkpoint of the same
    kind, to be written as GGUF by `mobe-gguf export`. Or a GGUF file of any MoE (of a split one the first): OUT then
    has the factors alone, and `mobe-gguf export` puts them back into that file. Or the id of such a model on the
    Hugging Face hub, ORG/NAME, which is downloaded (also for --dry-run). Each expert's matrix W becomes A f(sum of
    alpha B): A is the expert's own, the M bases B are shared. Kept of gate and up: R/d + M/n (d: hidden size, n:
    experts).

    Finished units stay in OUT.work until OUT is whole, so a stopped job costs at most one unit: run the same command
    with --resume.

    \b
    Examples:
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --dry-run       what would come out
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --device cuda
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --device cuda:0,cuda:1
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --device cuda --ray head-node:6379
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --resume        after a kill
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --imatrix imatrix.gguf
      mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --moments moments.safetensors --for q4_k
      mobe-gguf factorize model/ mobe/ --target 0.6 --imatrix imatrix.gguf
      mobe-gguf factorize model/ mobe/ --target 12.5GB --quant q4_k --imatrix imatrix.gguf
      mobe-gguf factorize model/ svd/ --method svd --target 0.6
      mobe-gguf factorize model/ mobe/ --bases 48 --layers 4-47 --steps 1000
      mobe-gguf factorize model-q8_0.gguf factors/
      mobe-gguf factorize hf:org/name@revision mobe/

    Exit code 0: done; 1: it failed, and the message says why; 2: wrong usage; 130: stopped.
    """
    from mobe_gguf.core.layers import parse_layers
    from mobe_gguf.core.progress import console
    from mobe_gguf.factorize import job as jobs
    from mobe_gguf.factorize import plan, report
    from mobe_gguf.factorize.expected import expected_time
    from mobe_gguf.factorize.target import parse_target
    from mobe_gguf.factorize.workers import Place
    from mobe_gguf.models.hub import resolve
    from mobe_gguf.quant.recipe import parse_quant

    asked = plan.Options(
        layers=None if layers is None else parse_layers(layers),
        projections=None if projections is None else plan.parse_projections(projections),
        target=None if target is None else parse_target(target),
        quant=None if quant is None else parse_quant(quant),
        for_basis=_type("--for-basis", for_basis) or _type("--for", for_both),
        for_transform=_type("--for-transform", for_transform) or _type("--for", for_both),
        **settings,
    )
    place = Place.of(device, ray)
    if ray is None:
        for name in place.devices:
            check_device(name)
    job = jobs.prepare(resolve(model, quiet), out, asked, resume=resume, predict=_predict)
    if job.plan.shed <= 0 and not quiet:
        kept = job.plan.projected_after / job.plan.projected_before
        console.print(
            f"warning: the factors have {kept:.1%} of the parameters that they replace; choose a smaller --rank or "
            "fewer --bases",
            **report.PLAIN,
        )
    if job.moments_of_another and not quiet:
        console.print(
            f"warning: {settings['moments']} was made from another model than {model}, or another copy of it: what its "
            "experts are fed may differ; mobe-gguf moments makes such a file for this one",
            **report.PLAIN,
        )
    if not quiet:
        report.print_types(job, console)
    if dry_run:
        if as_json:
            time = {"time": expected_time(job, device)} if ray is None else {}
            click.echo(json.dumps(report.plan_json(job) | time, indent=2))
        elif not quiet:
            report.print_plan(job, console)
            if ray is None:  # a trial here says nothing of machines elsewhere
                report.print_time(job, device, console)
        return
    if verbose and not quiet:
        report.print_plan(job, console)
    try:
        result = jobs.run(job, device=device, quiet=quiet, ray=ray)
    except KeyboardInterrupt as e:
        kept = f"Finished units are kept in {job.work}; run again with --resume."
        raise Interrupted(f"stopped. {kept if job.work.exists() else 'No unit was finished.'}") from e
    if as_json:
        click.echo(json.dumps(report.result_json(result), indent=2))
    elif not quiet:
        report.print_result(result, console)


def _type(option: str, text: str | None) -> str | None:
    """A ggml type's name as the recipe spells it."""
    from mobe_gguf.quant.recipe import parse_type

    return text and parse_type(option, text)


def check_device(device: str) -> None:
    """UsageError unless torch can compute on ``device``."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UsageError(f"--device {device} cannot be used: {reason}. Expected cpu, cuda or cuda:N.") from e


def _predict(*args: Any, **form: Any) -> Any:
    """``export.predict``, imported only where a target in bytes asks for it."""
    from mobe_gguf.export.predict import predict

    return predict(*args, **form)
