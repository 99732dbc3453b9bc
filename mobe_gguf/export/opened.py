"""First stage of an export: open and check the model, and list its tensors and keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mobe_gguf.core.errors import UsageError
from mobe_gguf.export.conversion import Conversion, add_keys
from mobe_gguf.export.converter import convert
from mobe_gguf.export.factors import add_factors, check_factors, put_experts, put_transforms
from mobe_gguf.export.gguf_target import GgufConversion
from mobe_gguf.export.imatrix import Imatrix
from mobe_gguf.export.origin import Origin
from mobe_gguf.export.refit import find_original
from mobe_gguf.export.request import ExportOptions, ExportRequest
from mobe_gguf.formats.gguf import number_of
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.factors import FactorDirectory, ModelDirectory
from mobe_gguf.models.gguf_source import GgufModel
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.models.original import Original, open_directory
from mobe_gguf.models.wab import WabCheckpoint


@dataclass(frozen=True)
class Opened:
    """A model, ready to be given types.

    ``factors``: the checkpoint, if its factors are written as factors.  ``original``: the model that they were made of;
    ``why``: the reason if there is none.
    """

    checkpoint: ModelDirectory | GgufModel
    conversion: Conversion
    imatrix: Imatrix
    moments: Moments | None
    origin: Origin
    factors: FactorDirectory | None
    original: Original | None = None
    why: str | None = None


def open_model(request: ExportRequest) -> Opened:
    """Open what ``request`` names and put the factors among the tensors.

    MobeError if the model is not valid, UsageError if an option does not fit it.
    """
    recipe, options = request.recipe, request.options
    checkpoint = _checkpoint(request.model, options)
    imatrix = Imatrix(recipe.imatrix)
    moments = Moments(Path(recipe.moments)) if recipe.moments else None
    factors = checkpoint.factors
    if factors is not None:
        check_factors(factors)
    conversion = _convert(checkpoint, request.out, options)
    if factors is not None:
        _put_factors(conversion, factors, options.dense)
    origin = Origin.of(checkpoint, options.base_model, options.dense)
    conversion.finish(recipe.file_type, request.out, origin)
    add_keys(conversion.writer, imatrix.keys())
    if options.experts_used is not None:
        _use_experts(conversion, options.experts_used)
    factors = None if options.dense else factors
    if options.original is not None and factors is None:
        raise UsageError(
            "--original says what factors are solved for again, and none are written here; leave it out"
        )
    original, why = None, None
    if factors is not None and (options.refit or recipe.target or options.original or options.sequential):
        original, why = find_original(factors, options.original or options.source)
    return Opened(checkpoint, conversion, imatrix, moments, origin, factors, original, why)


def _checkpoint(model: Path, options: ExportOptions) -> ModelDirectory | GgufModel:
    if options.wab is not None:
        return WabCheckpoint(model, options.wab)
    if model.is_file():
        if not options.dense:
            raise UsageError(
                f"{model} is a GGUF file without factors. Factorize it, or write it in other types with --dense:\n"
                f"  mobe-gguf factorize {model} factors/"
            )
        return GgufModel(model)
    checkpoint = open_directory(model)
    if checkpoint.factors is None and not (options.allow_dense or options.dense):
        return MobeCheckpoint(model)  # raises with the reason
    return checkpoint


def _convert(checkpoint: ModelDirectory | GgufModel, out: Path, options: ExportOptions) -> Conversion:
    """Everything except the factors: from llama.cpp's converter, or from the GGUF file."""
    checkpoint.check_whole()
    factors, source = checkpoint.factors, checkpoint.gguf_source(options.source)
    if options.rest_from is not None and (source is None or factors is None):
        raise UsageError("--rest-from is for factors of a GGUF file; leave it out")
    if source is None:  # the checkpoint is a GGUF file itself
        return convert(cast(ModelDirectory, checkpoint), out, options.tokenizer_pre, options.verbose)
    if options.tokenizer_pre is not None:
        raise UsageError("--tokenizer-pre: the tokenizer is that of the GGUF file; leave the option out")
    rest = None if options.rest_from is None else GgufModel(options.rest_from)
    conversion = GgufConversion(factors, source, rest)
    if any(out.exists() and out.samefile(file) for file in conversion.files()):
        raise UsageError(f"{out} is the file that is read; write to another")
    return conversion


def _put_factors(conversion: Conversion, checkpoint: FactorDirectory, dense: bool) -> None:
    if dense:
        put_experts(conversion, checkpoint)
        return
    if not checkpoint.under_expert_names:  # else the converter stacks the A's
        put_transforms(conversion, checkpoint)
    add_factors(conversion, checkpoint)


def source_checksum(model: Opened) -> object:
    """Checksum of the original model; for factors the recorded one, None if none was recorded."""
    return model.checkpoint.original_checksum


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
