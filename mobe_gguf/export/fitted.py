"""The types that factors were fitted for by ``factorize --for TYPE``: the defaults of their export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.formats.safetensors import read_json
from mobe_gguf.models.factors import FactorDirectory, recorded
from mobe_gguf.models.gguf_source import FACTORS_NAME
from mobe_gguf.quant.recipe import ALIASES, BLOCK, FLOATS, QUANTS, Choice, fitting_type


def fitted_types(path: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Types of B and A in config.json or factors.json; None for a type that is missing or unknown.

    MobeError, which names ``path``, if a value is not a name.
    """
    found = {key: recorded(config, "settings", key) for key in ("for_basis", "for_transform")}
    for key, name in found.items():
        if name is not None and not isinstance(name, str):
            raise MobeError(
                f'{path}: mobe.settings.{key} is {json.dumps(name)}, expected the name of a ggml type, as "q4_k", or null. '
                "Mend it or factorize the model again"
            )
    basis, transform = (name if name in BLOCK else None for name in found.values())
    return basis, transform


def default_types(model: Path) -> tuple[str, str, str]:
    """``(--quant, --basis-type, --transform-type)`` for factors exported as they were fitted.

    UsageError if the factors in ``model`` were not fitted for one type.
    """
    path = next((p for p in (model / FACTORS_NAME, model / "config.json") if p.is_file()), None)
    basis, transform = fitted_types(path, read_json(path)) if path else (None, None)
    if basis is None and transform is None:
        raise UsageError(
            f"--quant is needed: {model} does not say which type its factors were fitted for (factorize --for TYPE). "
            "For instance --quant q4_k"
        )
    if basis is None or basis != transform or ALIASES.get(basis, basis) not in QUANTS:
        raise UsageError(
            f"--quant is needed: the factors in {model} were fitted for bases of {basis or 'no type'} and A's of "
            f"{transform or 'no type'}, which does not say what the other tensors are to be. For instance --quant q4_k"
            + (f" --basis-type {basis}" if basis else "")
            + (f" --transform-type {transform}" if transform else "")
        )
    return ALIASES.get(basis, basis), basis, basis


def mismatch(checkpoint: FactorDirectory, choices: Mapping[str, Choice]) -> str | None:
    """A warning if factors get other quantized types than they were fitted for, else None."""
    fitted = dict(zip(("basis", "transform"), fitted_types(checkpoint.path, checkpoint.config), strict=True))
    got: dict[str, set[str]] = {"basis": set(), "transform": set()}
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        for projection in layer.projections:
            row, a_row = layer.basis_shape(projection)[-1], layer.transform_shape(projection)[-1]
            for kind, name, length in (
                ("basis", names.basis_name(index, projection), row),
                ("transform", names.transform_name(index, projection), a_row),
            ):
                chosen, wanted = choices[name].type, fitted[kind]
                if wanted is not None and chosen not in FLOATS and chosen != fitting_type(wanted, length):
                    got[kind].add(chosen)
    words = [
        f"{what} were fitted for {fitted[kind]} and are written as {', '.join(sorted(got[kind]))}"
        for kind, what in (("basis", "bases"), ("transform", "A's"))
        if got[kind]
    ]
    if not words:
        return None
    return f"warning: {'; '.join(words)}. Leave --quant out for the types that they were fitted for, or factorize --for these"
