"""The error of each type in each matrix of the experts, measured with the encoders on some experts of every layer.

An error is the squared error of the outputs relative to their square, for inputs as the importance matrix saw them:

- bases: ``|W - A Z|^2 / |W|^2`` with rounded bases and A unchanged or solved for again (``refit``); W is the original
  matrix, so this includes the error of the fit, or without the original the product of the unrounded factors;
- A: the same with A rounded and the bases unchanged;
- ordinary experts and down: the same with W rounded.

Errors of different matrices are independent, so they add up.  The errors of a layer are weighted by its experts' share
of the residual stream (``models/residual.py``), if the original model and an importance matrix of it are there. Memory:
one group's bases twice and SAMPLE experts.  Time: the bases are encoded once in each type of the ladder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import numpy as np
import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.tensors import is_down, is_transform
from mobe_gguf.export.decoded import each_decoded, rounded
from mobe_gguf.export.imatrix import Imatrix, Importance
from mobe_gguf.export.refit import Unit
from mobe_gguf.export.refit_solve import ANCHOR_BY_MOMENTS, cost, second_moments, solve, squares
from mobe_gguf.export.rounding import covers, matrix
from mobe_gguf.export.source import Tensor
from mobe_gguf.formats.moments import Moments
from mobe_gguf.formats.types import BY_NAME
from mobe_gguf.models.original import Original
from mobe_gguf.models.residual import layer_shares
from mobe_gguf.quant.allocate import BY_MOMENTS, LADDER, Option
from mobe_gguf.quant.recipe import BLOCK, fitting_type, requires_imatrix
from mobe_gguf.quant.rounding.rounder import ROUNDED, Outcome, Rounder

#: Experts of a layer that are measured.  The first ones are taken, since experts have no order.
SAMPLE = 4

#: Rows of each that are rounded by second moments.
SAMPLE_ROWS = 64

#: ``(name, type) -> bytes``.
Size = Callable[[str, str], int]


def is_divided(name: str, counted: Mapping[str, float] | None = None) -> bool:
    """Whether a type is chosen for the tensor ``name``: for experts' matrices, factorized or not, for bases, and for
    every matrix whose error has a known weight (``stream``)."""
    experts = is_transform(name) or is_down(name) or name.endswith("_basis.weight")
    return experts or (counted is not None and name in counted)


def ladder(tensor: Tensor, weights: Importance | None, by_moments: bool = False) -> list[str]:
    """Types of LADDER that the row length of ``tensor`` allows.  ``by_moments``: of BY_MOMENTS, too."""
    row = tensor.source.shape[-1]
    types = [t for t in BY_MOMENTS if by_moments and row % BLOCK[t] == 0]
    fitting = dict.fromkeys([*types, *(fitting_type(t, row) for t in LADDER)])
    return [t for t in fitting if weights is not None or not requires_imatrix(tensor.name, t, "")]


# wide: everything that an error depends on
def measure(
    tensors: Mapping[str, Tensor],
    wanted: set[str],
    units: Mapping[str, Unit],
    weights: Mapping[str, Importance],
    size: Size,
    *,
    refit: bool,
    counts: Callable[[str], float],
    moments: Moments | None = None,
    original: Original | None = None,
    fewest: float = 0.0,
) -> Iterator[tuple[str, list[Option]]]:
    """The options of each tensor of ``wanted``, in the file's order.

    ``units``: factorized projections by the name of their A.  ``weights``: of columns, by name.  ``counts``: how much
    an error of a tensor counts.  ``moments``: if the file will be rounded by them, errors are those after such
    rounding.  ``original``: the model that the factors were made of.  ``fewest``: types of fewer bits are not tried where
    matrices are rounded by moments.
    """
    for name in (n for n in tensors if n in wanted):
        tensor, found = tensors[name], weights.get(name)
        share = counts(name)
        unit = units.get(name.replace("_basis.", "_exps."))
        rounded = unit is None and moments is not None and covers(moments, tensor)
        types = ladder(tensor, found, rounded and (is_transform(name) or is_down(name)))
        if unit is None:
            if rounded and moments is not None:
                types = [t for t in types if BY_NAME[t].bits >= fewest]
                errors = _rounded(tensor, moments, types)
            else:
                errors = _plain(tensor, found, types)
        elif name.endswith("_basis.weight"):
            errors = _basis(unit, types, refit, original)
        else:
            errors = _transform(unit, found, types)
        yield name, [Option(t, size(name, t), share * e) for t, e in zip(types, errors, strict=True)]


def _sampled(unit: Unit) -> tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some experts of the first group: which ones, alpha, the bases, A ``[., p, r]`` scaled, and Z ``[., r, d]``."""
    experts, mix, bases = unit.group(0)
    s = slice(0, min(SAMPLE, experts.stop))
    a = unit.turn(torch.stack([unit.layer.transform(unit.projection, e) for e in range(s.stop)]))
    return s, mix[s], bases, unit.scaled(a, s), activate(combine(mix[s], bases), unit.activation)


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total else 0.0


def _basis(unit: Unit, types: list[str], refit: bool, original: Original | None) -> list[float]:
    s, alpha, bases, a, z = _sampled(unit)
    metric = unit.inputs().slice(s, z)
    if original is None:
        w = torch.bmm(a, metric.apply(z))
    else:
        experts = [original.expert(unit.layer.index, unit.projection, e) for e in range(s.stop)]
        w = metric.apply(unit.scaled(unit.turn(torch.stack(experts).float()), s))
    errors, rounder = [], unit.basis_rounder(0, bases)
    for type_name in types:
        kept = unit.read_back(0, bases, type_name, rounder)
        z = activate(combine(alpha, kept), unit.activation)
        solved, zm = a, metric.apply(z)
        if refit and (unit.full or not torch.equal(kept, bases)):
            anchor = ANCHOR_BY_MOMENTS if unit.full else None
            solved, _, zm = solve(w, a, zm, z, alpha, kept, metric, unit.activation, anchor)
        errors.append(_share(cost(w, solved, zm)[0], squares(w)))
        del kept
    return errors


def _transform(unit: Unit, weights: Importance | None, types: list[str]) -> list[float]:
    s, _, _, a, z = _sampled(unit)
    zm = unit.inputs().slice(s, z).apply(z)
    w = torch.bmm(a, zm)
    given = None if weights is None else weights.read()[s] if unit.turned else second_moments(zm).numpy()
    stored = unit.turn(unit.unscaled(a, s))
    errors = []
    for type_name in types:
        if unit.full and type_name in ROUNDED:
            found = rounded(stored, zm, type_name, unit.name)[1]
        else:
            found = each_decoded(stored, type_name, given, unit.name)[1]
        values = unit.scaled(unit.turn(found), s)
        errors.append(_share(cost(w, values, zm)[0], squares(w)))
    return errors


def _rounded(tensor: Tensor, moments: Moments, types: list[str]) -> list[float]:
    """Errors of some rows of some matrices; rows are rounded independently of each other."""
    roots, tokens = moments.find(tensor.name), moments.tokens(tensor.name)
    assert roots is not None, tensor.name
    matrices = (m for piece in tensor.source.pieces() for m in piece.reshape(-1, *tensor.source.shape[-2:]))
    outcomes = {type_name: Outcome() for type_name in types}
    for e, w in enumerate(islice(matrices, SAMPLE)):
        rounder = Rounder(matrix(roots, e if len(roots.root) > 1 else 0, tokens))
        for type_name, outcome in outcomes.items():
            rows = w[:: max(1, len(w) // SAMPLE_ROWS)][:SAMPLE_ROWS].float()
            if type_name in ROUNDED:
                outcome.add(rounder.encode(rows, type_name, tensor.name)[1])
            else:
                outcome.size += 1.0  # a float type: its error is negligible here
    return [outcome.after / outcome.size if outcome.size else 0.0 for outcome in outcomes.values()]


def _plain(tensor: Tensor, weights: Importance | None, types: list[str]) -> list[float]:
    matrices = (m for piece in tensor.source.pieces() for m in piece.reshape(-1, *tensor.source.shape[-2:]))
    w = torch.stack([m.float() for m in islice(matrices, SAMPLE)])
    given = None if weights is None else weights.read()[: len(w)]
    root = torch.ones(1) if given is None else torch.from_numpy(np.sqrt(given))[:, None]
    errors = []
    for type_name in types:
        values = each_decoded(w, type_name, given, tensor.name)[1]
        errors.append(_share(squares((w - values) * root), squares(w * root)))
    return errors


def shares_of(
    original: Original | None, imatrix: Imatrix, layers: tuple[int, ...]
) -> dict[int, float] | None:
    """The weight of each layer's experts; None if it is not known."""
    for file in imatrix.files:
        if original is not None and not file.of_mobe:
            try:
                return layer_shares(original, file, layers)
            except MobeError:
                continue  # a file of another model; export reports that elsewhere
    return None
