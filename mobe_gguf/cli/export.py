"""``mobe-gguf export``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mobe_gguf.progress import console


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.gguf")
@click.option(
    "--quant",
    required=True,
    metavar="TYPE",
    help="What llama-quantize calls it: f16, q8_0, q4_k, q4_k_s, ...",
)
@click.option("--basis-type", metavar="TYPE", help="Type of the bases B, instead of what --quant gives them.")
@click.option(
    "--transform-type", metavar="TYPE", help="Type of the transforms A, instead of what --quant gives them."
)
@click.option(
    "--tensor-type",
    multiple=True,
    metavar="REGEX=TYPE",
    help="Type of the tensors in whose GGUF name REGEX is found, whatever the other options say. Repeatable, the "
    "first that fits counts.",
)
@click.option("--pure", is_flag=True, help="One type for all matrices, no mixture.")
@click.option("--tokenizer-pre", metavar="NAME", help="llama.cpp's pre-tokenizer, if it is not recognized.")
@click.option("--trust-remote-code", is_flag=True, help="Let MODEL's own tokenizer code run, if it has some.")
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Show every tensor, and what llama.cpp's converter says.")
@click.option("-q", "--quiet", is_flag=True, help="Show nothing but errors.")
def command(
    model: Path,
    out: Path,
    quant: str,
    basis_type: str | None,
    transform_type: str | None,
    tensor_type: tuple[str, ...],
    pure: bool,
    tokenizer_pre: str | None,
    trust_remote_code: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Write the MoBE checkpoint MODEL as one GGUF file.

    MODEL is what `mobe-gguf factorize` wrote, or a published MoBE checkpoint. Each tensor gets the type that
    llama-quantize would give it for the same TYPE (so q4_k means q4_k_m); router, norms and mixing weights stay
    f32. An existing OUT.gguf is replaced when the new one is whole.
    """
    from mobe_gguf.export import Recipe, export, parse_override, parse_quant, parse_type

    recipe = Recipe(
        quant=parse_quant(quant),
        basis=parse_type("--basis-type", basis_type) if basis_type else None,
        transform=parse_type("--transform-type", transform_type) if transform_type else None,
        overrides=tuple(parse_override(text) for text in tensor_type),
        pure=pure,
    )
    report = export(
        model,
        out,
        recipe,
        tokenizer_pre=tokenizer_pre,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
        verbose=verbose,
        quiet=quiet,
    )
    if not quiet:
        _show(report, dry_run)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))


def _show(report, dry_run: bool) -> None:  # noqa: ANN001, the type would cost an import of torch
    from mobe_gguf.export.report import amount, fallback_lines, size_table

    console.print(size_table(report.entries))
    lines = fallback_lines(report.fallbacks)
    if report.tokenizer_pre is not None:
        lines.append(f"tokenizer splits as {report.tokenizer_pre}: {report.tokenizer_why}")
    lines.append(
        f"{amount(report.n_params)} parameters, {report.n_params / report.original_params:.1%} of the original's "
        f"{amount(report.original_params)}; {report.bits_per_weight:.2f} bits per weight"
    )
    size = report.data_bytes if dry_run else report.n_bytes
    done = "would be written" if dry_run else f"written in {report.seconds:.1f} s"
    lines.append(f"{report.path}: {size / 1e6:,.2f} MB {done}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
