"""MoBE checkpoint (or any Hugging Face MoE directory) to GGUF.

    from mobe_gguf.export import Recipe, export, parse_quant

    report = export("mobe/", "out.gguf", Recipe(parse_quant("q4_k")))

What each part does: ``converter`` runs llama.cpp's own converter for all that is not a factor, ``factors`` adds basis and
mix, ``recipe`` chooses the types, ``imatrix`` weighs the columns, ``refit`` solves for A again, ``source`` reads values in pieces, ``write`` encodes
and writes them, ``shards`` cuts them into files.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from mobe_gguf.core.atomic import check_output, destination
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import check_name, check_space, describe_size, format_size, parse_size
from mobe_gguf.core.progress import bar
from mobe_gguf.export.card import Subject, write_card
from mobe_gguf.export.converter import Conversion, add_keys, convert
from mobe_gguf.export.divide import divide
from mobe_gguf.export.factors import add_factors, check_factors, put_experts, put_transforms
from mobe_gguf.export.fitted import default_types, mismatch
from mobe_gguf.export.gguf_target import Copied, GgufConversion
from mobe_gguf.export.imatrix import Imatrix, Importance, importances, missing_message, without
from mobe_gguf.export.origin import Origin
from mobe_gguf.export.refit import Refitting, find_original, units_of, weigh_transforms
from mobe_gguf.export.report import Entry, Report, original_params
from mobe_gguf.export.shards import Parts, check_places, cut, fingerprint, shard_paths, write_shards
from mobe_gguf.export.write import Encoded, head_bytes, write_gguf
from mobe_gguf.formats.gguf import number_of
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.gguf_factors import FACTORS_NAME, GgufFactors
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.models.original import Original
from mobe_gguf.models.wab import WabCheckpoint, WabFiles
from mobe_gguf.quant.allocate import parse_target
from mobe_gguf.quant.recipe import Choice, Facts, Recipe, Spec, parse_override, parse_quant, parse_type, plan
from mobe_gguf.runtime import ggml

__all__ = [
    "Recipe",
    "Report",
    "default_types",
    "export",
    "parse_override",
    "parse_quant",
    "parse_size",
    "parse_target",
    "parse_type",
]


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    tokenizer_pre: str | None = None,
    split_max_size: int | None = None,
    experts_used: int | None = None,
    allow_dense: bool = False,
    dense: bool = False,
    wab: WabFiles | None = None,
    source: str | os.PathLike[str] | None = None,
    refit: bool = True,
    original: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    card: bool = False,
    dry_run: bool = False,
    verbose: bool = False,
    quiet: bool = False,
) -> Report:
    """Write ``model`` to the GGUF file ``out``; returns what was written.

    ``tokenizer_pre``: value for ``tokenizer.ggml.pre`` instead of what is recognized.  ``split_max_size``: bytes of
    tensors a file, see ``shards``; an interrupted export goes on with the file that it was at.  ``experts_used``:
    experts a token uses, instead of what config.json says.  ``allow_dense`` also takes an ordinary model, whose experts
    are then written as they are; ``dense`` writes ordinary experts of any model, those of a MoBE checkpoint multiplied
    out.  ``wab``: the authors' training output for ``model``, which is then the original.  ``source``: where the GGUF file is
    that ``model`` holds factors of, if not where it was; all but the factors passes through, see ``gguf_target``.
    ``refit``: solve for A and the mix again where the bases are quantized, see ``refit``; ``original``: the model that
    ``model`` was made of, if not where it was.
    ``base_model``: the original's id on the hub, for the metadata; ``card``: write a README.md beside the file, see ``card``.
    ``dry_run`` plans everything and writes nothing.  An existing ``out`` is replaced when the new file is whole, not before;
    of a symbolic link, what it points to (files of ``split_max_size`` are not written through links).
    Raises MobeError if the model is not what it should be, or the file cannot be written.
    """
    started = time.monotonic()
    model, out = Path(model), Path(out)
    for path in (out, *recipe.imatrix):  # their names go into the file and its card
        check_name(str(path))
    checkpoint = _open(model, allow_dense or dense, wab)
    check_output(out)
    imatrix = Imatrix(recipe.imatrix)
    if isinstance(checkpoint, MobeCheckpoint):
        check_factors(checkpoint)
    conversion = _convert(checkpoint, out, source, tokenizer_pre, verbose)
    if isinstance(checkpoint, MobeCheckpoint):
        if dense:
            put_experts(conversion, checkpoint)
        else:
            if isinstance(checkpoint, (WabCheckpoint, GgufFactors)):
                put_transforms(conversion, checkpoint)
            add_factors(conversion, checkpoint)
    origin = Origin.of(checkpoint, base_model, dense)
    conversion.finish(recipe.file_type, out, origin)
    add_keys(conversion.writer, imatrix.keys())
    if experts_used is not None:
        _use_experts(conversion, experts_used)
    found: tuple[Original | None, str | None] = (None, None)
    factors = checkpoint if isinstance(checkpoint, MobeCheckpoint) and not dense else None
    if original is not None and factors is None:
        raise UsageError(
            "--original says what factors are solved for again, and none are written here; leave it out"
        )
    if factors is not None and (refit or recipe.target or original):
        found = find_original(factors, original or source)
    choices = _choose(conversion, recipe)
    divided: list[str] = []
    if recipe.target is not None:
        choices, divided = divide(
            conversion, factors, imatrix, recipe, choices, found[0], refit, _head(conversion, choices), quiet
        )
    encoded_here = {n: c for n, c in choices.items() if not conversion.is_copied(n, c)}
    weights = importances(imatrix, conversion.tensors, encoded_here)
    units = units_of(factors, imatrix, choices, weights) if factors is not None else {}
    collected, weights = weights, weights | weigh_transforms(units, choices, weights)
    missing = without(weights, encoded_here, recipe.quant)
    if missing and not dry_run:
        raise MobeError(missing_message(imatrix, missing, choices, conversion.tensors))
    encoded, entries = _lay_out(conversion, choices, weights)
    refitting = Refitting.of(units, *found) if refit else None
    if refitting is not None:
        encoded = refitting.put(encoded, collected)
    shards = cut(encoded, split_max_size, conversion.alignment)
    paths = shard_paths(out, len(shards))
    check_places(paths)
    report = Report(str(paths[0]), conversion.arch, recipe.quant, entries, original_params(entries))
    report.files, report.needs_imatrix = [str(path) for path in paths], len(missing)
    report.divided = divided
    if factors is not None and (note := mismatch(factors, choices)):
        report.notes.append(note)
    report.copied = sum(isinstance(tensor, Copied) for tensor in encoded)
    if conversion.pre is not None:
        report.tokenizer_pre, report.tokenizer_why = conversion.pre.name, conversion.pre.why
    key = fingerprint(
        [*checkpoint.source_files(), *conversion.files(), *map(Path, recipe.imatrix)],
        conversion.keys,
        entries,
        wab,
        refitting and refitting.fingerprint,
    )
    parts = Parts(out, key)
    check_space(
        out if len(paths) > 1 else destination(out),
        report.data_bytes,
        parts.files() if len(paths) > 1 else (),
        "Make room, write elsewhere, or choose a smaller --quant.",
    )
    if not dry_run:
        _write(conversion, parts, shards, report, quiet, verbose)
        report.refit = refitting and refitting.outcome()
        report.n_bytes = sum(path.stat().st_size for path in paths)
        if card:
            options = _other_options(split_max_size, experts_used, wab)
            options += () if refit or not units else ("--no-refit",)
            subject = Subject(report, conversion.keys, checkpoint, recipe, origin, dense, options)
            report.card = write_card(subject)
    report.seconds = time.monotonic() - started
    return report


def _other_options(
    split_max_size: int | None, experts_used: int | None, wab: WabFiles | None
) -> tuple[str, ...]:
    """What the card's command has beside the recipe; paths by their names alone."""
    words = [] if experts_used is None else [f"--experts-used {experts_used}"]
    words += [] if split_max_size is None else [f"--split-max-size {format_size(split_max_size)}"]
    if wab is not None:
        words += [f"--wab {path.absolute().name}/" for path in wab.folders] + [
            f"--activation {wab.activation}"
        ]
    return tuple(words)


def _open(model: Path, allow_dense: bool, wab: WabFiles | None) -> Checkpoint:
    if wab is not None:
        return WabCheckpoint(model, wab)
    if (model / FACTORS_NAME).is_file():
        return GgufFactors(model)
    checkpoint = Checkpoint(model)
    if checkpoint.is_mobe or not allow_dense:
        checkpoint = MobeCheckpoint(model)
    return checkpoint


def _convert(
    checkpoint: Checkpoint,
    out: Path,
    source: str | os.PathLike[str] | None,
    tokenizer_pre: str | None,
    verbose: bool,
) -> Conversion | GgufConversion:
    """What is written around the factors: by llama.cpp's converter, or out of the GGUF file."""
    checkpoint.check_whole()
    if not isinstance(checkpoint, GgufFactors):
        if source is not None:
            raise UsageError(
                f"--source is for factors of a GGUF file, and {checkpoint.path} is a Hugging Face directory"
            )
        return convert(checkpoint, out, tokenizer_pre, verbose)
    if tokenizer_pre is not None:
        raise UsageError("--tokenizer-pre: the tokenizer is that of the GGUF file; leave the option out")
    conversion = GgufConversion(checkpoint, checkpoint.open_source(source))
    if any(out.exists() and out.samefile(file) for file in conversion.files()):
        raise UsageError(f"{out} is the file that the factors are of; write to another")
    return conversion


def _choose(conversion: Conversion | GgufConversion, recipe: Recipe) -> dict[str, Choice]:
    if isinstance(conversion, GgufConversion):
        return conversion.choose(recipe)
    specs = [Spec(t.name, t.source.shape) for t in conversion.tensors.values()]
    choices = plan(specs, recipe, Facts.of(conversion.arch, conversion.keys))
    return choices | {t.name: Choice(t.forced, t.forced) for t in conversion.tensors.values() if t.forced}


def _use_experts(conversion: Conversion, k: int) -> None:
    """Set the number of experts a token uses; UsageError if the model cannot use so many."""
    arch, keys = conversion.arch, conversion.keys
    n_expert = number_of(keys, f"{arch}.expert_count", 0)
    groups = number_of(keys, f"{arch}.expert_group_count", 1)
    most, why = n_expert, f"the model has {n_expert}"
    if groups > 1:
        used = number_of(keys, f"{arch}.expert_group_used_count", groups)
        most = n_expert // groups * used
        why = f"a token uses {used} of {groups} groups of {n_expert // groups}"
    if not 1 <= k <= most:
        raise UsageError(f"--experts-used {k}: expected 1 to {most}, for {why}")
    conversion.writer.add_uint32(f"{arch}.expert_used_count", k)


def _lay_out(
    conversion: Conversion, choices: dict[str, Choice], weights: dict[str, Importance]
) -> tuple[list[Encoded], list[Entry]]:
    """The tensors as they are written, in order, and what the report says of them."""
    encoded, entries = [], []
    for tensor in conversion.tensors.values():
        choice, shape = choices[tensor.name], tensor.source.shape
        n_bytes = ggml.type_info(choice.type).tensor_bytes(shape)
        importance = weights.get(tensor.name)
        kind = Copied if conversion.is_copied(tensor.name, choice) else Encoded
        encoded.append(kind(tensor, choice.type, n_bytes, importance))
        wanted = choice.wanted if choice.wanted != choice.type else None
        origin = importance.origin if importance else None
        entries.append(Entry(tensor.name, choice.type, shape, n_bytes, wanted, importance=origin))
    return encoded, entries


def _writer(conversion: Conversion, shards: list[list[Encoded]], index: int) -> Any:
    """A ``gguf.GGUFWriter``, or what stands for it, with the keys and the tensor table of one of the files."""
    if isinstance(conversion, GgufConversion):
        return conversion.header(shards, index)
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path=None, arch=conversion.arch)
    writer.kv_data = [dict(conversion.writer.kv_data[0]) if index == 0 else {}]
    if len(shards) > 1:  # in the order and with the types of llama-gguf-split
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, index)
        writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, sum(map(len, shards)))
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, len(shards))
    for tensor in shards[index]:
        ggml_type = gguf.GGMLQuantizationType[tensor.type.upper()]
        shape = tensor.tensor.source.shape
        writer.add_tensor_info(
            tensor.tensor.name, shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=ggml_type
        )
    return writer


def _head(conversion: Conversion | GgufConversion, choices: dict[str, Choice]) -> int:
    """Bytes before the tensors, in one file; their types do not change it."""
    return head_bytes(_writer(conversion, [_lay_out(conversion, choices, {})[0]], 0), conversion.alignment)


def _write(
    conversion: Conversion,
    parts: Parts,
    shards: list[list[Encoded]],
    report: Report,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write with a progress bar over tensors; without a terminal, a line for every tenth of them."""
    n_tensors = sum(map(len, shards))
    step = max(1, n_tensors // 10)
    with bar(f"write {parts.out.name}", n_tensors, quiet) as progress:
        n_done = 0

        def on_tensor(done: Encoded) -> None:
            nonlocal n_done
            n_done += 1
            line = f"{done.tensor.name}: {done.type}, {describe_size(done.nbytes)}"
            progress.advance(1, line if verbose or n_done % step == 0 else None)

        if len(shards) == 1:
            write_gguf(parts.out, _writer(conversion, shards, 0), shards[0], on_tensor)
        else:
            with parts.locked():
                parts.load()
                report.files_kept = len(parts.finished)
                write_shards(parts, shards, partial(_writer, conversion, shards), on_tensor)
