"""What could be written of a model: plain files in the types that people use, and factorized ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mobe_gguf.core import names
from mobe_gguf.export.factors import add_mobe_keys
from mobe_gguf.export.write import head_bytes, stored_bytes
from mobe_gguf.plan.layout import Layout
from mobe_gguf.quant.mixture import Spec
from mobe_gguf.quant.recipe import Recipe, plan

#: Plain files, best quality first.
PLAIN = (
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q4_k_m",
    "iq4_xs",
    "q3_k_m",
    "iq3_xxs",
    "q2_k",
    "iq2_xs",
    "iq2_xxs",
    "iq1_m",
)
#: Factorized ones: bases, share of gate and up that is kept, types of B and A, ``--quant`` of the rest.
FACTORIZED = (
    (4, 0.625, "q4_k", "q4_k", "q4_k_m"),
    (4, 0.625, "q4_k", "q3_k", "q4_k_m"),
    (2, 0.625, "q4_k", "q3_k", "q3_k_m"),
    (2, 0.5, "q4_k", "q3_k", "q3_k_m"),
    (2, 0.5, "q4_k", "q2_k", "q2_k"),
)
#: Ranks are multiples of a block, or A's rows would fall back to longer types.
BLOCK = 256
#: Above this share p / d, and below this number of experts, factors save next to nothing.
WIDEST, FEWEST = 0.8, 16


@dataclass(frozen=True)
class Form:
    """One file: tensors with shapes and types; ``options`` of ``mobe-gguf compress`` that make it."""

    name: str
    options: str
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    n_bytes: int
    kept: float = 1.0
    bases: int = 0
    rank: int = 0

    @property
    def factorized(self) -> bool:
        return self.bases > 0

    def tensor_bytes(self, name: str) -> int:
        return stored_bytes(self.shapes[name], self.types[name])


def why_not_factorized(layout: Layout) -> str | None:
    """A sentence if factors are not for this model; None if they may pay."""
    n, p, d = layout.expert_shape()
    if layout.native <= 5:
        return (
            f"The experts are stored in {layout.native:.3g} bits: factors of rounded matrices keep their rounding and add "
            "their own. Keep the experts as they are."
        )
    if n < FEWEST:
        return f"{n} experts a layer are too few to share bases."
    if p > WIDEST * d:
        return f"Experts of {p} x {d} are nearly square: A (p x r) and the bases save next to nothing."
    return None


def forms(layout: Layout) -> list[Form]:
    """All candidates; factorized ones only where they may pay."""
    found = [_plain(layout, quant) for quant in PLAIN]
    if layout.native <= 5:
        found.insert(3, _plain(layout, "mxfp4_moe"))
    if why_not_factorized(layout) is None:
        found += _factorized(layout)
    return found


def _plain(layout: Layout, quant: str) -> Form:
    shapes = dict(layout.tensors)
    types = _types(layout, shapes, Recipe(quant, imatrix=("moments",)))
    return Form(f"{quant}", f"--form plain --quant {quant}", shapes, types, _size(layout, shapes, types))


def _factorized(layout: Layout) -> Iterator[Form]:
    n, p, d = layout.expert_shape()
    seen = set()
    for bases, kept, basis, transform, quant in FACTORIZED:
        rank = BLOCK * max(1, round(kept / (1 / d + bases / (n * p)) / BLOCK))
        if rank >= min(d, n * p) or (bases, rank, transform) in seen:
            continue
        seen.add((bases, rank, transform))
        shapes = _with_factors(layout, bases, rank)
        recipe = Recipe(quant, basis=basis, transform=transform, imatrix=("moments",))
        types = _types(layout, shapes, recipe)
        options = f"--form mobe --bases {bases} --rank {rank} --activation none --quant {quant} --basis-type {basis} --transform-type {transform}"
        name = f"{bases} bases of rank {rank}, {transform}"
        share = rank / d + bases * rank / (n * p)
        yield Form(name, options, shapes, types, _size(layout, shapes, types), share, bases, rank)


def _with_factors(layout: Layout, bases: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Gate and up of every layer as A, B and alpha, where they are two tensors."""
    shapes = dict(layout.tensors)
    for layer in layout.expert_layers:
        for projection in names.PROJECTIONS:
            experts = names.transform_name(layer, projection)
            if experts in shapes:
                n, p, d = shapes[experts]
                shapes[experts] = (n, p, rank)
                shapes[names.basis_name(layer, projection)] = (bases, rank, d)
                shapes[names.mix_name(layer, projection)] = (n, bases)
    return shapes


def _types(layout: Layout, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, str]:
    choices = plan([Spec(name, shape) for name, shape in shapes.items()], recipe, layout.facts)
    return {name: choice.type for name, choice in choices.items()} | {
        name: type_name for name, type_name in layout.forced.items() if name in shapes
    }


def _size(layout: Layout, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> int:
    """Bytes of the file as export writes it without an importance matrix; a vocabulary that is not here is estimated."""
    factorized = shapes.keys() != layout.tensors.keys()
    return file_head(layout, shapes, factorized) + sum(
        stored_bytes(shape, types[name]) for name, shape in shapes.items()
    )


def file_head(layout: Layout, shapes: Mapping[str, tuple[int, ...]], factorized: bool) -> int:
    """Bytes before the tensors: keys and tensor table."""
    import gguf

    keys = gguf.GGUFWriter(path=None, arch=layout.arch)
    if layout.typed_keys:
        keys.kv_data = [dict(layout.typed_keys)]
    if factorized:
        add_mobe_keys(keys, layout.arch, names.MOBE_VERSION, "none", 1)
    table = gguf.GGUFWriter(path=None, arch=layout.arch)
    table.kv_data = keys.kv_data
    for name, shape in shapes.items():
        table.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    if layout.typed_keys:
        return head_bytes(table) + layout.vocabulary_bytes
    had = gguf.GGUFWriter(path=None, arch=layout.arch)  # a GGUF file's own keys stay as they are
    for name, shape in layout.tensors.items():
        had.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    return layout.head_bytes + head_bytes(table) - head_bytes(had)
