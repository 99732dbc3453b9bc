"""Options that several commands share, with the same words.

Each option is a decorator.  If its default depends on the command, it is a function that makes the decorator.  With
``unset`` the help shows the default but the command gets None, so it can tell whether the option was given.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobe_gguf.core.errors import UsageError

if TYPE_CHECKING:  # imports that take their time
    from mobe_gguf.evaluate.page.data import Page
    from mobe_gguf.formats.moments import Moments

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# what to work on


def layers(default: str) -> Decorator:
    text = f"MoE layers to factorize, as 0-3,7.  [default: {default}]"
    return click.option("--layers", metavar="LIST", help=text)


projections = click.option(
    "--projections",
    metavar="LIST",
    help="Projections to factorize, of gate,up,down. Down has as many bases of the same rank, on its output side.  [default: gate,up]",
)


def steps(default: int, *, unset: bool = False) -> Decorator:
    return _number(
        "--steps",
        "Optimizer steps for each unit (one projection of one layer).",
        default,
        unset,
        click.IntRange(min=1),
    )


def seed(*, unset: bool = False) -> Decorator:
    return _number("--seed", "Seed of the start values: same seed, same factors.", 0, unset)


ram = click.option(
    "--ram", metavar="SIZE", help="System memory to plan for. [default: what this process may use]"
)
vram = click.option(
    "--vram", metavar="SIZE", help="GPU memory to plan for, 0 for none. [default: this machine's]"
)
bandwidth = click.option(
    "--bandwidth", metavar="SIZE", help="Bytes a second of the RAM of another machine, as 80G."
)
vram_bandwidth = click.option(
    "--vram-bandwidth", metavar="SIZE", help="Bytes a second of the GPU's memory. [default: 600G]"
)


imatrix = click.option(
    "--imatrix",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Importance matrix of the original model, from llama-imatrix. Minimize output error instead of weight error.",
)

# the form of the factors

groups = click.option(
    "--groups",
    type=click.IntRange(min=1),
    metavar="G",
    help="Groups of experts; each has M/G bases of its own.  [default: 1]",
)
mix = click.option(
    "--mix",
    type=click.Choice(["scalar", "row"]),
    help="One coefficient for each expert and basis, or one for each row of the basis.  [default: scalar]",
)
mix_terms = click.option(
    "--mix-terms",
    type=click.IntRange(min=1),
    metavar="S",
    help="Most bases that one expert mixes. Fewer run faster, above all on a CPU. With --moments and --for, 2 terms of 6 "
    "raise the shipped model's layer error by 3 %.  [default: all]",
)
ray = click.option(
    "--ray",
    metavar="ADDRESS",
    help="Do the work on a Ray cluster: HOST:PORT, auto (the cluster that runs here) or local (this machine alone). "
    "--device is then cpu or cuda. All machines need mobe-gguf[ray] and the same paths for MODEL and OUT.",
)

# the file

pure = click.option("--pure", is_flag=True, help="Give all matrices one type, not a mixture.")
refit = click.option(
    "--refit/--no-refit",
    default=True,
    help="Solve for the transforms and the mix again, for the rounded bases.  [default: refit]",
)
split_max_size = click.option(
    "--split-max-size",
    metavar="SIZE",
    help="Write several files, OUT-00001-of-0000N.gguf, each with at most SIZE of tensors (500M, 50G; powers of ten).",
)
experts_used = click.option(
    "--experts-used", type=int, metavar="K", help="Experts that a token uses, instead of MODEL's own number."
)
base_model = click.option(
    "--base-model",
    metavar="ID",
    help="The original's id on the hub (Qwen/Qwen3-30B-A3B), for the metadata and the card.  [default: as recorded]",
)
no_card = click.option("--no-card", is_flag=True, help="Write no README.md beside the file.")
tokenizer_pre = click.option(
    "--tokenizer-pre", metavar="NAME", help="Name of llama.cpp's pre-tokenizer, if it is not recognized."
)
rest_from = click.option(
    "--rest-from",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where MODEL holds factors of a GGUF file: another GGUF file of the same model, in fewer bits, that gives all that is no factor.",
)

# text

ctx = click.option(
    "--ctx", "-c", type=int, default=512, show_default=True, metavar="N", help="Tokens in a chunk of text."
)


def chunks(default: int | None = None) -> Decorator:
    text = f"Chunks of the text to use.  [default: {'all' if default is None else default}]"
    return click.option("--chunks", type=int, default=default, metavar="N", help=text)


# where and how

memory = click.option(
    "--memory",
    metavar="SIZE",
    help="Memory to use (32G), beside torch's own.  [default: 0.8 of what this process may use]",
)
device = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu, cuda or cuda:N."
)
threads = click.option(
    "--threads", "-t", type=click.IntRange(min=1), metavar="N", help="Threads of llama.cpp's programs."
)
_PLACEMENT = (
    click.option("--gpu-layers", "-ngl", metavar="N", help="Layers in GPU memory: a number, auto or all."),
    click.option("--cpu-moe", is_flag=True, help="Keep the experts in system memory."),
    click.option(
        "--n-cpu-moe",
        type=click.IntRange(min=0),
        metavar="N",
        help="Keep the experts of the first N layers in system memory.",
    ),
)


def placement(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add llama.cpp's options that say where weights go; pass their values to :func:`llama_placement`."""
    for option in reversed(_PLACEMENT):
        command = option(command)
    return command


def llama_placement(gpu_layers: str | None, cpu_moe: bool, n_cpu_moe: int | None) -> tuple[str, ...]:
    """llama.cpp's own spelling of the options that say where weights go.  UsageError if it would refuse them."""
    if gpu_layers is not None and gpu_layers not in ("auto", "all") and not re.fullmatch(r"\d+", gpu_layers):
        raise UsageError(f"--gpu-layers {gpu_layers}: expected a number of layers, auto or all")
    return (
        *(("-ngl", gpu_layers) if gpu_layers is not None else ()),
        *(("--cpu-moe",) if cpu_moe else ()),
        *(("--n-cpu-moe", str(n_cpu_moe)) if n_cpu_moe is not None else ()),
    )


resume = click.option("--resume", is_flag=True, help="Resume from OUT.work, if it is there.")
down_type = click.option(
    "--down-type",
    metavar="TYPE",
    help="Type of the experts' down projections (of their A's where down is factorized), instead of --quant or "
    "--transform-type.",
)
tensor_type = click.option(
    "--tensor-type",
    multiple=True,
    metavar="REGEX=TYPE",
    help="Type of the tensors whose GGUF name contains REGEX. Overrides the options above. Repeatable; the first match "
    "counts, also with --pure, as in llama-quantize. Unlike there, it works with --quant f16, and case matters.",
)
output_tensor_type = click.option(
    "--output-tensor-type", metavar="TYPE", help="Type of output.weight. Overrides --tensor-type."
)
token_embedding_type = click.option(
    "--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight. Overrides --tensor-type."
)
keep = click.option(
    "--keep",
    type=float,
    metavar="SHARE",
    help="Keep the strongest directions of a layer's moments that hold this share of their energy, and a diagonal for the rest. If "
    "that is more than half of the directions, keep all. With more than 1024 channels keep at most 1024.  [default: 0.999]",
)
gradients = click.option(
    "--gradients",
    is_flag=True,
    help="Weigh what experts are fed by the loss's gradients as well, for files of one to two bits. Takes four more forward passes, a layer "
    "with all its experts in memory, the states of all layers on the disk (2 bytes a token, channel and layer), and a text that gives "
    "the average expert 60 tokens for each channel; left out with a warning where it gives fewer.",
)
verify = click.option(
    "--verify/--no-verify",
    default=True,
    help="Run the first layers of MODEL in transformers and those of the new file in llama.cpp, where that takes seconds.  [default: verify]",
)
dry_run = click.option(
    "--dry-run", is_flag=True, help="Check everything, show what would be written, and write nothing."
)


def check_stdout() -> None:
    """UsageError if stdout is closed (``>&-``): the result would be lost silently."""
    if sys.stdout is None:
        raise UsageError("the result is printed on stdout, which is closed; send it to a file: > FILE")


def _check_stdout(ctx: click.Context, option: click.Parameter, value: bool) -> bool:
    if value:
        check_stdout()
    return value


as_json = click.option(
    "--json",
    "as_json",
    is_flag=True,
    callback=_check_stdout,
    help="Print the result as JSON on stdout.",
)
report = click.option(
    "--report",
    "report_to",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Write the results as one self-contained HTML page, with plots and tables.",
)
quiet = click.option("--quiet", "-q", is_flag=True, help="Print errors only.")


def check_report(path: Path | None, moments: Path | None) -> Moments | None:
    """Check before the work that the page can be written; returns the opened ``moments`` for it."""
    if path is None:
        return None
    from mobe_gguf import runtime
    from mobe_gguf.evaluate.page import check
    from mobe_gguf.formats.moments import Moments

    check(path)
    runtime.tool("llama-server")
    return None if moments is None else Moments(moments)


def write_report(page: Page, path: Path, quiet: bool) -> None:
    """Write the page to ``path``."""
    from mobe_gguf.core.progress import say
    from mobe_gguf.evaluate.page import write

    write(page, path)
    if not quiet:
        say(f"{path}: written, {path.stat().st_size / 1e6:.2f} MB; open it in a browser")


def _number(name: str, text: str, default: int, unset: bool, kind: click.ParamType | type = int) -> Decorator:
    return click.option(
        name,
        type=kind,
        default=None if unset else default,
        metavar="N",
        help=f"{text}  [default: {default}]",
    )
