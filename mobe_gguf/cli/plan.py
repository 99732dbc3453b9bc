"""``mobe-gguf plan``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mobe_gguf.cli import options
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.files import parse_size


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@options.ram
@options.vram
@click.option("--size", metavar="SIZE", help="Largest file, for instance 80G (powers of ten).")
@click.option(
    "--ctx", type=click.IntRange(min=1), default=32768, show_default=True, help="Tokens of context."
)
@click.option("--tokens-per-second", type=float, metavar="N", help="Slowest speed that will do.")
@options.bandwidth
@options.vram_bandwidth
@click.option(
    "--probe", "with_probe", is_flag=True,
    help="Fit and round the experts of one layer, so that the quality column is measured error. Needs weights, and about a minute.",
)  # fmt: skip
@click.option(
    "--moments", type=click.Path(path_type=Path), metavar="FILE",
    help="Second moments, from mobe-gguf moments: the probe's errors are those of outputs then, not of weights.",
)  # fmt: skip
@options.as_json
def command(
    model: Path,
    ram: str | None,
    vram: str | None,
    size: str | None,
    ctx: int,
    tokens_per_second: float | None,
    bandwidth: str | None,
    vram_bandwidth: str | None,
    with_probe: bool,
    moments: Path | None,
    as_json: bool,
) -> None:
    """Show what fits, how good and how fast: plain and factorized files of MODEL, best first.

    MODEL is a directory, a GGUF file, a hub id, or a config.json alone: headers are enough. Nothing is written.

    \b
      mobe-gguf plan Qwen3-30B-A3B/ --ram 32G --vram 24G
      mobe-gguf plan config.json --ram 128G --ctx 65536 --json
      mobe-gguf plan Qwen3-30B-A3B/ --probe --moments moments.safetensors
    """
    from mobe_gguf.models.hub import resolve
    from mobe_gguf.plan import cost, forms, machine, memory, probe, report
    from mobe_gguf.plan.layout import read_layout

    options.check_stdout()
    asked = report.PlanWishes(parse_size(size, "--size") if size else None, tokens_per_second, ctx)
    if moments is not None and not with_probe:
        raise UsageError("--moments is for --probe; give that, too, or leave --moments out")
    path = resolve(model, headers_only=not with_probe)
    layout = read_layout(path)
    layout.expert_shape()
    found = forms.forms(layout)
    kinds = {kind for form in found for kind in form.types.values()}
    here = machine.this_machine(kinds)
    if ram:
        here.ram = parse_size(ram, "--ram")
    if vram:
        here.vram = 0 if vram.strip() in ("0", "none") else parse_size(vram, "--vram")
    if bandwidth:
        here.ram_bandwidth = float(parse_size(bandwidth, "--bandwidth"))
    if vram_bandwidth:
        here.vram_bandwidth = float(parse_size(vram_bandwidth, "--vram-bandwidth"))
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise UsageError(f"--tokens-per-second {tokens_per_second}: expected a number above 0")
    measured = probe.probe(path, layout, found, moments) if with_probe else None
    beside = memory.beside_weights(layout, ctx)
    costs = report.order([cost.cost(layout, form, here, beside, measured) for form in found], asked)
    # the weights will be in the directory of config.json
    named = str(Path(model).parent) if Path(model).suffix == ".json" else str(model)
    about = (named, layout, here, beside, costs, asked, forms.why_not_factorized(layout))
    if as_json:
        click.echo(json.dumps(report.as_json(*about, measured), indent=2))
        return
    from rich.console import Console

    from mobe_gguf.core.progress import VERBATIM

    Console(width=None if sys.stdout.isatty() else 110, highlight=False, **VERBATIM).print(
        report.page(*about, measured)
    )
