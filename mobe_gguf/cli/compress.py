"""``mobe-gguf compress``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobe_gguf.cli import options
from mobe_gguf.core.errors import Interrupted, UsageError
from mobe_gguf.core.files import parse_size

if TYPE_CHECKING:  # imports that take their time
    from mobe_gguf.compress.pipeline import Compression, Result

#: Options that name a type, and the field of ``Wishes`` that each sets.
TYPES = {
    "--basis-type": "basis_type",
    "--transform-type": "transform_type",
    "--down-type": "down_type",
    "--output-tensor-type": "output_type",
    "--token-embedding-type": "embedding_type",
}
#: Options that a plan replaces.
PLANNED = ("form", "quant", "bases", "rank", "target", "basis_type", "transform_type")


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.gguf")
@click.option("--size", metavar="SIZE", help="Largest file, for instance 80G (powers of ten).")
@click.option("--bpw", type=float, metavar="BITS", help="The same, in bits for each weight of the original.")
@click.option(
    "--form",
    type=click.Choice(["auto", "plain", "mobe"]),
    default="auto",
    show_default=True,
    help="Form of the file. auto makes a plain one and, where it may pay, a factorized one, measures both and keeps the better.",
)
@click.option(
    "--quant", metavar="TYPE", help="Types of the file, by llama-quantize's name, instead of --size."
)
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Make the best file of a plan (mobe-gguf plan MODEL --json > FILE), instead of --size and the options of its form.",
)  # fmt: skip
@click.option(
    "--plan-form", metavar="NAME", help="The form of the plan that is made, instead of its best that fits."
)
@click.option(
    "--text", "-f", "texts", type=click.Path(path_type=Path, exists=True), multiple=True, metavar="FILE",
    help="Text to calibrate with. Repeatable.  [default: the text that ships with the program]",
)  # fmt: skip
@click.option(
    "--eval-text", type=click.Path(path_type=Path, exists=True), metavar="FILE",
    help="Text to measure on, none of --text.  [default: the held-out text that ships with the program]",
)  # fmt: skip
@click.option(
    "--chunks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Chunks of the text to use.  [default: all]",
)
@click.option(
    "--eval-chunks",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Chunks to measure on.",
)
@click.option(
    "--bases",
    type=click.IntRange(min=1),
    metavar="M",
    help="Basis matrices in a layer.  [default: chosen by size]",
)
@click.option(
    "--rank", type=click.IntRange(min=1), metavar="R", help="Rows of a basis.  [default: chosen by size]"
)
@click.option(
    "--activation",
    type=click.Choice(["none", "tanh", "silu"]),
    help="Function on the mixed bases.  [default: none]",
)
@click.option(
    "--target", metavar="SHARE",
    help="Instead of --bases: the share of the factorized matrices' parameters to keep (0.75). Short fits choose the bases and the rank of "
    "each layer and projection: more where they reduce the error more.",
)  # fmt: skip
@options.groups
@options.mix
@options.mix_terms
@options.layers("all")
@options.projections
@options.seed(unset=True)
@options.ray
@click.option("--basis-type", metavar="TYPE", help="Type of the bases B, instead of what --quant gives them.")
@click.option(
    "--transform-type", metavar="TYPE", help="Type of the transforms A, instead of what --quant gives them."
)
@options.down_type
@options.tensor_type
@options.output_tensor_type
@options.token_embedding_type
@options.pure
@click.option(
    "--no-sequential",
    is_flag=True,
    help="Round each layer's experts on their own, not for what the rounded layers before them put out. Faster, and worse.",
)
@options.refit
@options.rest_from
@options.split_max_size
@options.experts_used
@options.base_model
@options.no_card
@options.tokenizer_pre
@click.option(
    "--moments", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Second moments that `mobe-gguf moments` gathered from MODEL, instead of gathering them again.",
)  # fmt: skip
@options.keep
@options.gradients
@options.memory
@click.option(
    "--threads", "-t", type=click.IntRange(min=1), metavar="N", help="Threads of llama.cpp's programs."
)
@click.option("--no-rivals", is_flag=True, help="Make no plain files of about the same size to compare with.")
@click.option(
    "--no-measure", is_flag=True, help="Measure nothing. No 16-bit copy of the original is then made."
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Optimizer steps for each unit (one projection of one layer).",
)
@options.verify
@options.ctx
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="cpu, cuda, cuda:N, or several (cuda:0,cuda:1), which share the fit's units and the text.",
)
@options.placement
@options.report
@options.resume
@options.quiet
@options.as_json
def command(
    model: Path,
    out: Path,
    size: str | None,
    bpw: float | None,
    plan_file: Path | None,
    plan_form: str | None,
    report_to: Path | None,
    resume: bool,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Make the best GGUF file of MODEL that a size allows: calibrate, fit, round, write, verify, measure.

    MODEL is a Hugging Face model directory, or a GGUF file of q8_0 or better. Rounding minimizes the output error of every matrix on
    the calibration text. If shared bases (MoBE) may pay, a factorized file is made, too. The file with the least KL divergence from MODEL becomes OUT.gguf, even if
    it is a plain one. Unfinished work stays in OUT.gguf.work. After a kill, run the same command with --resume.

    \b
      mobe-gguf compress Qwen3-30B-A3B/ qwen3.gguf --size 10G
      mobe-gguf compress Qwen3-30B-A3B/ qwen3.gguf --bpw 2.6 --text code.txt --text chats.jsonl
      mobe-gguf compress Qwen3-30B-A3B/ qwen3.gguf --plan plan.json
      mobe-gguf plan Qwen3-30B-A3B/                    what fits this machine, with the command for it
    """
    from mobe_gguf.cli.factorize import check_device
    from mobe_gguf.compress import report
    from mobe_gguf.compress.pipeline import Compression
    from mobe_gguf.compress.wishes import Wishes, by_plan
    from mobe_gguf.core.executors import Place
    from mobe_gguf.core.progress import console
    from mobe_gguf.models.hub import resolve
    from mobe_gguf.plan.layout import read_layout

    options.check_stdout()
    options.check_report(report_to, None)
    for device in Place.of(given["device"], given["ray"]).devices:
        check_device(device)
    if size is not None and bpw is not None:
        raise UsageError("--size and --bpw both say how large the file may be; leave one out")
    if bpw is not None and not 0.5 <= bpw <= 32:
        raise UsageError(f"--bpw {bpw:g}: expected bits per weight, for instance 2.6")
    wishes = _wishes(given)
    model = resolve(model, quiet)
    limit = parse_size(size, "--size") if size else None
    layout = None
    if plan_file is not None:
        said = [f"--{name}" for name, value in (("size", size), ("bpw", bpw)) if value is not None]
        said += [f"--{n.replace('_', '-')}" for n in PLANNED if _is_given(n)]
        if said:
            raise UsageError(f"--plan says what to make, and so does {said[0]}; leave one out")
        layout = read_layout(model)
        wishes |= by_plan(plan_file, layout.parameters, plan_form)
    elif plan_form is not None:
        raise UsageError("--plan-form names a form of a plan; give its file with --plan")
    if bpw is not None:
        layout = read_layout(model)
        limit = int(layout.parameters * bpw / 8)
    job = Compression(model, out, Wishes(size=limit, **wishes), quiet, layout)
    if not quiet:
        console.print(f"work is kept in {job.work} until {out} is there", highlight=False, soft_wrap=True)
    try:
        result = job.run(resume, None if report_to is None else partial(_write_page, job, report_to, quiet))
    except KeyboardInterrupt as e:
        raise Interrupted(f"stopped; what is finished is kept in {job.work}, --resume continues") from e
    if as_json:
        click.echo(json.dumps(report.as_json(result), indent=2))
    elif not quiet:
        from rich.console import Console

        from mobe_gguf.core.progress import VERBATIM

        Console(width=None if sys.stdout.isatty() else 110, highlight=False, **VERBATIM).print(
            report.page(result)
        )


def _wishes(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``Wishes`` from the options of these names."""
    from mobe_gguf.core.layers import parse_layers
    from mobe_gguf.factorize.plan import parse_projections
    from mobe_gguf.factorize.target import parse_goal
    from mobe_gguf.quant.recipe import parse_override, parse_quant, parse_type

    if given["moments"] is not None and given["keep"] is not None:
        raise UsageError("--keep is for gathering moments; the file of --moments has its own")
    if given["moments"] is not None and given["gradients"]:
        raise UsageError("--gradients is for gathering moments; leave it out, or --moments")
    read: dict[str, Callable[[str], Any]] = {
        "quant": parse_quant,
        "target": parse_goal,
        "layers": parse_layers,
        "projections": parse_projections,
        "memory": lambda text: parse_size(text, "--memory"),
        "split_max_size": lambda text: parse_size(text, "--split-max-size"),
        **{_name(option): partial(parse_type, option) for option in TYPES},
    }
    found = {name: read[name](value) if value and name in read else value for name, value in given.items()}
    if isinstance(found["target"], int):
        raise UsageError(
            f"--target {given['target']}: expected a share, as 0.75; --size is for the file's size"
        )
    found["text"] = found.pop("texts")
    found["overrides"] = tuple(parse_override(text) for text in found.pop("tensor_type"))
    for option, field in TYPES.items():
        found[field] = found.pop(_name(option))
    for option, field in (
        ("no_rivals", "rivals"),
        ("no_measure", "measure"),
        ("no_card", "card"),
        ("no_sequential", "sequential"),
    ):
        found[field] = not found.pop(option)
    where = [found.pop(name) for name in ("gpu_layers", "cpu_moe", "n_cpu_moe")]
    return found | {"placement": options.llama_placement(*where)}


def _name(option: str) -> str:
    """The parameter of an option."""
    return option.replace("-", "_")[2:]


def _write_page(job: Compression, path: Path, quiet: bool, result: Result) -> None:
    """Write the page of ``--report``; the work folder must still be there."""
    from mobe_gguf.compress.page import of_compression

    again = shlex.join(["mobe-gguf", *sys.argv[1:]])
    page = of_compression(result, job.original, job.moments, job.eval_text, job.wishes.threads, again)
    options.write_report(page, path, quiet)


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
