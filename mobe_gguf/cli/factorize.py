"""``mobe-gguf factorize``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobe_gguf.cli import options
from mobe_gguf.core.errors import Interrupted, UsageError
from mobe_gguf.core.names import ACTIVATIONS
from mobe_gguf.factorize.methods import METHODS

if TYPE_CHECKING:
    from mobe_gguf.factorize.spec import Options


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--bases",
    type=click.IntRange(min=1),
    metavar="M",
    help="Basis matrices in a layer.  [default: 4 or fewer; see --published]",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="R",
    help="Rows of a basis, 1 to d.  [default: see --published]",
)
@click.option(
    "--published",
    is_flag=True,
    help="The MoBE paper's form: n/4 bases of n experts, as many rows as an expert's gate has (d/2 if that is more than d), tanh. Any "
    "other option of the form changes this one. Without such options, a few bases with more rows keep as many parameters, without "
    "activation, which decodes faster.",
)
@click.option(
    "--target",
    metavar="SHARE|SIZE",
    help="Instead of --bases: the share of the factorized matrices' parameters to keep (0.75), or, with --quant, the size of the GGUF file (12.5GB; "
    "powers of ten). Short fits choose the bases and the rank of each layer and projection: more where they reduce the error "
    "more.",
)
@click.option(
    "--placement",
    type=click.Choice(["cpu", "gpu", "hybrid"]),
    help="Choose bases, rank and types for a machine, by arithmetic: the fastest that fits. hybrid: bases on the GPU, experts in system memory "
    "(llama.cpp's --cpu-moe). With --target SHARE, among the sizes that keep this share.",
)
@options.ram
@options.vram
@options.bandwidth
@options.vram_bandwidth
@click.option("--quant", metavar="TYPE", help="With --target SIZE: the --quant that export will get.")
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    help="mobe, or a method to compare it with at as many parameters: an SVD of each expert (svd), one basis for all (molae), "
    "or a shared matrix with low-rank differences (d2moe).  [default: mobe]",
)
@options.groups
@click.option(
    "--activation",
    type=click.Choice(sorted(ACTIVATIONS)),
    help="Function on the mixed bases. 'none' is the fastest to run, with --mix scalar and --groups 1: a token's experts then "
    "share the products with the bases.  [default: see --published]",
)
@options.mix
@options.mix_terms
@options.steps(500, unset=True)
@click.option(
    "--objective",
    type=click.Choice(["mse", "activation"]),
    help="What to minimize: the error of the weights (mse), or of the outputs on the inputs that --moments or --imatrix saw "
    "(activation).  [default: activation with one of these, else mse]",
)
@options.imatrix
@click.option(
    "--moments",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Second moments of the original model's inputs, from `mobe-gguf moments`. Fits the factors to each expert's own inputs, far better "
    "than --imatrix.",
)
@click.option(
    "--for",
    "for_both",
    metavar="TYPE",
    help="ggml type that the factors will be exported in, for instance q4_k. Rounding to it then costs little.",
)
@click.option("--for-basis", metavar="TYPE", help="The type of the bases alone.  [default: that of --for]")
@click.option(
    "--for-transform", metavar="TYPE", help="The type of the transforms A alone.  [default: that of --for]"
)
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
    help="cpu, cuda, cuda:N, or several (cuda:0,cuda:1). Each device gets a process, which fits one unit (one projection of "
    "one layer) after the other.",
)
@options.ray
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
    published: bool,
    placement: str | None,
    ram: str | None,
    vram: str | None,
    bandwidth: str | None,
    vram_bandwidth: str | None,
    resume: bool,
    dry_run: bool,
    verbose: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Replace the gate and up matrices of a MoE's experts by shared bases.

    Each expert's matrix W becomes A f(sum of alpha B). Every expert has its own A; the M bases B are shared. Of the gate and up
    parameters R/d + M/n remain (d: hidden size, n: experts).

    MODEL is one of three things. A Hugging Face directory (config.json, safetensors): OUT becomes a MoBE checkpoint, which
    `mobe-gguf export` writes as GGUF. A GGUF file of any MoE (the first file of a split one): OUT holds the factors alone, and
    `mobe-gguf export` puts them back into that file. An id on the Hugging Face hub, ORG/NAME: it is downloaded, also for --dry-run.
    A config.json alone is enough for --dry-run.

    Finished units stay in OUT.work until OUT is whole. A stopped job loses at most one unit: run the same command with --resume.

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
      mobe-gguf factorize DeepSeek-V3/ mobe/ --placement hybrid --vram 24G --ram 512G
      mobe-gguf factorize model/ svd/ --method svd --target 0.6
      mobe-gguf factorize model/ mobe/ --bases 48 --layers 4-47 --steps 1000
      mobe-gguf factorize model-q8_0.gguf factors/
      mobe-gguf factorize hf:org/name@revision mobe/

    Exit code 0: done; 1: it failed, and the message says why; 2: wrong usage; 130: stopped.
    """
    from mobe_gguf.core.layers import parse_layers
    from mobe_gguf.core.progress import console
    from mobe_gguf.export.rehearsal import rehearse
    from mobe_gguf.factorize import job as jobs
    from mobe_gguf.factorize import plan, report
    from mobe_gguf.factorize.expected import expected_time
    from mobe_gguf.factorize.spec import Options
    from mobe_gguf.factorize.target import parse_goal
    from mobe_gguf.models.hub import resolve
    from mobe_gguf.quant.recipe import parse_quant

    asked = Options(
        layers=None if layers is None else parse_layers(layers),
        projections=None if projections is None else plan.parse_projections(projections),
        target=None if target is None else parse_goal(target),
        quant=None if quant is None else parse_quant(quant),
        for_basis=_type("--for-basis", for_basis) or _type("--for", for_both),
        for_transform=_type("--for-transform", for_transform) or _type("--for", for_both),
        wide=not published,
        **settings,
    )
    if placement:
        memory = (ram, vram, bandwidth, vram_bandwidth)
        asked = _placed(model, asked, placement, memory, quiet)
    elif ram or vram or bandwidth or vram_bandwidth:
        raise UsageError(
            "--ram, --vram, --bandwidth and --vram-bandwidth are for --placement; give that, too"
        )
    if dry_run and _planned_bare(model, out, asked, None if ray else device, as_json, quiet):
        return
    check_devices(device, ray)
    job = jobs.prepare(resolve(model, quiet), out, asked, resume=resume, predict=_predict, dry=dry_run)
    plan.check_saving(job.settings, job.checkpoint)
    notes = rehearse(job.checkpoint) if job.settings.how.is_factors else []
    if job.moments_of_another and not quiet:
        console.print(
            f"warning: {settings['moments']} was made from another model than {model}, or another copy of it: what its "
            "experts are fed may differ; mobe-gguf moments makes such a file for this one",
            **report.PLAIN,
        )
    if not quiet:
        for line in [*report.cautions(job), *(f"warning: {note}" for note in notes)]:
            console.print(line, **report.PLAIN)
        report.print_types(job, console)
    if dry_run:
        if as_json:
            time = {"time": expected_time(job, device)} if ray is None else {}
            click.echo(json.dumps(report.plan_json(job) | time, indent=2))
        elif not quiet:
            report.print_plan(job, console)
            if ray is None:  # a trial on this machine says nothing about other machines
                report.print_time(job, device, console)
        return
    if verbose and not quiet:
        report.print_plan(job, console)
    try:
        result = jobs.run(job, device=device, quiet=quiet, ray=ray)
    except KeyboardInterrupt as e:
        units = f"Finished units are kept in {job.work}; run again with --resume."
        raise Interrupted(f"stopped. {units if job.work.exists() else 'No unit was finished.'}") from e
    if as_json:
        click.echo(json.dumps(report.result_json(result), indent=2))
    elif not quiet:
        report.print_result(result, console, settings.get("moments"))


def _planned_bare(
    model: Path, out: Path, asked: Options, device: str | None, as_json: bool, quiet: bool
) -> bool:
    """``--dry-run`` for a config.json alone.  ``device``: None for a cluster, whose time is not known.  False if the model has
    weights."""
    from mobe_gguf.core.progress import console
    from mobe_gguf.factorize import job as jobs
    from mobe_gguf.factorize import plan, report
    from mobe_gguf.factorize.expected import expected_time
    from mobe_gguf.plan.hollow import hollow, is_bare

    if not is_bare(model):
        return False
    with hollow(model) as made:
        job = jobs.prepare(made, out, asked, dry=True)
        plan.check_saving(job.settings, job.checkpoint)
        if as_json:
            time = {"time": expected_time(job, device)} if device else {}
            click.echo(json.dumps(report.plan_json(job) | time, indent=2))
        elif not quiet:
            report.print_plan(job, console)
            if device:
                report.print_time(job, device, console)
    return True


def _placed(
    model: Path, asked: Options, placement: str, memory: tuple[str | None, ...], quiet: bool
) -> Options:
    """``asked`` with the sizes and types that suit the machine."""
    from mobe_gguf.core.progress import console
    from mobe_gguf.factorize import report
    from mobe_gguf.factorize.placement import choose, hardware
    from mobe_gguf.models.hub import resolve
    from mobe_gguf.models.original import open_original
    from mobe_gguf.plan.hollow import hollow, is_bare

    machine = hardware(placement, *memory)
    with hollow(model) if is_bare(model) else nullcontext(resolve(model, quiet, headers_only=True)) as path:
        options, placed = choose(open_original(path), machine, asked)
    if not quiet:
        console.print(f"--placement {placement}: {placed.line()}", **report.PLAIN)
    return options


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


def check_devices(device: str, ray: str | None) -> None:
    """UsageError unless ``device`` is valid and torch can compute on all of it; a cluster's workers have their own."""
    from mobe_gguf.core.executors import Place

    place = Place.of(device, ray)
    for name in place.devices if ray is None else ():
        check_device(name)


def _predict(*args: Any, **form: Any) -> Any:
    """``export.predict``, imported only where a target in bytes asks for it."""
    from mobe_gguf.export.predict import predict

    return predict(*args, **form)
