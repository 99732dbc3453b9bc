"""Size of a factorized model's GGUF file before there are factors, for ``factorize --target 12GB``.

The original goes through the steps of ``export`` up to the tensor table; then A and B replace the experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.sides import side
from mobe_gguf.export.conversion import add_keys
from mobe_gguf.export.converter import convert
from mobe_gguf.export.factors import add_mobe_keys
from mobe_gguf.export.imatrix import Imatrix
from mobe_gguf.export.write import head_bytes, stored_bytes
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.quant.mixture import ModelFacts, Spec
from mobe_gguf.quant.recipe import Recipe, plan


@dataclass(frozen=True)
class Prediction:
    """Bytes of a file.  ``fixed``: everything except the factors, header and tensor table included.

    ``types``: ``(A, B)`` of each (layer, projection), by rank.  ``plain``: bytes of the file with ordinary experts.
    """

    fixed: int
    plain: int
    types: Mapping[tuple[int, str, int], tuple[str, str]]
    shapes: tuple[int, int, int]
    groups: int
    by_row: bool

    def unit(self, layer: int, projection: str, bases: int, rank: int) -> int:
        """Bytes of A, B and alpha of one unit."""
        a, b, mix = factor_shapes(*self.shapes, projection, bases, rank, self.groups, self.by_row)
        type_a, type_b = self.types[layer, projection, rank]
        return stored_bytes(a, type_a) + stored_bytes(b, type_b) + stored_bytes(mix, "f32")


def predict(
    checkpoint: Checkpoint,
    units: Iterable[tuple[int, str]],
    recipe: Recipe,
    ranks: Iterable[int],
    *,
    groups: int,
    by_row: bool,
    activation: str,
) -> Prediction:
    """The prediction for factors of ``units`` in the types of ``recipe``, at any of ``ranks``.

    MobeError if the runtime is not built, or if the converter refuses the model or puts gate and up into one tensor.
    """
    units, sizes = list(units), (checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd)
    conversion = convert(checkpoint, Path("model.gguf"))
    conversion.finish(recipe.file_type, Path("model.gguf"))
    arch = conversion.arch
    add_mobe_keys(conversion.writer, arch, names.MOBE_VERSION, activation, groups)
    add_keys(conversion.writer, Imatrix(recipe.imatrix).keys())
    plain = {t.name: t.source.shape for t in conversion.tensors.values()}
    for layer, projection in units:
        if names.transform_name(layer, projection) not in plain:
            raise MobeError(
                f"{checkpoint.path}: llama.cpp's converter makes no tensor {names.transform_name(layer, projection)} of "
                "this model, so the size of its file cannot be told. Give --target as a share, as 0.75."
            )
    forced = {t.name: t.forced for t in conversion.tensors.values() if t.forced}
    facts = ModelFacts.of(arch, conversion.keys)
    types: dict[tuple[int, str, int], tuple[str, str]] = {}
    factors: dict[str, tuple[int, ...]] = {}
    chosen: dict[str, str] = {}
    for rank in ranks:
        for layer, projection in units:
            made = factor_shapes(*sizes, projection, groups, rank, groups, by_row)
            factors |= zip(names.factor_names(layer, projection), made, strict=True)
        chosen = types_of(plain | factors, recipe, facts) | forced
        for layer, projection in units:
            a, b, _ = names.factor_names(layer, projection)
            types[layer, projection, rank] = chosen[a], chosen[b]
    # the types of all other tensors and the length of the table do not depend on the rank
    rest = sum(stored_bytes(shape, chosen[name]) for name, shape in plain.items() if name not in factors)
    fixed = _head(conversion, plain | factors) + rest
    originally = types_of(plain, recipe, facts) | forced
    ordinary = sum(stored_bytes(shape, originally[name]) for name, shape in plain.items())
    return Prediction(fixed, _head(conversion, plain) + ordinary, types, sizes, groups, by_row)


def factor_shapes(
    n: int, p: int, d: int, projection: str, bases: int, rank: int, groups: int, by_row: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of A, B and alpha in torch's order; for down the bases are on the output side."""
    on = side(projection)
    basis = on.basis(rank, d)
    mix = (n, bases // groups) + ((basis[0],) if by_row else ())
    return (n, *on.transform(p, rank)), (bases, *basis), mix


def types_of(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, facts: ModelFacts) -> dict[str, str]:
    choices = plan([Spec(name, shape) for name, shape in shapes.items()], recipe, facts)
    return {name: choice.type for name, choice in choices.items()}


def _head(conversion: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes before the tensors of a file with the conversion's keys."""
    return table_bytes(conversion.arch, conversion.writer.kv_data[0], shapes)


def table_bytes(arch: str, keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes before the tensors, for ``keys`` as gguf's writer holds them."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path=None, arch=arch)
    writer.kv_data = [dict(keys)]
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * prod(shape))
    return head_bytes(writer)
