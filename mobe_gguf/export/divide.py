"""``--target-size`` and ``--target-bpw``: the types that make the best file of a given size.

Types are chosen for bases, A and experts' matrices, and whether a factorized projection keeps its factors (``alternatives``).  If the moments say how large inputs are, types are chosen for all
matrices that they cover: also attention, shared experts, dense layers and output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from math import prod

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.files import describe_size, format_size
from mobe_gguf.core.progress import bar
from mobe_gguf.export import stream
from mobe_gguf.export.alternatives import Alternatives
from mobe_gguf.export.imatrix import Importance, importances
from mobe_gguf.export.opened import Opened
from mobe_gguf.export.refit import Unit, units_of, weigh_transforms
from mobe_gguf.export.request import ExportRequest
from mobe_gguf.export.rounding import bases, covers, diagonals
from mobe_gguf.export.source import Tensor
from mobe_gguf.export.type_errors import is_divided, measure, shares_of
from mobe_gguf.export.write import stored_bytes
from mobe_gguf.quant.allocate import Target, TooSmall, allocate
from mobe_gguf.quant.mixture import Spec, layer_of
from mobe_gguf.quant.recipe import Choice, allows_quantization, is_fixed

#: Types with fewer bits than this share of the average are not tried: on the shipped model none was chosen, and
#: they are the slowest to encode.
FEWEST = 0.43

#: Any quantized type, to look up importance matrices before the types are chosen.
QUANTIZED = Choice("q4_k", "q4_k")


def divide(
    request: ExportRequest, model: Opened, choices: Mapping[str, Choice], head: int
) -> tuple[dict[str, Choice], list[str]]:
    """``choices`` with other types for the tensors that can be divided, and a description of the result.

    Tensors that an option names keep their types.  ``head``: bytes before the tensors.  UsageError if even the smallest
    types take more than the target, or there is nothing to choose.
    """
    conversion, recipe = model.conversion, request.recipe
    tensors, target = conversion.tensors, recipe.target
    if target is None:
        raise ValueError("the recipe has no target")
    counted = None if model.moments is None else stream.counted(tensors, model.moments)
    wanted = _wanted(request, model, choices, counted)
    if not wanted:
        raise UsageError(
            f"{target.option()}: there are no experts' matrices whose types are not given; leave it out"
        )
    units, weights = _units(model, choices, wanted)
    alternatives = Alternatives.of(model, units, wanted)
    layers = tuple(sorted({layer_of(name) for name in wanted}))
    shares = shares_of(model.original, model.imatrix, layers) if counted is None else None

    def counts(name: str) -> float:
        if counted is not None:
            return counted.get(name, 1.0)
        return 1.0 if shares is None else shares.get(layer_of(name), 1.0)

    def size(name: str, type_name: str, shapes: Mapping[str, Tensor] = tensors) -> int:
        return stored_bytes(shapes[name].source.shape, type_name, conversion.alignment)

    n_params = sum(prod(t.source.shape) for t in tensors.values())
    rest = sum(size(name, choices[name].type) for name in choices.keys() - wanted)
    budget = target.budget(n_params, head) - rest
    average = 8 * budget / sum(prod(tensors[n].source.shape) for n in wanted)
    measured = partial(
        measure, refit=request.options.refit, counts=counts, moments=model.moments, fewest=FEWEST * average
    )
    options, plain = {}, {}
    with bar("measure types", len(wanted) + len(alternatives.plain), request.options.quiet) as progress:
        step = max(1, (len(wanted) + len(alternatives.plain)) // 10)
        for i, (name, curve) in enumerate(
            measured(tensors, wanted, units, weights, size, original=model.original), 1
        ):
            options[name] = curve
            line = f"{name}: error {min(o.error for o in curve):.5f} to {max(o.error for o in curve):.5f}"
            progress.advance(1, line if i % step == 0 else None)
        if model.moments is not None:
            others = alternatives.plain
            known, its_size = diagonals(model.moments, others), partial(size, shapes=others)
            for name, curve in measured(others, set(others), {}, known, its_size):
                plain[name] = curve
                progress.advance(1)
    mixes = {name: size(alternatives.mix(name), "f32") for name in plain}
    options = alternatives.join(options, plain, mixes)
    # a mix, in f32, goes or stays with its factors: its bytes are among theirs
    rest, budget = rest - sum(mixes.values()), budget + sum(mixes.values())
    try:
        chosen = allocate(options, budget)
    except TooSmall as e:
        least = e.least + rest
        smallest = format_size(least + head) if target.bits is None else f"{8 * least / n_params:.3f}"
        raise UsageError(
            f"{target.option()}: with the smallest types that can be had it is {smallest}. Give that or more, another --quant "
            "for the tensors that are not the experts', or --imatrix, which smaller types need."
        ) from None
    largest = sum(max(option.n_bytes for option in curve) for curve in options.values())
    types, left_out = alternatives.part(chosen)
    gone = alternatives.take(model, left_out)
    how = _lines(types)
    if plain:
        count = len(plain) - len(left_out)
        how.append(
            f"{count} of {len(plain)} factorized projections keep their factors; in the rest plain is better"
        )
    error = sum(option.error for option in chosen.values()) / len(layers)
    if largest < budget:
        how.append(_more_than_can_be_used(target, largest + rest, head, n_params, recipe.quant))
    said = "each layer by its share of the residual stream" if shares or counted else "all layers alike"
    how.append(f"expected error {error:.4f} a layer, {said}")
    kept = {name: choice for name, choice in choices.items() if name not in gone}
    return {**kept, **{name: Choice(t, t) for name, t in types.items()}}, how


def _more_than_can_be_used(target: Target, n_bytes: int, head: int, n_params: int, quant: str) -> str:
    """What to say if the largest types take only ``n_bytes``."""
    bits = f"{8 * n_bytes / n_params:.2f} bits per weight"
    taken = describe_size(n_bytes + head) if target.bits is None else bits
    return (
        f"{target.option()} is more than can be used: all experts' matrices have the largest type that is tried, and the file "
        f"takes {taken}. Give the rest more bits by a larger --quant than {quant}"
    )


def _wanted(
    request: ExportRequest,
    model: Opened,
    choices: Mapping[str, Choice],
    counted: Mapping[str, float] | None,
) -> set[str]:
    """The tensors whose types are chosen."""
    tensors, moments, recipe = model.conversion.tensors, model.moments, request.recipe
    return {
        name
        for name, t in tensors.items()
        if is_divided(name, counted)
        and not t.forced
        and allows_quantization(Spec(name, t.source.shape))
        and (is_divided(name) or (moments is not None and covers(moments, t)))
        and not model.conversion.is_copied(name, choices[name])
        and not is_fixed(Spec(name, t.source.shape), recipe, name.replace("_exps.", "_basis.") in tensors)
    }


def _units(
    model: Opened, choices: Mapping[str, Choice], wanted: set[str]
) -> tuple[dict[str, Unit], dict[str, Importance]]:
    """The factorized projections by the name of their A, and the weights of all columns, before types are known."""
    conversion, imatrix, moments, factors = model.conversion, model.imatrix, model.moments, model.factors
    provisional = {**choices, **dict.fromkeys(wanted, QUANTIZED)}
    encoded = {n: c for n, c in provisional.items() if not conversion.is_copied(n, c)}
    weights = importances(imatrix, conversion.tensors, encoded)
    if moments is not None and factors is not None:
        weights |= bases(moments, factors)
    units = units_of(factors, imatrix, provisional, weights, moments) if factors else {}
    if moments is not None:
        ordinary = {n: t for n, t in conversion.tensors.items() if n in wanted and n not in units}
        weights |= diagonals(moments, ordinary)
    return units, weights | weigh_transforms(units, provisional, weights)


def _lines(types: Mapping[str, str]) -> list[str]:
    """``B of gate: q3_k 0-2, q4_k 3`` and so on."""
    from mobe_gguf.core.layers import format_layers

    by_kind: dict[str, dict[str, list[int]]] = {}
    for name, type_name in types.items():
        match = re.fullmatch(r"blk\.\d+\.(?:ffn_(\w+)_(basis|exps)|(\w+))\.weight", name)
        kind = name.removesuffix(".weight") if match is None else match[3] or match[1]
        if match is not None and match[2] == "basis":
            kind += " B"
        by_kind.setdefault(kind, {}).setdefault(type_name, []).append(layer_of(name))
    return [
        f"{kind}: "
        + ", ".join(
            t if layers == [-1] else f"{t} in {format_layers(tuple(layers))}"
            for t, layers in sorted(found.items())
        )
        for kind, found in sorted(by_kind.items())
    ]
