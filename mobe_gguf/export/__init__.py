"""MoBE checkpoint (or any Hugging Face MoE directory) to one GGUF file.

    from mobe_gguf.export import Recipe, export, parse_quant

    report = export("mobe/", "out.gguf", Recipe(parse_quant("q4_k")))

What each part does: ``converter`` runs llama.cpp's own converter for all that is not a factor, ``factors`` adds basis and
mix, ``recipe`` chooses the types, ``source`` reads values in pieces, ``write`` encodes and writes them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from mobe_gguf.checkpoint import Checkpoint
from mobe_gguf.export.converter import Conversion, convert
from mobe_gguf.export.factors import add_factors, check_factors
from mobe_gguf.export.recipe import Choice, Facts, Recipe, Spec, parse_override, parse_quant, parse_type, plan
from mobe_gguf.export.report import Entry, Report, original_params
from mobe_gguf.export.write import Encoded, check_output, check_space, write_gguf
from mobe_gguf.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.progress import bar

__all__ = ["Recipe", "Report", "export", "parse_override", "parse_quant", "parse_type"]


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    tokenizer_pre: str | None = None,
    trust_remote_code: bool = False,
    allow_dense: bool = False,
    dry_run: bool = False,
    verbose: bool = False,
    quiet: bool = False,
) -> Report:
    """Write ``model`` to the GGUF file ``out``; returns what was written.

    ``tokenizer_pre``: value for ``tokenizer.ggml.pre`` instead of what is recognized.  ``trust_remote_code``: run the
    tokenizer's own Python code, if it has some.  ``allow_dense`` also takes an ordinary model, whose experts are then
    written as they are.  ``dry_run`` plans everything and writes nothing.  An existing ``out`` is replaced when the
    new file is whole, not before.
    Raises MobeError if the model is not what it should be, or the file cannot be written.
    """
    started = time.monotonic()
    model, out = Path(model), Path(out)
    checkpoint = _open(model, allow_dense)
    check_output(out)
    if isinstance(checkpoint, MobeCheckpoint):
        check_factors(checkpoint)
    conversion = convert(checkpoint, out, tokenizer_pre, verbose)
    if isinstance(checkpoint, MobeCheckpoint):
        add_factors(conversion, checkpoint)
    conversion.finish(recipe.file_type, out, trust_remote_code)
    choices = _choose(conversion, recipe)
    writer, encoded, entries = _lay_out(conversion, choices)
    report = Report(str(out), conversion.arch, recipe.quant, entries, original_params(entries))
    if conversion.pre is not None:
        report.tokenizer_pre, report.tokenizer_why = conversion.pre.name, conversion.pre.why
    check_space(out, report.data_bytes)
    if not dry_run:
        _write(out, writer, encoded, quiet, verbose)
        report.n_bytes = out.stat().st_size
    report.seconds = time.monotonic() - started
    return report


def _open(model: Path, allow_dense: bool) -> Checkpoint:
    checkpoint = Checkpoint(model)
    if checkpoint.is_mobe or not allow_dense:
        checkpoint = MobeCheckpoint(model)
    return checkpoint


def _choose(conversion: Conversion, recipe: Recipe) -> dict[str, Choice]:
    specs = [Spec(t.name, t.source.shape) for t in conversion.tensors.values()]
    choices = plan(specs, recipe, Facts.of(conversion.arch, conversion.keys))
    return choices | {t.name: Choice(t.forced, t.forced) for t in conversion.tensors.values() if t.forced}


def _lay_out(conversion: Conversion, choices: dict[str, Choice]) -> tuple[Any, list[Encoded], list[Entry]]:
    """A ``gguf.GGUFWriter`` with keys and tensor table, and the tensors in its order."""
    import gguf  # the pinned tree's, which convert() has put in place
    import numpy as np

    writer = gguf.GGUFWriter(path=None, arch=conversion.arch)
    writer.kv_data = conversion.writer.kv_data
    encoded, entries = [], []
    for tensor in conversion.tensors.values():
        choice, shape = choices[tensor.name], tensor.source.shape
        ggml_type = gguf.GGMLQuantizationType[choice.type.upper()]
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        n_bytes = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes, raw_dtype=ggml_type)
        encoded.append(Encoded(tensor, choice.type, n_bytes))
        wanted = choice.wanted if choice.wanted != choice.type else None
        entries.append(Entry(tensor.name, choice.type, shape, n_bytes, wanted))
    return writer, encoded, entries


def _write(out: Path, writer: Any, encoded: list[Encoded], quiet: bool, verbose: bool) -> None:
    """Write with a progress bar over tensors; without a terminal, a line for every tenth of them."""
    step = max(1, len(encoded) // 10)
    with bar(f"write {out.name}", len(encoded), quiet) as progress:
        n_done = 0

        def on_tensor(done: Encoded) -> None:
            nonlocal n_done
            n_done += 1
            line = f"{done.tensor.name}: {done.type}, {done.nbytes / 1e6:.2f} MB"
            progress.advance(1, line if verbose or n_done % step == 0 else None)

        write_gguf(out, writer, encoded, on_tensor)
