"""``--target-size`` and ``--target-bpw``: the types that make the best file of a given size.

Types are chosen for bases, A and experts' matrices.  If the moments say how large inputs are, types are chosen for all
matrices that they cover: also attention, shared experts, dense layers and output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.files import describe_size, format_size
from mobe_gguf.core.progress import bar
from mobe_gguf.export import stream
from mobe_gguf.export.imatrix import importances
from mobe_gguf.export.opened import Opened
from mobe_gguf.export.refit import units_of, weigh_transforms
from mobe_gguf.export.request import ExportRequest
from mobe_gguf.export.rounding import bases, covers, diagonals
from mobe_gguf.export.type_errors import is_divided, measure, shares_of
from mobe_gguf.export.write import stored_bytes
from mobe_gguf.quant.allocate import TooSmall, allocate
from mobe_gguf.quant.mixture import Spec, layer_of
from mobe_gguf.quant.recipe import Choice, allows_quantization, is_fixed

#: Any quantized type, to look up importance matrices before the types are chosen.
QUANTIZED = Choice("q4_k", "q4_k")


def divide(
    request: ExportRequest, model: Opened, choices: Mapping[str, Choice], head: int
) -> tuple[dict[str, Choice], list[str]]:
    """``choices`` with other types for the tensors that can be divided, and a description of the result.

    Tensors that an option names keep their types.  ``head``: bytes before the tensors.  UsageError if even the smallest
    types take more than the target, or there is nothing to choose.
    """
    conversion, imatrix, recipe = model.conversion, model.imatrix, request.recipe
    tensors, target, moments = conversion.tensors, recipe.target, model.moments
    if target is None:
        raise ValueError("the recipe has no target")
    counted = None if moments is None else stream.counted(tensors, moments)
    wanted = {
        name
        for name, t in tensors.items()
        if is_divided(name, counted)
        and not t.forced
        and allows_quantization(Spec(name, t.source.shape))
        and (is_divided(name) or (moments is not None and covers(moments, t)))
        and not conversion.is_copied(name, choices[name])
        and not is_fixed(Spec(name, t.source.shape), recipe, name.replace("_exps.", "_basis.") in tensors)
    }
    if not wanted:
        raise UsageError(
            f"{target.option()}: there are no experts' matrices whose types are not given; leave it out"
        )

    def size(name: str, type_name: str) -> int:
        return stored_bytes(tensors[name].source.shape, type_name, conversion.alignment)

    provisional = {**choices, **dict.fromkeys(wanted, QUANTIZED)}
    encoded = {n: c for n, c in provisional.items() if not conversion.is_copied(n, c)}
    weights = importances(imatrix, tensors, encoded)
    if moments is not None and model.factors is not None:
        weights |= bases(moments, model.factors)
    units = units_of(model.factors, imatrix, provisional, weights, moments) if model.factors else {}
    if moments is not None:
        weights |= diagonals(moments, {n: t for n, t in tensors.items() if n in wanted and n not in units})
    weights |= weigh_transforms(units, provisional, weights)
    layers = tuple(sorted({layer_of(name) for name in wanted}))
    shares = shares_of(model.original, imatrix, layers) if counted is None else None

    def counts(name: str) -> float:
        if counted is not None:
            return counted.get(name, 1.0)
        return 1.0 if shares is None else shares.get(layer_of(name), 1.0)

    options = {}
    with bar("measure types", len(wanted), request.options.quiet) as progress:
        found = measure(
            tensors, wanted, units, weights, size, refit=request.options.refit, counts=counts, moments=moments
        )
        for i, (name, curve) in enumerate(found, 1):
            options[name] = curve
            line = f"{name}: error {min(o.error for o in curve):.5f} to {max(o.error for o in curve):.5f}"
            progress.advance(1, line if i % max(1, len(wanted) // 10) == 0 else None)
    rest = sum(size(n, c.type) for n, c in choices.items() if n not in wanted)
    n_params = sum(prod(t.source.shape) for t in tensors.values())
    budget = target.budget(n_params, head) - rest
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
    how = _lines({name: option.type for name, option in chosen.items()})
    error = sum(option.error for option in chosen.values()) / len(layers)
    if largest < budget:
        taken = largest + rest + head
        what = (
            f"{describe_size(taken)}"
            if target.bits is None
            else f"{8 * (largest + rest) / n_params:.2f} bits per weight"
        )
        how.append(
            f"{target.option()} is more than can be used: all experts' matrices have the largest type that is tried, and the file "
            f"takes {what}. Give the rest more bits by a larger --quant than {recipe.quant}"
        )
    said = "each layer by its share of the residual stream" if shares or counted else "all layers alike"
    how.append(f"expected error {error:.4f} a layer, {said}")
    return {**choices, **{n: Choice(o.type, o.type) for n, o in chosen.items()}}, how


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
