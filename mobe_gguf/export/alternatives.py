"""``--target-size`` over both forms of a projection: its factors, or the original experts rounded by second moments.

The format allows any layer and projection to be ordinary.  So each factorized projection is one choice of the division:
a pair of types for the bases and A, or one type for the original matrices.  The better one at its bytes is written.
Both errors are relative to the original's outputs.  That of the factors includes what the fit left over
(``type_errors``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mobe_gguf.core import names
from mobe_gguf.export.opened import Opened
from mobe_gguf.export.refit import Unit
from mobe_gguf.export.source import Stacked, Tensor
from mobe_gguf.quant.allocate import Option


@dataclass(frozen=True)
class Alternatives:
    """``units``: the factorized projections that have a plain form too, by the name of their A; ``plain``: its tensors,
    by the same names."""

    units: Mapping[str, Unit]
    plain: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Opened, units: Mapping[str, Unit], wanted: set[str]) -> Alternatives:
        """None of a unit unless the original is at hand, second moments of its inputs are, and the types of its tensors
        are ours to choose."""
        if model.original is None or model.moments is None:
            return cls({}, {})
        found, plain = {}, {}
        for name, unit in units.items():
            index, projection = unit.layer.index, unit.projection
            if name in model.moments and {name, names.basis_name(index, projection)} <= wanted:
                shape = (unit.n_expert, *unit.layer.checkpoint.expert_shape(unit.layer.index, projection))
                source = Stacked(shape, partial(model.original.expert, index, projection))
                found[name], plain[name] = unit, Tensor(name, source)
        return cls(found, plain)

    def basis(self, name: str) -> str:
        unit = self.units[name]
        return names.basis_name(unit.layer.index, unit.projection)

    def mix(self, name: str) -> str:
        unit = self.units[name]
        return names.mix_name(unit.layer.index, unit.projection)

    def join(
        self,
        options: dict[str, list[Option]],
        plain: Mapping[str, Sequence[Option]],
        mix_bytes: Mapping[str, int],
    ) -> dict[str, list[Option]]:
        """``options`` with one choice for each unit: its pairs of types, ``B+A``, and the plain ones."""
        joined = dict(options)
        for name in self.units:
            pairs = [
                Option(f"{b.type}+{a.type}", b.n_bytes + a.n_bytes + mix_bytes[name], b.error + a.error)
                for b in joined.pop(self.basis(name))
                for a in joined[name]
            ]
            joined[name] = best([*pairs, *plain[name]])
        return joined

    def part(self, chosen: Mapping[str, Option]) -> tuple[dict[str, str], list[str]]:
        """The types of all tensors, by name, and the units whose plain form was chosen."""
        types, left_out = {}, []
        for name, option in chosen.items():
            if name not in self.units or "+" not in option.type:
                types[name] = option.type
                left_out += [name] if name in self.units else []
            else:
                types[self.basis(name)], types[name] = option.type.split("+")
        return types, left_out

    def take(self, model: Opened, left_out: Iterable[str]) -> set[str]:
        """Make these units ordinary in ``model``; returns the names of the tensors that no longer exist."""
        units = {name: self.units[name] for name in left_out}
        factors = model.factors
        gone: set[str] = set()
        if factors is None or not units:
            return gone
        for name in units:
            model.conversion.replace(name, self.plain[name].source)
            gone |= {self.basis(name), self.mix(name)}
        for name in gone:
            del model.conversion.tensors[name]
        factors.leave_out((unit.layer.index, unit.projection) for unit in units.values())
        if not factors.any_left:
            arch = model.conversion.arch
            model.conversion.without_keys(
                [names.key_version(arch), names.key_activation(arch), names.key_group_count(arch)]
            )
        return gone


def best(options: Iterable[Option]) -> list[Option]:
    """Those than which no other is as small and as good, by bytes."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.error)):
        if not found or option.error < found[-1].error:
            found.append(option)
    return found
