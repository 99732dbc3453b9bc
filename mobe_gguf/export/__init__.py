"""MoBE checkpoint (or any Hugging Face MoE directory) to GGUF.

    from mobe_gguf.export import Recipe, export, parse_quant

    report = export("mobe/", "out.gguf", Recipe(parse_quant("q4_k")))

An export has four stages.  ``opened``: the model is read, ``converter`` (llama.cpp's own) or ``gguf_target`` gives its tensors and
keys, ``factors`` adds bases and mix.  ``layout``: each tensor gets a type (``recipe``, ``divide``), then an encoder (``encoder``,
``refit``).  ``write`` and ``shards`` write the files.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mobe_gguf.core.atomic import check_output, destination
from mobe_gguf.core.files import Unchanged, check_space, describe_size, parse_size
from mobe_gguf.core.progress import bar
from mobe_gguf.core.tensors import is_down, is_transform
from mobe_gguf.export import rehearsal
from mobe_gguf.export.card import Subject, write_card
from mobe_gguf.export.encoder import Nearest, Rounding
from mobe_gguf.export.fitted import default_types, mismatch
from mobe_gguf.export.imatrix import remarks
from mobe_gguf.export.journal import Journal
from mobe_gguf.export.layout import FileLayout, Types, choose_types, lay_out
from mobe_gguf.export.opened import Opened, open_model, source_checksum
from mobe_gguf.export.report import Report
from mobe_gguf.export.request import ExportOptions, ExportRequest
from mobe_gguf.export.rounding import ByMoments, few_tokens
from mobe_gguf.export.rounding_time import expected_seconds
from mobe_gguf.export.sequential import Sequential
from mobe_gguf.export.shards import Parts, check_places, cut, fingerprint, shard_paths, write_shards
from mobe_gguf.export.write import Copied, Encoded, head_bytes, write_gguf
from mobe_gguf.formats.contents import original_params
from mobe_gguf.formats.gguf import padded
from mobe_gguf.models.factors import recorded
from mobe_gguf.quant.allocate import parse_target
from mobe_gguf.quant.recipe import FLOATS, SLOW, Recipe, parse_override, parse_quant, parse_type
from mobe_gguf.quant.small import is_small, small_line

__all__ = [
    "ExportOptions",
    "Recipe",
    "Report",
    "ExportRequest",
    "default_types",
    "export",
    "parse_override",
    "parse_quant",
    "parse_size",
    "parse_target",
    "parse_type",
    "write_model",
]


#: What to tell a user who rounds such factors without the moments.
FITTED_BY_MOMENTS = "warning: these factors were fitted by second moments; export --moments FILE, the same file, rounds them by these, too, and loses much less"


def export(
    model: str | os.PathLike[str], out: str | os.PathLike[str], recipe: Recipe, **options: Any
) -> Report:
    """Write ``model`` to the GGUF file ``out``: :func:`write_model` with ``options``, the fields of :class:`ExportOptions`."""
    return write_model(ExportRequest(Path(model), Path(out), recipe, ExportOptions(**options)))


def write_model(request: ExportRequest) -> Report:
    """Write the file that ``request`` asks for, or several; returns what was written.

    An existing file is replaced only once the new one is complete.  If ``out`` is a symbolic link, its target is
    replaced; several files are not written through links.  An interrupted export of several files resumes at the
    unfinished one. Raises MobeError if the model is not valid, or the file cannot be written.
    """
    started = time.monotonic()
    options = request.options
    request.check()
    check_output(request.out, request.inputs)
    unchanged = Unchanged(request.model)
    model = open_model(request)
    types = choose_types(request, model)
    rounding = _rounding(model, types)
    layout = lay_out(request, model, types, rounding)
    sequential = Sequential(request, model, types.choices) if options.sequential else None
    if sequential is not None:
        layout = replace(layout, encoded=sequential.put(layout.encoded))
    shards = cut(layout.encoded, options.split_max_size, model.conversion.alignment)
    paths = shard_paths(request.out, len(shards))
    check_places(paths)
    for path in paths if len(paths) > 1 else ():
        check_output(path, [*request.inputs, *model.conversion.files()])
    report = _report(request, model, types, layout, paths)
    key = fingerprint(
        [*model.checkpoint.source_files(), *model.conversion.files(), *map(Path, request.recipe.imatrix)],
        model.conversion.keys,
        layout.entries,
        options.wab,
        layout.refitting and layout.refitting.fingerprint,
        rounding.fingerprint,
        sequential and sequential.fingerprint,
    )
    parts = Parts(request.out if len(paths) > 1 else destination(request.out), key)
    begun = parts.unfinished()
    check_space(
        parts.out,
        max(begun, report.data_bytes - begun),
        parts.finished_files(),
        "Make room, write elsewhere, or choose a smaller --quant.",
    )
    if report.data_bytes - begun > rehearsal.LONG:
        conversion = model.conversion
        rehearsal.ask_loader(
            request.model, lambda i: conversion.header(shards, i), shards, conversion.alignment
        )
    if options.dry_run:
        report.n_bytes = _size(model, shards)
        if isinstance(rounding, ByMoments):
            report.rounding_seconds = expected_seconds(layout.encoded, rounding)
    else:
        with contextlib.nullcontext() if sequential is None else sequential.running():
            _write(request, model, parts, shards, report, rounding, unchanged)
        if sequential is not None and isinstance(rounding, ByMoments):
            rounding.outcomes |= sequential.outcomes
        report.rounded = rounding.report() if isinstance(rounding, ByMoments) else None
        report.refit = None if layout.refitting is None else layout.refitting.outcome()
        report.n_bytes, report.written = sum(path.stat().st_size for path in paths), True
        sizes = [(e.tensor.name, e.type, e.squares.rms) for e in layout.encoded]
        if small := [found for found in sizes if is_small(*found[1:])]:
            report.notes.append(small_line(small))
        if options.card:
            report.card = write_card(_subject(request, model, types, report))
    report.seconds = time.monotonic() - started
    return report


def _rounding(model: Opened, types: Types) -> Rounding:
    """Rounding by second moments if there are any, else libggml's own."""
    return Nearest() if model.moments is None else ByMoments(model.moments, frozenset(types.units))


def _size(model: Opened, shards: list[list[Encoded]]) -> int:
    """Bytes of all files together, before they are written."""
    alignment = model.conversion.alignment
    heads = sum(head_bytes(model.conversion.header(shards, i), alignment) for i in range(len(shards)))
    return heads + sum(padded(tensor.nbytes, alignment) for shard in shards for tensor in shard)


def _report(
    request: ExportRequest, model: Opened, types: Types, layout: FileLayout, paths: list[Path]
) -> Report:
    """The report, as far as it is known before anything is written."""
    conversion, entries = model.conversion, layout.entries
    report = Report(str(paths[0]), conversion.arch, request.recipe.quant, entries, original_params(entries))
    report.files, report.needs_imatrix = [str(path) for path in paths], len(types.missing)
    report.divided = types.divided
    report.notes += conversion.notes
    if model.factors is not None and (note := mismatch(model.factors, types.choices)):
        report.notes.append(note)
    report.notes += remarks(model.imatrix, types.choices)
    chosen = {choice.type for name, choice in types.choices.items() if is_transform(name) or is_down(name)}
    report.notes += [f"{kind} has {SLOW[kind]}" for kind in sorted(chosen & SLOW.keys())]
    if model.moments is not None:
        notes = model.moments.of_another(source_checksum(model)), few_tokens(model.moments, types.choices)
        report.notes += [note for note in notes if note is not None]
    elif model.factors is not None and recorded(model.factors.config, "settings", "moments") is not None:
        if request.recipe.quant not in FLOATS:
            report.notes.append(FITTED_BY_MOMENTS)
    report.copied = sum(isinstance(tensor, Copied) for tensor in layout.encoded)
    if conversion.pre is not None:
        report.tokenizer_pre, report.tokenizer_why = conversion.pre.name, conversion.pre.why
    return report


def _subject(request: ExportRequest, model: Opened, types: Types, report: Report) -> Subject:
    """What the card is about."""
    words = request.options.words()
    words += () if request.options.refit or not types.units else ("--no-refit",)
    keys, dense = model.conversion.keys, request.options.dense
    return Subject(report, keys, model.checkpoint, request.recipe, model.origin, dense, words)


def _write(
    request: ExportRequest,
    model: Opened,
    parts: Parts,
    shards: list[list[Encoded]],
    report: Report,
    rounding: Rounding,
    unchanged: Unchanged,
) -> None:
    """Write with a progress bar over tensors; without a terminal, a line for every tenth of them."""
    n_tensors = sum(map(len, shards))
    step = max(1, n_tensors // 10)
    with bar(f"write {parts.out.name}", n_tensors, request.options.quiet) as progress:
        n_done = 0

        def on_tensor(done: Encoded) -> None:
            nonlocal n_done
            n_done += 1
            line = f"{done.tensor.name}: {done.type}, {describe_size(done.nbytes)}"
            if said := rounding.said(done.tensor.name):
                line = f"{line}, {said}"
            progress.advance(1, line if request.options.verbose or n_done % step == 0 else None)
            if done is shards[-1][-1]:  # the file does not have its name yet
                unchanged.check("nothing was written; run again")

        def head(index: int) -> Any:
            return model.conversion.header(shards, index)

        journal = None
        if isinstance(rounding, ByMoments):
            journal = partial(Journal, key=parts.key, rounding=rounding)
        if len(shards) == 1 and journal is None:
            write_gguf(parts.out, head(0), shards[0], on_tensor)
        else:
            with parts.locked():
                parts.load()
                report.files_kept = len(parts.finished)
                write_shards(parts, shards, head, on_tensor, journal)
