"""The settings of a job, pure data: what the user asked for, and the complete settings that follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.layers import format_layers
from mobe_gguf.core.sides import side
from mobe_gguf.factorize.methods import MOBE, Method, method_named
from mobe_gguf.factorize.solver import Settings
from mobe_gguf.factorize.target import Size
from mobe_gguf.formats.safetensors import STORED


@dataclass(frozen=True)
class JobSettings:
    """Everything that determines a job's result.  It is stored beside the finished units; a resumed job must have the same.

    ``bases`` and ``rank`` are None if ``target`` (a share, or bytes of a file of type ``quant``) decides them for each unit.
    Another ``method`` than ``mobe`` may keep as many parameters as MoBE with these ``bases`` and ``rank``.
    """

    bases: int | None
    rank: int | None
    groups: int
    activation: str
    mix: str
    steps: int
    seed: int
    dtype: str
    objective: str
    imatrix: str | None
    layers: tuple[int, ...]
    projections: tuple[str, ...]
    for_basis: str | None = None
    for_transform: str | None = None
    moments: str | None = None
    mix_terms: int | None = None
    method: str = MOBE.name
    target: float | int | None = None
    quant: str | None = None

    def solver(self, size: Size | None = None, projection: str = "gate") -> Settings:
        """Settings of the fit of one unit; ``size``: its own m and r, if units differ.

        For down the settings are ``transposed``, see ``down.fit_down``.
        """
        bases, rank = (self.bases, self.rank) if size is None else (size.bases, size.rank)
        assert bases is not None and rank is not None, (
            "a --target job has no size before its units are probed"
        )
        return Settings(
            n_basis=bases,
            rank=rank,
            n_group=self.groups,
            activation=self.activation,
            mix=self.mix,
            steps=self.steps,
            seed=self.seed,
            dtype=STORED[self.dtype],
            basis_type=self.for_basis,
            transform_type=self.for_transform,
            mix_terms=self.mix_terms,
            transposed=side(projection).output,
        )

    @property
    def how(self) -> Method:
        """The method."""
        return method_named(self.method)

    def to_json(self) -> dict[str, Any]:
        """JSON data that ``records.record`` reads back."""
        return asdict(self) | {"layers": list(self.layers), "projections": list(self.projections)}

    def units(self) -> list[tuple[int, str]]:
        """``(layer, projection)`` in the order of work."""
        return [(layer, projection) for layer in self.layers for projection in self.projections]


@dataclass(frozen=True)
class JobRecord:
    """Content of job.json: everything that must be the same in a resumed job."""

    version: int
    solver: str
    source_checksum: str
    settings: JobSettings


@dataclass(frozen=True)
class Options:
    """What the user asked for; None means "left open", which is not the same as the default.

    ``wide``: if the form is left open, use few bases that are wider than the experts, without an activation, instead of the
    paper's form.
    """

    bases: int | None = None
    rank: int | None = None
    groups: int | None = None
    activation: str | None = None
    mix: str | None = None
    steps: int | None = None
    seed: int | None = None
    dtype: str | None = None
    objective: str | None = None
    imatrix: str | None = None
    moments: str | None = None
    layers: tuple[int, ...] | None = None
    projections: tuple[str, ...] | None = None
    for_basis: str | None = None
    for_transform: str | None = None
    mix_terms: int | None = None
    method: str | None = None
    target: float | int | None = None
    quant: str | None = None
    wide: bool = False

    def replace(self, **changes: Any) -> Options:
        return replace(self, **changes)

    def said(self) -> dict[str, Any]:
        names = (f.name for f in fields(self) if f.name != "wide")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def says_no_form(self) -> bool:
        """True if the form (bases, rank, groups, activation, mix), method and target are left to the program."""
        form = (self.bases, self.rank, self.groups, self.activation, self.mix, self.mix_terms)
        return all(x is None for x in (*form, self.method, self.target))


def resume_settings(old: JobSettings, options: Options) -> JobSettings:
    """The settings of a resumed job; MobeError names the first one that the user changed."""
    for name, new in options.said().items():
        before = getattr(old, name)
        if before != new:
            show = format_layers if name == "layers" else (",".join if name == "projections" else str)
            before, new = (show(x) if x is not None else "none" for x in (before, new))
            raise MobeError(
                f"--{name.replace('_', '-')} is {new} now, but the job to resume was started with {before}. Leave the option out to go "
                "on, or choose another OUT to start anew."
            )
    return old
