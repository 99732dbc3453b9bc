"""``mobe-gguf export``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobe_gguf.cli import options
from mobe_gguf.cli.wab import wab_files, wab_options
from mobe_gguf.core.errors import Interrupted, UsageError
from mobe_gguf.core.progress import console, duration

if TYPE_CHECKING:  # imports of torch
    from mobe_gguf.export import ExportRequest, Report
    from mobe_gguf.quant.allocate import Target
    from mobe_gguf.quant.recipe import Recipe

#: Options that go into ``export.ExportOptions`` as they are.
OPTIONS = (
    "tokenizer_pre",
    "experts_used",
    "dense",
    "sequential",
    "source",
    "rest_from",
    "refit",
    "original",
    "base_model",
    "dry_run",
    "verbose",
    "quiet",
)

#: Fields of ``Recipe`` that are a type, and the option that names it.
TYPE_OPTIONS = {
    "basis": "--basis-type",
    "transform": "--transform-type",
    "down": "--down-type",
    "output": "--output-tensor-type",
    "embedding": "--token-embedding-type",
}


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.gguf")
@click.option(
    "--quant",
    metavar="TYPE",
    help="Types, by llama-quantize's name: f16, q8_0, q4_k, q4_k_s, ..., or two-bit and one-bit (iq4_xs, with experts of two bits or one: "
    "give --moments).  [default: the type that MODEL was factorized --for]",
)
@click.option(
    "--target-size",
    metavar="SIZE",
    help="Size of the file (4.6M, 12G; powers of ten). The types of bases, transforms and experts are chosen layer by layer, by "
    "error and size, unless an option names them. With --moments a projection's factors are replaced by its ordinary experts where "
    "these are better.",
)
@click.option("--target-bpw", type=float, metavar="BITS", help="The same, in bits per weight.")
@click.option("--basis-type", metavar="TYPE", help="Type of the bases B, instead of what --quant gives them.")
@click.option(
    "--transform-type", metavar="TYPE", help="Type of the transforms A, instead of what --quant gives them."
)
@options.down_type
@options.tensor_type
@options.output_tensor_type
@options.token_embedding_type
@click.option(
    "--quant-rest",
    metavar="TYPE",
    help="Where MODEL holds factors of a GGUF file: types of all that is no factor, as llama-quantize calls them.  [default: as in that "
    "file]",
)
@options.rest_from
@options.pure
@click.option(
    "--imatrix",
    multiple=True,
    metavar="FILE",
    help="Importance matrix from llama-imatrix, of the original or of the MoBE model. Repeatable; each is used where it "
    "fits.",
)
@click.option(
    "--moments",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Second moments of the original model's inputs, from `mobe-gguf moments`. Rounding then minimizes output error instead of weight "
    "error. Also serves as an importance matrix.",
)
@click.option(
    "--sequential",
    type=click.Path(path_type=Path),
    metavar="TEXT",
    multiple=True,
    help="With --moments: run the original and its rounded copy over TEXT, layer by layer, and round each layer's experts for what the "
    "rounded layers before it put out; down, which comes last, makes up for what factors or gate and up leave wrong. Lowers the KL divergence "
    "at the same size. The text of the moments serves. Repeatable. A killed run continues after its last finished layer.",
)
@options.memory
@options.refit
@click.option(
    "--original",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The original model, for --refit, if it has moved.",
)
@options.split_max_size
@options.experts_used
@click.option(
    "--dense",
    is_flag=True,
    help="Multiply the factors out and write ordinary experts. The file has the original's size and runs in any llama.cpp. "
    "MODEL may be an ordinary model.",
)
@wab_options
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The GGUF file that MODEL holds factors of, if it has moved.",
)
@options.base_model
@options.no_card
@options.tokenizer_pre
@options.verify
@options.dry_run
@options.as_json
@click.option(
    "-v", "--verbose", is_flag=True, help="Show every tensor and the output of llama.cpp's converter."
)
@options.quiet
def command(model: Path, out: Path, as_json: bool, verify: bool, **given: Any) -> None:
    """Write the MoBE checkpoint MODEL as a GGUF file.

    MODEL is what `mobe-gguf factorize` wrote, or a published MoBE checkpoint. It may be an id on the Hugging Face hub (ORG/NAME),
    which is downloaded. Each tensor gets the type that llama-quantize would give it for the same TYPE, so q4_k means q4_k_m.
    Router, norms and mixing weights stay f32. An existing OUT.gguf is replaced when the new one is whole. A stopped export resumes
    with the same command: at the unfinished file of --split-max-size, and with --moments at the unfinished tensor.

    If bases are quantized, export solves for the transforms and the mix again. It brings them near to the original model's matrices if
    the original is where factorize found it, or where --original says. Otherwise it brings them near to the factors' own matrices.

    Where MODEL holds factors of a GGUF file, --quant applies to the factors alone. All other tensors are copied from that
    file, except where --quant-rest gives them other types, or --tensor-type, --down-type, --output-tensor-type or
    --token-embedding-type name them. MODEL may be a GGUF file itself with --dense: it is written in the types of --quant.

    \b
    Examples:
      mobe-gguf export mobe/ out.gguf --quant q4_k
      mobe-gguf export mobe/ big.gguf --quant q8_0 --split-max-size 50G
      mobe-gguf export factors/ out.gguf --quant q4_k --quant-rest q4_k --source model-q8_0.gguf
      mobe-gguf export model-q8_0.gguf out.gguf --dense --quant q3_k --moments moments.safetensors
      mobe-gguf export mobe/ dense.gguf --quant q4_k --dense
      mobe-gguf export original/ out.gguf --quant q4_k --wab trained/ --activation silu
      mobe-gguf export mobe/ f16.gguf --quant f16
      llama-imatrix -m f16.gguf -f calibration.txt -o imatrix.gguf
      mobe-gguf export mobe/ out.gguf --quant iq3_xxs --imatrix imatrix.gguf
      mobe-gguf export mobe/ out.gguf --quant q4_k --target-size 12G --imatrix imatrix.gguf
    """
    from mobe_gguf.export import write_model
    from mobe_gguf.export.shards import left_by

    request = _request(model, out, given)
    try:
        report = write_model(request)
    except KeyboardInterrupt as e:
        raise Interrupted(f"stopped; {left_by(out, 'what is finished is')}") from e
    if verify and not given["dry_run"] and request.options.wab is None:
        from mobe_gguf.export.agreement import check_written

        report.compared = check_written(Path(report.path), request.model, fitted=report.refit is not None)
    if not given["quiet"]:
        _show(report, given["dry_run"])
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))


def _request(model: Path, out: Path, given: Mapping[str, Any]) -> ExportRequest:
    """The request that the command's options, ``given`` by name, stand for."""
    from mobe_gguf.core.files import parse_size
    from mobe_gguf.export import ExportOptions, ExportRequest
    from mobe_gguf.models.hub import resolve
    from mobe_gguf.quant.allocate import parse_target

    target = parse_target(given["target_size"], given["target_bpw"])
    model = resolve(model, given["quiet"])
    size = given["split_max_size"]
    options = ExportOptions(
        split_max_size=None if size is None else parse_size(size, "--split-max-size"),
        wab=wab_files(given["wab"], given["activation"], given["wab_layers"]),
        card=not given["no_card"],
        memory=None if given["memory"] is None else parse_size(given["memory"], "--memory"),
        **{name: given[name] for name in OPTIONS},
    )
    return ExportRequest(model, out, _recipe(model, target, given), options)


def _recipe(model: Path, target: Target | None, given: Mapping[str, Any]) -> Recipe:
    """The types that the options ask for; without ``--quant`` those that ``model`` was fitted for."""
    from mobe_gguf.export import default_types
    from mobe_gguf.quant.recipe import Recipe, parse_override, parse_quant, parse_type

    types = {name: given[option.replace("-", "_")[2:]] for name, option in TYPE_OPTIONS.items()}
    quant = given["quant"]
    if quant is None:
        quant, fitted_basis, fitted_transform = default_types(model)
        if target is None:
            types["basis"] = types["basis"] or fitted_basis
            types["transform"] = types["transform"] or fitted_transform
    return Recipe(
        parse_quant(quant),
        overrides=tuple(parse_override(text) for text in given["tensor_type"]),
        pure=given["pure"],
        imatrix=given["imatrix"],
        rest=_rest(model, given["quant_rest"]),
        moments=None if given["moments"] is None else str(given["moments"]),
        target=target,
        **{
            name: None if text is None else parse_type(TYPE_OPTIONS[name], text)
            for name, text in types.items()
        },
    )


def _rest(model: Path, quant: str | None) -> str | None:
    """The type of ``--quant-rest``; UsageError if MODEL does not hold factors of a GGUF file."""
    from mobe_gguf.models.gguf_source import FACTORS_NAME
    from mobe_gguf.quant.recipe import parse_quant

    if quant is not None and not (model / FACTORS_NAME).is_file():
        raise UsageError("--quant-rest is for factors of a GGUF file; here --quant is for the whole file")
    return quant and parse_quant(quant, mixes=False)


def _show(report: Report, dry_run: bool) -> None:
    from mobe_gguf.core.files import amount, describe_size
    from mobe_gguf.export.report import fallback_lines, importance_lines, size_table

    console.print(size_table(report.entries))
    lines = fallback_lines(report.fallbacks) + importance_lines(report.entries)
    if report.needs_imatrix:
        lines.append(
            f"{report.needs_imatrix} tensors of these types need an importance matrix: --imatrix FILE"
        )
    lines += report.divided
    if report.rounded is not None:
        lines.append(report.rounded.line())
    if report.rounding_seconds is not None:
        lines.append(f"rounding by moments takes about {duration(report.rounding_seconds)} on this machine")
    if report.refit is not None:
        lines.append(report.refit.line())
    if report.copied:
        lines.append(
            f"{report.copied} of {len(report.entries)} tensors pass through from the GGUF file as they are"
        )
    if report.tokenizer_pre is not None:
        lines.append(f"tokenizer splits as {report.tokenizer_pre}: {report.tokenizer_why}")
    lines.append(
        f"{amount(report.n_params)} parameters, {report.n_params / report.original_params:.1%} of the original's "
        f"{amount(report.original_params)}; {report.bits_per_weight:.2f} bits per weight"
    )
    done = "would be written" if dry_run else f"written in {report.seconds:.1f} s"
    where = (
        report.path if len(report.files) <= 1 else f"{len(report.files)} files, the first is {report.path}"
    )
    lines = report.notes + lines
    kept = f", {report.files_kept} files kept from an interrupted run" if report.files_kept else ""
    lines.append(f"{where}: {describe_size(report.n_bytes)} {done}{kept}")
    if report.card:
        lines.append(report.card)
    if report.compared is not None:
        lines.append(report.compared)
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
