"""Fit and round one layer's experts to measure errors instead of reading them from a table, in about a minute.

The probe takes one projection of one layer (gate of the middle layer).  If moments are given, errors are in the metric
of the experts' inputs.  It measures

- for each plain type, the error of libggml's rounding by the moments' diagonal, and of rounding by the full moments;
- for each factorized form, the error of the fit, and the error after A and the bases were rounded;
- which share of the experts' rows lies in the strongest shared directions, and which it would be for random matrices.

All experts are fitted if that takes no longer than BUDGET.  Otherwise only some are; then factors look better than they
are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mobe_gguf.core import names
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.formula import combine
from mobe_gguf.core.memory import free_memory
from mobe_gguf.core.metric import Roots
from mobe_gguf.core.progress import Bar, bar
from mobe_gguf.export.rounding import matrix
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.original import open_original
from mobe_gguf.plan.forms import Form
from mobe_gguf.plan.layout import Layout
from mobe_gguf.quant.recipe import fitting_type
from mobe_gguf.quant.rounding.rounder import ROUNDED, Rounder
from mobe_gguf.quant.roundtrip import noise
from mobe_gguf.runtime import ggml

#: Seconds for all fits, which decide the number of experts; iterations of a fit; products of p r d in an iteration.
BUDGET, ITERATIONS, PRODUCTS = 60.0, 60, 3
#: Experts on which types are tried, and whose factors are rounded.
SAMPLE = 4


@dataclass(frozen=True)
class TypeProbe:
    """Relative squared error of a type: rounded by libggml with the moments' diagonal, and by the full moments."""

    bits: float
    before: float
    after: float


@dataclass(frozen=True)
class FormProbe:
    """A factorized form: ``bits`` per weight of the projection, error of the ``fit`` and ``after`` rounding.
    ``plain``: error of a plain type of the same bits, interpolated between the measured types."""

    bits: float
    fit: float
    after: float
    plain: float

    @property
    def gain(self) -> float:
        """Above 1 if the factors are better than plain experts of the same size."""
        return self.plain / self.after if self.after else math.inf


@dataclass(frozen=True)
class Probe:
    """``forms`` by name.  ``shared``: share of the experts' squares in the stronger half of their principal directions;
    ``random``: the same for random matrices of these shapes."""

    layer: int
    projection: str
    experts: int
    of: int
    moments: str | None
    types: Mapping[str, TypeProbe]
    forms: Mapping[str, FormProbe]
    shared: float
    random: float
    seconds: float

    def error(self, type_name: str) -> float:
        """The measured error of a type.  For a type that was not measured it is its error on normal values, times the
        mean ratio of the measured types' errors to theirs."""
        if type_name in self.types:
            return self.types[type_name].after
        known = [probe.after / noise(name) for name, probe in self.types.items() if noise(name) > 0]
        return noise(type_name) * (sum(known) / len(known) if known else 1.0)


def probe(
    model: Path, layout: Layout, forms: Sequence[Form], moments: Path | None, quiet: bool = False
) -> Probe:
    """Measure the experts of ``model``, a directory with weights or a GGUF file, for ``forms``.

    UsageError if there are no weights, MobeError if they or the moments cannot be used.
    """
    began = time.monotonic()
    source = open_original(_weights(model))
    source.check_whole()
    layer = source.moe_layers[len(source.moe_layers) // 2]
    projection = "gate" if names.transform_name(layer, "gate") in layout.tensors else "up"
    n, (p, d) = source.n_expert, source.expert_shape(layer, projection)
    wanted = {form.name: form for form in forms if form.factorized}
    known = Moments(moments) if moments is not None else None
    if known is not None:
        known.check(layer, projection, n, d)
    chosen = _experts(n, (p, d), list(wanted.values()))
    tensor = names.transform_name(layer, projection)
    kinds = dict.fromkeys(
        form.types[tensor] for form in forms if not form.factorized and form.types.get(tensor) in ROUNDED
    )
    with bar("probe", len(kinds) + len(wanted) + 1, quiet) as progress:
        progress.update(f"probe: layer {layer} {projection}")
        w = torch.stack([source.expert(layer, projection, e) for e in chosen])
        roots = _roots(known, layer, projection, chosen)
        shared, random = spectrum(w, len(w) * p, d)
        progress.advance(1, f"layer {layer} {projection}: {len(chosen)} of {n} experts read")
        rounders = {e: Rounder(_moments(roots, e, d)) for e in _spread(len(chosen), SAMPLE)}
        types = {kind: _type(w, kind, rounders, progress) for kind in kinds}
        found = {
            name: _form(w, roots, form, (layer, projection, n), rounders, types, progress)
            for name, form in wanted.items()
        }
    return Probe(
        layer, projection, len(chosen), n, None if moments is None else moments.name,
        types, found, shared, random, time.monotonic() - began,
    )  # fmt: skip


def _weights(model: Path) -> Path:
    """The directory or file with the weights."""
    if model.suffix == ".json":
        model = model.parent
    if model.is_dir() and not any(model.glob("*.safetensors")):
        raise UsageError(
            f"--probe {model}: there are no weights to probe; give the model's directory with them, or leave --probe out"
        )
    return model


def _spread(n: int, most: int) -> list[int]:
    count = min(n, most)
    return [i * n // count for i in range(count)]


def _experts(n: int, shape: tuple[int, int], forms: Sequence[Form]) -> list[int]:
    """Indices of as many experts as BUDGET and half of the memory allow, evenly spread, but more than any form has
    bases."""
    p, d = shape
    room = max(1, int(free_memory() // 2 // (4 * 6 * p * d)))
    if not forms:
        return _spread(n, min(SAMPLE, room))
    rank = max(form.rank for form in forms)
    x = torch.randn(p, d)
    y = torch.randn(d, rank)
    x @ y
    began = time.perf_counter()
    x @ y
    each = (time.perf_counter() - began) * ITERATIONS * PRODUCTS * len(forms)
    least = 2 * max(form.bases for form in forms)
    return _spread(n, min(room, max(least, int(BUDGET / each))))


def _roots(moments: Moments | None, layer: int, projection: str, chosen: Sequence[int]) -> Roots | None:
    found = None if moments is None else moments.find(names.transform_name(layer, projection))
    if found is None:
        return None
    some = torch.tensor(chosen)
    return Roots(found.root[some], None if found.rest is None else found.rest[some])


def _moments(roots: Roots | None, e: int, d: int) -> torch.Tensor:
    return torch.eye(d) if roots is None else matrix(roots, e)


def spectrum(w: torch.Tensor, rows: int, d: int) -> tuple[float, float]:
    """Share of the squares in the stronger half of the principal directions: for the rows of ``w`` (``rows`` of length
    ``d``), and for random rows (Marchenko and Pastur 1967)."""
    gram = torch.zeros(d, d)
    for matrix_ in w:
        gram += matrix_.T @ matrix_
    values = torch.linalg.eigvalsh(gram).clamp_min(0).double()
    half = d - d // 2
    shared = float(values[half:].sum() / values.sum())
    ratio = d / rows
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    x = np.linspace(low, high, 20_001)[1:-1]
    density = np.sqrt((high - x) * (x - low)) / x
    order = np.cumsum(density) / density.sum() * min(1.0, 1 / ratio) + max(0.0, 1 - 1 / ratio)
    energy = density * x
    return shared, float(energy[order > 0.5].sum() / energy.sum())


def _type(w: torch.Tensor, kind: str, rounders: Mapping[int, Rounder], progress: Bar) -> TypeProbe:
    before = after = size = 0.0
    for e, rounder in rounders.items():
        _, outcome = rounder.encode(w[e], kind)
        before, after, size = before + outcome.before, after + outcome.after, size + outcome.size
    found = TypeProbe(ggml.type_info(kind).bits, before / size, after / size)
    progress.advance(1, f"{kind}: error {found.before:.4f} -> {found.after:.4f}")
    return found


def _form(
    w: torch.Tensor,
    roots: Roots | None,
    form: Form,
    unit: tuple[int, str, int],
    rounders: Mapping[int, Rounder],
    types: Mapping[str, TypeProbe],
    progress: Bar,
) -> FormProbe:
    layer, projection, n = unit
    _, p, d = w.shape
    settings = Settings(
        form.bases,
        form.rank,
        activation="none",
        basis_type=form.basis_type,
        transform_type=form.transform_type,
    )
    label = f"layer {layer} {projection}"
    factors = fit(w.clone(), settings, weight=roots, label=label, overwrite_w=True)
    kind = fitting_type(form.types[names.transform_name(layer, projection)], form.rank)
    lost = size = 0.0
    for e, rounder in rounders.items():
        s = rounder.problem.s[0].cpu()
        z = combine(factors.mix[e : e + 1], factors.basis)[0]
        data, _ = Rounder(z @ s @ z.T).encode(factors.transform[e], kind, label)
        made = torch.from_numpy(ggml.dequantize(data, kind, form.rank)) @ z
        difference = w[e] - made
        lost += float(((difference @ s) * difference).sum(dtype=torch.float64))
        size += float(((w[e] @ s) * w[e]).sum(dtype=torch.float64))
    basis = names.basis_name(layer, projection)
    bits = 8 * (form.tensor_bytes(names.transform_name(layer, projection)) + form.tensor_bytes(basis))
    bits += 32 * math.prod(form.shapes[names.mix_name(layer, projection)])
    each = bits / (n * p * d)
    found = FormProbe(each, factors.objective, lost / size, at_bits(types, each))
    progress.advance(1, f"{form.name}: error {found.fit:.4f}, rounded {found.after:.4f}, {each:.2f} bits")
    return found


def at_bits(types: Mapping[str, TypeProbe], bits: float) -> float:
    """Error of a plain type with ``bits`` bits, interpolated logarithmically between the two nearest measured types on
    the frontier."""
    best: list[TypeProbe] = []
    for one in sorted(types.values(), key=lambda t: (t.bits, t.after)):
        if not best or one.after < best[-1].after:
            best.append(one)
    if len(best) < 2:
        return best[0].after if best else math.nan
    pairs = list(zip(best, best[1:], strict=False))
    a, b = next((pair for pair in pairs if bits <= pair[1].bits), pairs[-1])
    share = (bits - a.bits) / (b.bits - a.bits)
    return a.after * (b.after / a.after) ** share
