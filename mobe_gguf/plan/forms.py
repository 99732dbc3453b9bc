"""The files that could be made of a model: plain ones in common types, and factorized ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mobe_gguf.core import names
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.sides import side
from mobe_gguf.export.factors import add_mobe_keys
from mobe_gguf.export.predict import factor_shapes, table_bytes, types_of
from mobe_gguf.export.write import stored_bytes
from mobe_gguf.plan.layout import Layout
from mobe_gguf.quant.recipe import MIXES, Recipe

#: Plain files, best quality first.
PLAIN = (
    "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_l", "q3_k_m", "iq3_m", "q3_k_s", "iq3_s", "iq3_xs", "iq3_xxs",
    "q2_k", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "two-bit", "iq1_m", "one-bit",
)  # fmt: skip
#: Factorized files: number of bases, share of gate and up that is kept, types of B and A, ``--quant`` of the rest.
FACTORIZED = (
    (4, 0.625, "q4_k", "q4_k", "q4_k_m"),
    (4, 0.625, "q4_k", "q3_k", "q4_k_m"),
    (2, 0.625, "q4_k", "q3_k", "q3_k_m"),
    (2, 0.5, "q4_k", "q3_k", "q3_k_m"),
    (2, 0.5, "q4_k", "q2_k", "q2_k"),
)
#: Ranks are multiples of a block, or A's rows would fall back to larger types.  Models too narrow for ranks in steps of
#: 256 have ranks in steps of 32, and A in types with blocks of 32.
BLOCK, NARROW, NARROW_BLOCK = 256, 1536, 32
SHORT = {"q4_k": "iq4_nl", "q3_k": "iq4_nl", "q2_k": "iq4_nl"}
#: Above this share p / d, and below this number of experts, factors save next to nothing.
WIDEST, FEWEST = 0.8, 16


@dataclass(frozen=True)
class Form:
    """One file: tensors with shapes and types; ``options``: those of ``mobe-gguf compress`` that make it."""

    name: str
    options: str
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    n_bytes: int
    kept: float = 1.0
    bases: int = 0
    rank: int = 0
    quant: str = ""
    basis_type: str | None = None
    transform_type: str | None = None

    @property
    def factorized(self) -> bool:
        return self.bases > 0

    def made(self) -> dict[str, str | int | None]:
        """Options of ``mobe-gguf compress`` that make it, by name."""
        if not self.factorized:
            return {"form": "plain", "quant": self.quant}
        return {
            "form": "mobe",
            "quant": self.quant,
            "bases": self.bases,
            "rank": self.rank,
            "basis_type": self.basis_type,
            "transform_type": self.transform_type,
        }

    def tensor_bytes(self, name: str) -> int:
        return stored_bytes(self.shapes[name], self.types[name])


@dataclass(frozen=True, kw_only=True)
class Given:
    """What factorized forms must have; what is None is chosen.  ``kept``: share of each factorized matrix's parameters.
    ``layers``: None for all."""

    bases: int | None = None
    rank: int | None = None
    kept: float | None = None
    basis_type: str | None = None
    transform_type: str | None = None
    quant: str | None = None
    groups: int = 1
    by_row: bool = False
    projections: tuple[str, ...] = names.PROJECTIONS
    layers: tuple[int, ...] | None = None


def why_not_factorized(layout: Layout) -> str | None:
    """A sentence that says why factors do not suit this model; None if they may help."""
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
    """All candidates; factorized ones only if they may help.  Left out: mixes with types that the rows do not allow."""
    found = []
    for quant in PLAIN:
        try:
            found.append(plain_form(layout, quant))
        except UsageError:
            if quant not in MIXES:
                raise
    if layout.native <= 5:
        found.insert(3, plain_form(layout, "mxfp4_moe"))
    if why_not_factorized(layout) is None:
        found += factorized_forms(layout)
    return found


def plain_form(layout: Layout, quant: str) -> Form:
    """Ordinary experts in the types of llama-quantize's mixture ``quant``, chosen as with an importance matrix."""
    shapes = dict(layout.tensors)
    types = _types(layout, shapes, Recipe(quant, imatrix=("moments",)))
    options = f"--form plain --quant {quant}"
    return Form(quant, options, shapes, types, _size(layout, shapes, types), quant=quant)


def factorized_forms(layout: Layout, given: Given = Given()) -> Iterator[Form]:
    """The factorized forms of FACTORIZED, with few, wide bases and no activation; what is ``given`` replaces theirs."""
    n, p, d = layout.expert_shape()
    block = BLOCK if d >= NARROW else NARROW_BLOCK
    seen = set()
    for m, kept, basis, transform, rest in FACTORIZED:
        m = given.bases or given.groups * max(1, round(m / given.groups))
        rest, basis, kept = given.quant or rest, given.basis_type or basis, given.kept or kept
        transform = given.transform_type or (transform if block == BLOCK else SHORT[transform])
        r = given.rank or block * max(1, round(kept / (1 / d + m / (n * p)) / block))
        if (m, r, basis, transform, rest) in seen or (given.rank is None and r >= d):
            continue
        seen.add((m, r, basis, transform, rest))
        shapes = _with_factors(layout, m, r, given)
        recipe = Recipe(rest, basis=basis, transform=transform, imatrix=("moments",))
        types = _types(layout, shapes, recipe)
        options = f"--form mobe --bases {m} --rank {r} --quant {rest} --basis-type {basis} --transform-type {transform}"
        size, share = _size(layout, shapes, types), r / d + m * r / (n * p)
        name = f"{m} bases of rank {r}, {transform}"
        yield Form(name, options, shapes, types, size, share, m, r, rest, basis, transform)


def _with_factors(layout: Layout, bases: int, rank: int, given: Given) -> dict[str, tuple[int, ...]]:
    """Shapes with A, B and alpha instead of the matrices that are to be factorized, if gate and up are two tensors."""
    shapes = dict(layout.tensors)
    for layer in layout.expert_layers if given.layers is None else given.layers:
        for projection in given.projections:
            experts = layout.tensors.get(names.transform_name(layer, projection))
            if experts is None:
                continue
            d = experts[side(projection).d_axis]
            sizes = experts[0], math.prod(experts[1:]) // d, d
            made = factor_shapes(*sizes, projection, bases, rank, given.groups, given.by_row)
            shapes |= zip(names.factor_names(layer, projection), made, strict=True)
    return shapes


def _types(layout: Layout, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, str]:
    return types_of(shapes, recipe, layout.facts) | {
        name: type_name for name, type_name in layout.forced.items() if name in shapes
    }


def _size(layout: Layout, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> int:
    """Bytes of the file as export writes it without an importance matrix; the size of a missing vocabulary is
    estimated."""
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
    stored = keys.kv_data[0]
    if layout.typed_keys:
        return table_bytes(layout.arch, stored, shapes) + layout.vocabulary_bytes
    # a GGUF file keeps its own keys; only what is added to them and to the table is computed
    had = table_bytes(layout.arch, gguf.GGUFWriter(path=None, arch=layout.arch).kv_data[0], layout.tensors)
    return layout.head_bytes + table_bytes(layout.arch, stored, shapes) - had
