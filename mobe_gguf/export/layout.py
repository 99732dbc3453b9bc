"""Second and third stage of an export: each tensor gets a type, then the encoder that makes its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mobe_gguf.core.errors import MobeError
from mobe_gguf.export.conversion import Conversion
from mobe_gguf.export.divide import divide
from mobe_gguf.export.encoder import Nearest, Rounding
from mobe_gguf.export.imatrix import Importance, importances, missing_message, of_prediction, without
from mobe_gguf.export.opened import Opened
from mobe_gguf.export.refit import Refitting, Unit, units_of, weigh_transforms
from mobe_gguf.export.request import ExportRequest
from mobe_gguf.export.rounding import bases, diagonals
from mobe_gguf.export.write import Copied, Encoded, head_bytes
from mobe_gguf.formats.contents import ListedTensor
from mobe_gguf.quant.recipe import Choice
from mobe_gguf.runtime import ggml


@dataclass(frozen=True)
class Types:
    """The type of every tensor, and the weights of its columns.

    ``divided``: how ``--target-size`` was met, in words.  ``collected``: tensors whose weights are from a file.
    ``units``: factorized projections by the name of their A.  ``missing``: tensors that need weights but have none.
    """

    choices: Mapping[str, Choice]
    weights: Mapping[str, Importance]
    collected: Mapping[str, Importance]
    units: Mapping[str, Unit]
    missing: list[str]
    divided: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FileLayout:
    """The tensors as they are written, in order, and the report's entry for each."""

    encoded: list[Encoded]
    entries: list[ListedTensor]
    refitting: Refitting | None = None


def choose_types(request: ExportRequest, model: Opened) -> Types:
    """The types that ``request`` asks for.

    MobeError if a type needs an importance matrix and there is none (unless nothing is written).  UsageError as
    ``recipe.plan`` and ``divide``.
    """
    conversion, imatrix, recipe = model.conversion, model.imatrix, request.recipe
    choices = conversion.choose(recipe)
    divided: list[str] = []
    if recipe.target is not None:
        choices, divided = divide(request, model, choices, _head(conversion, choices))
    encoded_here = {n: c for n, c in choices.items() if not conversion.is_copied(n, c)}
    collected = importances(imatrix, conversion.tensors, encoded_here)
    if model.moments is not None and model.factors is not None:
        collected = collected | bases(model.moments, model.factors)
    units = {}
    if model.factors is not None:
        units = units_of(model.factors, imatrix, choices, collected, model.moments)
    if model.moments is not None:
        plain = {n: t for n, t in conversion.tensors.items() if n in encoded_here and n not in units}
        collected = collected | diagonals(model.moments, plain)
    weights = collected | weigh_transforms(units, choices, collected)
    missing = without(weights, encoded_here, recipe.quant)
    if imatrix.files or model.moments is not None:
        weights = weights | of_prediction(missing, conversion.tensors, conversion.keys, conversion.arch)
        missing = [name for name in missing if name not in weights]
    if missing and not request.options.dry_run:
        raise MobeError(missing_message(imatrix, missing, choices, conversion.tensors))
    return Types(choices, weights, collected, units, missing, divided)


def lay_out(request: ExportRequest, model: Opened, types: Types, rounding: Rounding) -> FileLayout:
    """Every tensor with its encoder from ``rounding``; tensors that are solved for again encode themselves."""
    encoded, entries = _tensors(model.conversion, types.choices, types.weights, rounding)
    refitting = None
    if request.options.refit:
        refitting = Refitting.of(types.units, model.original, model.why)
    if refitting is not None:
        encoded = refitting.put(encoded, types.collected)
    return FileLayout(encoded, entries, refitting)


def _tensors(
    conversion: Conversion,
    choices: Mapping[str, Choice],
    weights: Mapping[str, Importance],
    rounding: Rounding,
) -> tuple[list[Encoded], list[ListedTensor]]:
    encoded: list[Encoded] = []
    entries = []
    for tensor in conversion.tensors.values():
        choice, shape = choices[tensor.name], tensor.source.shape
        n_bytes = ggml.type_info(choice.type).tensor_bytes(shape)
        importance = weights.get(tensor.name)
        if conversion.is_copied(tensor.name, choice):
            encoded.append(Copied(tensor, choice.type, n_bytes))
        else:
            encoder = rounding.encoder(tensor, choice.type, importance)
            encoded.append(Encoded(tensor, choice.type, n_bytes, importance, encoder=encoder))
        wanted = choice.wanted if choice.wanted != choice.type else None
        origin = importance.origin if importance else None
        entries.append(ListedTensor(tensor.name, choice.type, shape, n_bytes, wanted, importance=origin))
    return encoded, entries


def _head(conversion: Conversion, choices: Mapping[str, Choice]) -> int:
    """Bytes before the tensors, in one file; their types do not change it."""
    encoded, _ = _tensors(conversion, choices, {}, Nearest())
    return head_bytes(conversion.header([encoded], 0), conversion.alignment)
