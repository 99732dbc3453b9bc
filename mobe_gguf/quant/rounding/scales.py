"""Scales and offsets as a type stores them, and their least-squares solution in a metric with fixed codes.

Take a group with units c (``Grid.units``), residual r = w - q and gradient g = r S.  A change (ds, do) of scale and offset
changes the cost by ``-2 (ds b1 + do b2) + ds^2 a11 + 2 ds do a12 + do^2 a22``, with ``b1 = g c``, ``b2 = g 1``,
``a11 = c S c``, ``a12 = c S 1``, ``a22 = 1 S 1``, all over the group's columns.  The best real numbers are rounded to storable
ones, whose neighbours are tried, too.  A change is made only where the cost falls, so a sweep never increases the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from mobe_gguf.quant.rounding.forms import Stored, Type

#: Largest scale that float16 holds.
_LARGEST = 65504.0


@dataclass
class Scales:
    """Scales of a batch of E matrices of p rows.  ``d``, ``dmin`` ``[E, p, n / block]``: float32 with values of float16.  ``k``,
    ``m`` ``[E, p, n / group]``: uint8.  None where the type has none."""

    type: Type
    d: torch.Tensor | None
    k: torch.Tensor | None
    dmin: torch.Tensor | None
    m: torch.Tensor | None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.multipliers, self.minima = (
            None if table is None else torch.from_numpy(table).to(self.device, self.dtype)
            for table in (self.type.multipliers, self.type.minima)
        )
        self.groups = self.type.block // self.type.group

    @property
    def device(self) -> torch.device:
        return next(x.device for x in (self.d, self.k) if x is not None)

    @classmethod
    def of(
        cls, one: Type, stored: Stored, batch: int, device: torch.device | str, dtype: torch.dtype
    ) -> Scales:
        def shaped(x: np.ndarray | None, to: torch.dtype) -> torch.Tensor | None:
            return None if x is None else torch.tensor(x, device=device).to(to).view(batch, -1, x.shape[-1])

        whole = torch.uint8
        return cls(
            one,
            shaped(stored.d, dtype),
            shaped(stored.k, whole),
            shaped(stored.dmin, dtype),
            shaped(stored.m, whole),
            dtype,
        )

    def stored(self, codes: torch.Tensor, like: Stored) -> Stored:
        """Codes ``[E, p, n / width]`` and these scales, in the form for ``Type.pack`` and in the types of ``like``."""

        def flat(x: torch.Tensor | None, as_: np.ndarray | None) -> np.ndarray | None:
            return None if x is None or as_ is None else x.flatten(0, 1).cpu().numpy().astype(as_.dtype)

        whole = flat(codes, like.codes)
        assert whole is not None
        return Stored(
            whole,
            flat(self.d, like.d),
            flat(self.k, like.k),
            flat(self.dmin, like.dmin),
            flat(self.m, like.m),
        )

    def clone(self) -> Scales:
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        cloned: dict[str, Any] = {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in parts.items()
        }
        return Scales(**cloned)

    def resize(self, share: torch.Tensor) -> None:
        """Multiply every row by ``share`` ``[E, p]``, within the range of float16."""
        for name in ("d", "dmin"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, _half(x * share[..., None]))

    def scale(self, g: int | None = None) -> torch.Tensor:
        """The scales ``[E, p, n / group]``, or those of group ``g``, ``[E, p]``."""
        return self._value(self.d, self.k, self.multipliers, g)

    def offset(self, g: int | None = None) -> torch.Tensor | None:
        return None if self.dmin is None else self._value(self.dmin, self.m, self.minima, g)

    def _value(
        self, d: torch.Tensor | None, k: torch.Tensor | None, table: torch.Tensor | None, g: int | None
    ) -> torch.Tensor:
        if g is None:
            factor: Any = 1 if k is None or table is None else table[k.long()]
            return factor if d is None else d.repeat_interleave(self.groups, -1) * factor
        factor = 1 if k is None or table is None else table[k[..., g].long()]
        return factor if d is None else d[..., g // self.groups] * factor

    def improve_group(
        self, g: int, units: torch.Tensor, gradient: torch.Tensor, metric: torch.Tensor
    ) -> torch.Tensor | None:
        """Improve ``k`` and ``m`` of group ``g`` (or ``d`` and ``dmin`` where each group has its own).  Returns the change of the
        group's values ``[E, p, group]``, None if nothing changes.  ``units``, ``gradient`` ``[E, p, group]``, ``metric``
        ``[E, group, group]``."""
        return self._improve(
            g,
            units,
            torch.ones_like(units) if self.dmin is not None else None,
            gradient,
            metric,
            self.k is None,
        )

    def improve_block(
        self, b: int, units: torch.Tensor, gradient: torch.Tensor, metric: torch.Tensor
    ) -> torch.Tensor | None:
        """Improve ``d`` and ``dmin`` of block ``b`` with fixed ``k`` and ``m``: like :meth:`improve_group`, over the block."""
        assert self.k is not None and self.multipliers is not None
        span = slice(b * self.groups, (b + 1) * self.groups)
        width = self.type.group
        first = units * self.multipliers[self.k[..., span].long()].repeat_interleave(width, -1)
        second = None
        if self.m is not None and self.minima is not None:
            second = self.minima[self.m[..., span].long()].repeat_interleave(width, -1)
        return self._improve(b, first, second, gradient, metric, True)

    def _improve(
        self,
        i: int,
        first: torch.Tensor,
        second: torch.Tensor | None,
        gradient: torch.Tensor,
        metric: torch.Tensor,
        halves: bool,
    ) -> torch.Tensor | None:
        """``first``, ``second``: what a change of the scale and of the offset adds to the values.  ``halves``: set ``d`` and
        ``dmin`` number ``i``, else ``k`` and ``m``."""
        fm = first @ metric
        a11, b1 = (fm * first).sum(-1), (gradient * first).sum(-1)
        if second is None:
            a12 = a22 = b2 = torch.zeros_like(a11)
            ds = b1 / a11.clamp_min(1e-30)
        else:
            sm = second @ metric
            a12, a22, b2 = (fm * second).sum(-1), (sm * second).sum(-1), (gradient * second).sum(-1)
            det = a11 * a22 - a12 * a12
            good = det > 1e-6 * a11 * a22
            ds = torch.where(
                good, (a22 * b1 - a12 * b2) / det.where(good, torch.ones_like(det)), torch.zeros_like(det)
            )
        best = torch.zeros_like(a11)
        change_s, change_o = torch.zeros_like(a11), torch.zeros_like(a11)
        picks = []
        for place, step in self._near_scale(i, ds, halves):
            other, do = (
                self._near_offset(i, (b2 - a12 * step) / a22.clamp_min(1e-30), halves)
                if second is not None
                else (None, a12)
            )
            gain = 2 * (step * b1 + do * b2) - step * step * a11 - 2 * step * do * a12 - do * do * a22
            better = gain > best
            best = torch.where(better, gain, best)
            change_s, change_o = torch.where(better, step, change_s), torch.where(better, do, change_o)
            picks.append((better, place, other))
        if not bool((best > 0).any()):
            return None
        for better, place, other in picks:
            self._set("d" if halves else "k", i, better, place)
            if other is not None:
                self._set("dmin" if self._offset_is_half(halves) else "m", i, better, other)
        change = first * change_s[..., None]
        return change if second is None else change + second * change_o[..., None]

    def _offset_is_half(self, halves: bool) -> bool:
        return halves or self.m is None

    def _set(self, name: str, i: int, where: torch.Tensor, value: torch.Tensor) -> None:
        x = getattr(self, name)
        x[..., i] = torch.where(where, value.to(x.dtype), x[..., i])

    def _near_scale(self, i: int, ds: torch.Tensor, halves: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Storable values near the scale plus ``ds``, and how much each changes the scale of :meth:`_improve`."""
        if halves:
            assert self.d is not None
            now = self.d[..., i]
            new = _half(now + ds)
            return [(now, torch.zeros_like(now)), (new, new - now)]
        assert self.k is not None and self.multipliers is not None
        d = 1 if self.d is None else self.d[..., i // self.groups]
        return self._near(self.k[..., i], d, self.multipliers, ds)

    def _near_offset(self, i: int, do: torch.Tensor, halves: bool) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.dmin is not None
        if self._offset_is_half(halves):
            now = self.dmin[..., i]
            new = _half(now + do)
            return new, new - now
        assert self.m is not None and self.minima is not None
        d = self.dmin[..., i // self.groups]
        return self._near(self.m[..., i], d, self.minima, do, (0,))[0]

    @staticmethod
    def _near(
        k: torch.Tensor,
        d: torch.Tensor | int,
        table: torch.Tensor,
        change: torch.Tensor,
        steps: tuple[int, ...] = (0, -1, 1),
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        now = table[k.long()]
        if isinstance(d, int):
            wanted = now + change
        else:
            wanted = torch.where(d == 0, now, now + change / torch.where(d == 0, torch.ones_like(d), d))
        rising = bool(table[-1] > table[0])
        ladder = table if rising else table.flip(0)
        place = torch.bucketize(wanted, (ladder[1:] + ladder[:-1]) / 2)
        place = place if rising else len(table) - 1 - place
        out = []
        for step in steps:
            at = (place + step).clamp(0, len(table) - 1)
            out.append((at, (table[at] - now) * d))
        return out


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-_LARGEST, _LARGEST).half().to(x.dtype)
