"""A and mix solved again for the bases as the file holds them.

Rounding the bases changes every ``Z_i = f( sum_j alpha_ij B_j )``.  The best A for the old Z is not the best one for
the new Z.  So for each expert, in the metric of its inputs:

1. A and alpha are solved for again with the bases as they will be read back, see ``refit_solve``;
2. A is encoded, its columns weighted by the second moments of its inputs, ``E[z^2]``;
3. it is compared with the checkpoint's A, encoded in the same way.  The better one is written, with its alpha.

The target matrices W are the original model's.  Without the original, they are the product of the unrounded factors;
the rest of W is orthogonal to Z, so not much is lost.  If the bases were fitted ``--for`` their type, encoding does not
change them.  A was fitted for that type, too, so its rows are only scaled.

Down, ``W_i ~ f( sum_j alpha_ij B_j ) A_i``, is the same problem transposed; shapes given here apply after transposing.
Its inputs weigh the rows of ``W_i^T``, each of which belongs to a row of ``A_i^T``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO

import numpy as np
import torch

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.metric import Metric
from mobe_gguf.core.sides import side
from mobe_gguf.export.basis_rounding import basis_metric
from mobe_gguf.export.decoded import decoded, each_decoded, rounded
from mobe_gguf.export.imatrix import Imatrix, Importance
from mobe_gguf.export.refit_solve import ANCHOR_BY_MOMENTS, cost, kept, resized, second_moments, solve
from mobe_gguf.export.report import Refit
from mobe_gguf.export.write import Encoded
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.factors import FactorDirectory, MobeLayer, recorded
from mobe_gguf.models.original import Original, open_original
from mobe_gguf.quant.recipe import FLOATS, Choice
from mobe_gguf.quant.rounding.rounder import ROUNDED, Rounder
from mobe_gguf.quant.small import Squares
from mobe_gguf.runtime import ggml

#: Most bytes of a block of several experts.  It is fixed, because the last bits of sums depend on it.
BLOCK_BYTES = 64 << 20


@dataclass
class Unit:
    """The factors of one projection of one layer, and what export does with them.

    - ``basis_type``, ``basis_weights``: how B is encoded.
    - ``metric``: of all experts' inputs; empty if the inputs weigh rows.
    - ``rows``: roots of the rows' weights ``[n, p]``.
    - ``origin``: the file that the metric or rows are from, None if nothing is known of the inputs.
    - ``moments``: the file with full second moments of the inputs, if there is one.  They are the metric then, read on
      demand (:meth:`inputs`), and A is rounded by the moments of its inputs, ``quant.rounding``.
    """

    layer: MobeLayer
    projection: str
    basis_type: str
    basis_weights: Importance | None = None
    metric: Metric = field(default_factory=Metric)
    moments: Moments | None = None
    rows: torch.Tensor | None = None
    origin: str | None = None

    @classmethod
    def of(
        cls,
        layer: MobeLayer,
        projection: str,
        imatrix: Imatrix,
        choices: Mapping[str, Choice],
        weights: Mapping[str, Importance],
        moments: Moments | None = None,
    ) -> Unit:
        """``choices`` and ``weights``: types and weights of columns, by GGUF name.  MobeError if ``imatrix`` is of
        another model."""
        basis = names.basis_name(layer.index, projection)
        unit = cls(layer, projection, choices[basis].type, weights.get(basis))
        n, row = layer.checkpoint.n_expert, layer.checkpoint.expert_shape(layer.index, projection)[1]
        found = imatrix.inputs(layer.index, projection, n, row)
        if moments is not None and names.transform_name(layer.index, projection) in moments:
            moments.check(layer.index, projection, n, row)
            if not unit.turned:
                unit.moments, unit.origin = moments, moments.path.name
                return unit
            found = moments.path.name, moments.weight(layer.index, projection, n, row).channels()
        if found is not None:
            unit.origin, squares = found
            metric = Metric.of(squares, n, row)
            if unit.turned:
                unit.rows = metric.root
            else:
                unit.metric = metric
        return unit

    @property
    def full(self) -> bool:
        """Whether the inputs' full second moments are known."""
        return self.moments is not None

    def inputs(self) -> Metric:
        """The metric of all experts' inputs.  Full second moments are read again at each call: they may take
        gigabytes."""
        if self.moments is None:
            return self.metric
        layer, n = self.layer, self.n_expert
        row = layer.checkpoint.expert_shape(layer.index, self.projection)[1]
        return Metric.of(self.moments.weight(layer.index, self.projection, n, row), n, row)

    @property
    def by_moments(self) -> bool:
        """Whether ``factorize --moments`` fitted the factors.  It knew more of the inputs than an imatrix has, so A is
        scaled right."""
        return recorded(self.layer.checkpoint.config, "settings", "moments") is not None

    @property
    def turned(self) -> bool:
        """Whether the solved problem has the file's matrices transposed."""
        return side(self.projection).output

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """A matrix or several, from the file's orientation to the problem's, or back."""
        return x.transpose(-1, -2).contiguous() if self.turned else x

    def scaled(self, x: torch.Tensor, s: slice) -> torch.Tensor:
        """Matrices ``[experts, p, ...]`` of the problem, each row times the root of its weight."""
        return x if self.rows is None else x * self.rows[s, :, None]

    def unscaled(self, x: torch.Tensor, s: slice) -> torch.Tensor:
        return x if self.rows is None else x / self.rows[s, :, None]

    @property
    def scalar(self) -> bool:
        """Whether an expert has one weight for each basis, not one for each row."""
        return self.layer.mix(self.projection).dim() == 2

    @property
    def name(self) -> str:
        return f"layer {self.layer.index} {self.projection}"

    @property
    def activation(self) -> str:
        return self.layer.checkpoint.activation

    @property
    def n_expert(self) -> int:
        return self.layer.checkpoint.n_expert

    def group(self, i: int) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """Group i: its experts, mix ``[n/g, m/g]`` or ``[n/g, m/g, r]``, bases ``[m/g, r, d]``."""
        n = self.n_expert // self.layer.group_count(self.projection)
        mix = self.layer.mix(self.projection)[i * n : (i + 1) * n]
        if self.turned and mix.dim() == 3:
            mix = mix[:, :, None]  # a weight for each column
        return slice(i * n, (i + 1) * n), mix, self.turn(self.layer.group_basis(self.projection, i))

    def basis_rounder(self, i: int, bases: torch.Tensor) -> Rounder | None:
        """The rounder of group i's bases by moments; None if there are no moments, or the form is not linear."""
        if not (self.full and self.scalar and self.activation == "none"):
            return None
        experts, mix, _ = self.group(i)
        read = partial(self.layer.transform, self.projection)
        return Rounder(basis_metric(read, experts, mix, bases, self.inputs()))

    def encoded(
        self, i: int, bases: torch.Tensor, type_name: str, rounder: Rounder | None
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """For each basis of group i: its bytes in a type, and its values when read back, ``[r, d]``.

        ``rounder``: from :meth:`basis_rounder`.
        """
        weights = None if self.basis_weights is None else self.basis_weights.read()
        for j, basis in enumerate(bases, i * len(bases)):
            name = f"basis {j} of {self.name}"
            if rounder is None or type_name not in ROUNDED:
                row = None if weights is None else weights[j]
                data, values = decoded(self.turn(basis), type_name, row, name)
            else:
                data = rounder.encode(basis, type_name, name)[0]
                values = torch.from_numpy(ggml.dequantize(data, type_name, basis.shape[-1]))
            yield data, self.turn(values)

    def read_back(self, i: int, bases: torch.Tensor, type_name: str, rounder: Rounder | None) -> torch.Tensor:
        """The bases of group i as they are read back from a file that has them in this type."""
        found = torch.empty(bases.shape)
        for k, (_, values) in enumerate(self.encoded(i, bases, type_name, rounder)):
            found[k] = values
        return found

    def groups(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """All groups: experts, mix, the bases as they are in the checkpoint, and as they will be in the file.

        The caller must drop the bases before it takes the next group, or two groups are in memory at once.
        """
        for i in range(self.layer.group_count(self.projection)):
            experts, mix, bases = self.group(i)
            kept = self.read_back(i, bases, self.basis_type, self.basis_rounder(i, bases))
            yield experts, mix, bases, kept
            del bases, kept

    def blocks(self, experts: slice) -> list[slice]:
        """``experts`` in runs that fit into ``BLOCK_BYTES``."""
        p = self.layer.checkpoint.width(self.layer.index)
        r, d = self.layer.rank(self.projection), self.layer.checkpoint.n_embd
        size = max(1, BLOCK_BYTES // (4 * (6 * r * d + 4 * p * d + 6 * p * r + 4 * r * r)))
        return [slice(i, min(i + size, experts.stop)) for i in range(experts.start, experts.stop, size)]

    def transform_weights(self) -> np.ndarray:
        """``[n, r]``: ``E[z^2]`` of each expert, for z = f(sum of alpha B) x with the rounded bases."""
        out, whole = np.empty((self.n_expert, self.layer.rank(self.projection)), np.float32), self.inputs()
        for experts, mix, bases, basis in self.groups():
            del bases
            for i in range(experts.start, experts.stop):
                s = slice(i, i + 1)
                z = activate(combine(mix[i - experts.start :][:1], basis), self.activation)
                out[i] = second_moments(whole.slice(s, z).apply(z))[0].numpy()
            del basis
        return out


@dataclass
class Solved(Encoded):
    """A of a unit, solved for while it is written; ``original``: the model with the target matrices, or None.

    ``collected``: whether ``importance`` is from a file.  If not, columns are weighted by E[z^2] of each expert's new
    Z, or alike if nothing is known of the inputs.
    """

    unit: Unit = None  # type: ignore[assignment]
    original: Original | None = None
    collected: bool = False
    outcome: Refit | None = None
    mix: torch.Tensor | None = None

    def tofile(self, file: IO[bytes]) -> None:
        self.check(sum(file.write(data.data.cast("B")) for data in self._solve()))

    def solved_mix(self) -> torch.Tensor:
        """alpha that belongs to the A's, ``[n, m/g]`` or ``[n, m/g, r]``; solves for both if that was not done yet."""
        if self.mix is None:
            for _ in self._solve():
                pass
        assert self.mix is not None
        return self.mix

    def _solve(self) -> Iterator[np.ndarray]:
        unit, outcome, mixes, self.squares = self.unit, Refit(), [], Squares()
        weights = self.importance.read() if self.collected and self.importance else None
        whole = unit.inputs()
        for experts, mix, basis, kept_basis in unit.groups():
            same = torch.equal(basis, kept_basis)
            for s in unit.blocks(experts):
                alpha = mix[s.start - experts.start : s.stop - experts.start]
                stored = torch.stack(
                    [unit.layer.transform(unit.projection, e) for e in range(s.start, s.stop)]
                )
                self.squares.add(stored)
                z = activate(combine(alpha, kept_basis), unit.activation)
                metric = whole.slice(s, z)
                zm = metric.apply(z)
                given = self._weights(weights, s, zm)
                data, values = each_decoded(stored, self.type, given, self.tensor.name, s.start)
                if unit.full or (not (same and unit.by_moments) and (self.original is not None or not same)):
                    stored, values = (unit.scaled(unit.turn(a), s) for a in (stored, values))
                    w = self._target(s, alpha, basis, stored, metric)
                    if same and not unit.full:  # the bases were fitted for this type, and A for them
                        new = resized(w, stored, zm), alpha, zm
                    else:
                        anchor = ANCHOR_BY_MOMENTS if unit.full else None
                        new = solve(w, stored, zm, z, alpha, kept_basis, metric, unit.activation, anchor)
                    data, alpha = self._better(w, zm, alpha, (data, values), new, weights, s, outcome)
                outcome.matrices += len(alpha)
                mixes.append(alpha[:, :, 0] if alpha.dim() == 4 else alpha)
                yield from data
            del basis, kept_basis
        self.mix, self.outcome = torch.cat(mixes), outcome

    def _weights(self, collected: np.ndarray | None, s: slice, zm: torch.Tensor) -> np.ndarray | None:
        if collected is not None:
            return collected[s]
        return None if self.unit.origin is None or self.unit.turned else second_moments(zm).numpy()

    def _target(
        self, s: slice, alpha: torch.Tensor, basis: torch.Tensor, stored: torch.Tensor, metric: Metric
    ) -> torch.Tensor:
        """The targets W of the block's experts, in the metric, with rows scaled as those of ``stored`` are."""
        unit = self.unit
        if self.original is None:
            return torch.bmm(stored, metric.apply(activate(combine(alpha, basis), unit.activation)))
        index, projection = unit.layer.index, unit.projection
        w = torch.stack([self.original.expert(index, projection, e) for e in range(s.start, s.stop)])
        return metric.apply(unit.scaled(unit.turn(w), s))

    def _better(
        self,
        w: torch.Tensor,
        zm: torch.Tensor,
        alpha: torch.Tensor,
        stored: tuple[list[np.ndarray], torch.Tensor],
        solved: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        collected: np.ndarray | None,
        s: slice,
        outcome: Refit,
    ) -> tuple[list[np.ndarray], torch.Tensor]:
        """Bytes and alpha of the block's experts, for each expert the better of two solutions.

        ``stored``: the checkpoint's A encoded, and its values; ``zm`` and ``alpha`` belong to it.  ``solved``: the new
        A, alpha and Z.
        """
        unit, (data, values) = self.unit, stored
        a, new_alpha, new_zm = solved
        new = unit.turn(unit.unscaled(a, s))
        if unit.full and self.type in ROUNDED:
            new_data, new_values = rounded(new, new_zm, self.type, self.tensor.name, s.start)
        else:
            new_data, new_values = each_decoded(
                new, self.type, self._weights(collected, s, new_zm), self.tensor.name, s.start
            )
        new_values = unit.scaled(unit.turn(new_values), s)
        (old_cost, old_error), (new_cost, new_error) = cost(w, values, zm), cost(w, new_values, new_zm)
        better = new_cost < old_cost
        sizes = w.square().sum(-1)
        old_kept, new_kept = (
            (kept(w, *pair) * sizes).sum(-1) for pair in ((values, zm), (new_values, new_zm))
        )
        outcome.add(
            Refit(
                before=float(old_error.sum()),
                after=float(torch.where(better, new_error, old_error).sum()),
                cost_before=float(old_cost.sum()),
                cost_after=float(torch.where(better, new_cost, old_cost).sum()),
                kept_before=float(old_kept.sum()),
                kept_after=float(torch.where(better, new_kept, old_kept).sum()),
                norm=float(sizes.sum()),
                solved=int(better.sum()),
            )
        )
        chosen = [new if yes else old for new, old, yes in zip(new_data, data, better.tolist(), strict=True)]
        return chosen, torch.where(better.view(-1, *(1,) * (alpha.dim() - 1)), new_alpha, alpha)


@dataclass
class RoundedBases(Encoded):
    """The bases of a unit whose inputs' full second moments are known."""

    unit: Unit = None  # type: ignore[assignment]

    def tofile(self, file: IO[bytes]) -> None:
        self.squares, written = Squares(), 0
        for i in range(self.unit.layer.group_count(self.unit.projection)):
            _, _, bases = self.unit.group(i)
            self.squares.add(bases)
            found = self.unit.encoded(i, bases, self.type, self.unit.basis_rounder(i, bases))
            written += sum(file.write(data.data.cast("B")) for data, _ in found)
        self.check(written)


@dataclass(frozen=True)
class SolvedMix:
    """alpha of a unit as a source: the one that belongs to the A's that were written."""

    solved: Solved

    @property
    def shape(self) -> tuple[int, ...]:
        layer, projection = self.solved.unit.layer, self.solved.unit.projection
        return tuple(layer.mix(projection).shape)

    def pieces(self) -> Iterator[torch.Tensor]:
        yield self.solved.solved_mix()


def units_of(
    checkpoint: FactorDirectory,
    imatrix: Imatrix,
    choices: Mapping[str, Choice],
    weights: Mapping[str, Importance],
    moments: Moments | None = None,
) -> dict[str, Unit]:
    """All factorized projections, by the GGUF name of their A."""
    units = {}
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        for projection in layer.projections:
            name = names.transform_name(index, projection)
            units[name] = Unit.of(layer, projection, imatrix, choices, weights, moments)
    return units


def weigh_transforms(
    units: Mapping[str, Unit], choices: Mapping[str, Choice], weights: Mapping[str, Importance]
) -> dict[str, Importance]:
    """Weights of the A's that have none in a file: E[z^2], from the factors and their inputs, if these are known."""
    return {
        name: Importance(f"{unit.origin} (experts' inputs, through the bases)", unit.transform_weights)
        for name, unit in units.items()
        if name not in weights
        and not unit.turned
        and unit.origin is not None
        and choices[name].type not in FLOATS
    }


@dataclass
class Refitting:
    """What an export solves for again: ``units`` by the name of their A; ``why``: the reason if ``original`` is
    None."""

    units: dict[str, Unit]
    original: Original | None
    why: str | None
    solved: list[Solved] = field(default_factory=list)

    @classmethod
    def of(cls, units: Mapping[str, Unit], original: Original | None, why: str | None) -> Refitting | None:
        """None if there is nothing to solve for: no bases are quantized, and there are no moments to round A by."""
        units = {n: unit for n, unit in units.items() if unit.full or unit.basis_type not in FLOATS}
        return cls(units, original, why) if units else None

    @property
    def fingerprint(self) -> tuple[str, str]:
        """Tells whether an interrupted export solved for the same."""
        return "refit", self.original.checksum if self.original else ""

    def put(self, encoded: Sequence[Encoded], collected: Mapping[str, Importance]) -> list[Encoded]:
        """``encoded``, with the units' A's and mixes replaced by :class:`Solved` and :class:`SolvedMix`."""
        by_name = {e.tensor.name: e for e in encoded}
        for name, unit in self.units.items():
            a, mix = by_name[name], by_name[names.mix_name(unit.layer.index, unit.projection)]
            solved = Solved(a.tensor, a.type, a.nbytes, a.importance, unit, self.original, name in collected)
            self.solved.append(solved)
            by_name[name] = solved
            by_name[mix.tensor.name] = replace(mix, tensor=replace(mix.tensor, source=SolvedMix(solved)))
            basis = by_name[names.basis_name(unit.layer.index, unit.projection)]
            if unit.full and basis.type not in FLOATS:
                by_name[basis.tensor.name] = RoundedBases(
                    basis.tensor, basis.type, basis.nbytes, basis.importance, unit
                )
        return list(by_name.values())

    def outcome(self) -> Refit:
        """Sum over all matrices that this run solved for; files that an interrupted run finished are not counted."""
        total = Refit(None if self.original is None else str(self.original.path), self.why)
        for solved in self.solved:
            if solved.outcome is not None:
                total.add(solved.outcome)
        return total


def find_original(
    checkpoint: FactorDirectory, given: str | os.PathLike[str] | None
) -> tuple[Original | None, str | None]:
    """The model that the factors were made of, or None and the reason.

    It is the one ``given`` by the user, or the one where factorize found it.  MobeError if the given one is another
    model.
    """
    path = checkpoint.original_path(given)
    if path is None:
        return None, "where the original model is was not recorded"
    if given is None and not path.exists():
        return None, f"the original model is no longer at {path}"
    try:
        original = open_original(path)
        _check_original(checkpoint, original, recorded(checkpoint.config, "source_checksum"))
    except MobeError as e:
        if given is not None:
            raise
        return None, e.message.splitlines()[0]
    return original, None


def _check_original(checkpoint: FactorDirectory, original: Original, checksum: object) -> None:
    """MobeError if ``checkpoint`` holds factors of another model."""
    where = f"--original {original.path}"
    if original.is_mobe:
        raise MobeError(f"{where}: holds factors; expected the model that they were made of")
    if isinstance(checksum, str) and original.checksum != checksum:
        raise MobeError(
            f"{where}: is not the model that {checkpoint.path} was made of: its checksum is {original.checksum[:12]}..., "
            f"expected {checksum[:12]}... Give that one, or leave --original out"
        )
    for what in ("n_expert", "n_embd", "n_ff_exp"):
        if getattr(original, what) != getattr(checkpoint, what):
            raise MobeError(
                f"{where}: {what} is {getattr(original, what)}, in {checkpoint.path} it is {getattr(checkpoint, what)}: "
                "expected the model that the factors were made of"
            )
    for index in checkpoint.moe_layers:
        for projection in checkpoint.layer(index).projections:
            original.check_experts(index, projection)
