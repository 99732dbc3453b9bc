"""What a factorization will do, by arithmetic alone: settings with their defaults filled in, parameters, bytes, memory.

Pure functions over a model's shapes; nothing is read but headers.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from mobe_gguf.checkpoint import PLAIN_FLOATS, Checkpoint
from mobe_gguf.errors import MobeError, UsageError
from mobe_gguf.factorize.solver import BLOCK_BYTES, Settings
from mobe_gguf.names import PROJECTIONS

#: Names of the types that factors can be stored in.
STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class JobSettings:
    """All that decides a job's result.  It is written beside the finished units; a resumed job must have the same."""

    bases: int
    rank: int
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
    mix_terms: int | None = None

    def solver(self) -> Settings:
        return Settings(
            n_basis=self.bases,
            rank=self.rank,
            n_group=self.groups,
            activation=self.activation,
            mix=self.mix,
            steps=self.steps,
            seed=self.seed,
            dtype=STORED[self.dtype],
            basis_type=self.for_basis,
            transform_type=self.for_transform,
            mix_terms=self.mix_terms,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers), "projections": list(self.projections)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> JobSettings:
        known = {f.name for f in fields(cls)}
        settings = cls(**{k: v for k, v in value.items() if k in known})
        return replace(settings, layers=tuple(settings.layers), projections=tuple(settings.projections))

    def units(self) -> list[tuple[int, str]]:
        """``(layer, projection)`` in the order of work."""
        return [(layer, projection) for layer in self.layers for projection in self.projections]


@dataclass(frozen=True)
class Options:
    """What the user asked for; None is "not said", which is not the same as the default."""

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
    layers: tuple[int, ...] | None = None
    projections: tuple[str, ...] | None = None
    for_basis: str | None = None
    for_transform: str | None = None
    mix_terms: int | None = None

    def replace(self, **changes: Any) -> Options:
        return replace(self, **changes)

    def said(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def default_bases(n_expert: int, n_group: int) -> int:
    """A quarter of the experts, the paper's ratio, rounded to a multiple of the groups."""
    return max(1, round(n_expert / 4 / n_group)) * n_group


def default_rank(p: int, d: int) -> int:
    """r = p, as in the paper; where experts are wider than the model (Mixtral) that would save nothing, and r = d/2."""
    return p if p <= d else d // 2


def settle(options: Options, checkpoint: Checkpoint) -> JobSettings:
    """The settings of a new job: defaults for all that was not said.  UsageError if they do not fit the model."""
    n, p, d = checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd
    groups = 1 if options.groups is None else options.groups
    defaults: dict[str, Any] = dict(
        bases=default_bases(n, max(groups, 1)),
        rank=default_rank(p, d),
        groups=groups,
        activation="tanh",
        mix="scalar",
        steps=500,
        seed=0,
        dtype="f32" if options.for_basis or options.for_transform else source_dtype(checkpoint),
        objective="mse" if options.imatrix is None else "activation",
        imatrix=None,
        layers=checkpoint.moe_layers,
        projections=tuple(PROJECTIONS),
    )
    settings = JobSettings(**(defaults | options.said()))
    for layer in settings.layers:
        if layer not in checkpoint.moe_layers:
            moe = format_layers(checkpoint.moe_layers)
            raise UsageError(
                f"--layers: layer {layer} has no routed experts; the MoE layers of this model are {moe}"
            )
    settings.solver().check(n, p, d)
    return settings


def source_dtype(checkpoint: Checkpoint) -> str:
    """The type that factors are stored in if nothing is said: the experts' own, bf16 for FP8.

    Measured on SmolLM2 slices (error 0.196498 in f32): 0.196522 in bf16, 0.196499 in f16.
    """
    layer = checkpoint.moe_layers[0]
    dtype = checkpoint.dtype(checkpoint.expert_sources(layer, "gate")[0])
    if dtype not in PLAIN_FLOATS:
        return "bf16"
    return {v: k for k, v in STORED.items()}.get(dtype, "f32")


def parse_layers(text: str) -> tuple[int, ...]:
    """``"0-3,7"`` -> (0, 1, 2, 3, 7), sorted; UsageError shows the form expected."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UsageError(
                f"--layers: cannot read {part.strip()!r}; expected numbers and ranges such as 0-3,7"
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def format_layers(layers: tuple[int, ...]) -> str:
    """(0, 1, 2, 3, 7) -> ``"0-3,7"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


@dataclass(frozen=True)
class Plan:
    """Parameters before and after, bytes on disk, memory of one unit at the peak.

    ``projected``: the matrices that are factorized; ``experts``: all routed experts, down included; ``model``: all.
    """

    units: int
    projected_before: int
    projected_after: int
    experts_before: int
    model_before: int
    output_bytes: int
    memory_bytes: int

    @property
    def shed(self) -> int:
        """Parameters that the model loses."""
        return self.projected_before - self.projected_after

    @property
    def experts_after(self) -> int:
        return self.experts_before - self.shed

    @property
    def model_after(self) -> int:
        return self.model_before - self.shed

    @property
    def model_shed_share(self) -> float:
        """Share of all parameters that the model loses: the number that the paper quotes."""
        return self.shed / self.model_before

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "experts_after": self.experts_after,
            "model_after": self.model_after,
            "model_shed_share": self.model_shed_share,
        }


def make_plan(
    settings: Settings,
    *,
    n: int,
    p: int,
    d: int,
    units: int,
    moe_layers: int,
    model_parameters: int,
    model_bytes: int = 0,
    unit_bytes: int = 0,
) -> Plan:
    """The arithmetic: experts ``[n, p, d]``, ``units`` of them factorized, in a model of ``model_parameters``.

    ``model_bytes`` is the source's size on disk, ``unit_bytes`` that of the original matrices of one unit.
    Per expert matrix p r of A and m/n of a basis r d stay, plus alpha: ``r/d + m r/(n p)`` of p d.
    """
    m, r, g = settings.n_basis, settings.rank, settings.n_group
    mixing = n * (m // g) * (r if settings.mix == "row" else 1)
    after = n * p * r + m * r * d + mixing
    stored = settings.dtype.itemsize * (after - mixing) + 4 * mixing
    # W, B with its gradient, Adam's two moments and the best so far, A, and a block of experts (see solver._place).
    block = min(BLOCK_BYTES, 4 * n // g * (6 * r * d + 3 * p * r + 4 * r * r))
    memory = 4 * (n * p * d + 6 * m // g * r * d + n * p * r) + block
    if settings.basis_type:  # values, rounded values, their encoding and a copy
        memory += 4 * 3 * m // g * r * d
    return Plan(
        units=units,
        projected_before=units * n * p * d,
        projected_after=units * after,
        experts_before=3 * moe_layers * n * p * d,
        model_before=model_parameters,
        output_bytes=model_bytes + units * (stored - unit_bytes),
        memory_bytes=memory,
    )


def plan_checkpoint(checkpoint: Checkpoint, settings: JobSettings) -> Plan:
    """:func:`make_plan` for a model on disk.  Multi-token-prediction layers count as they are stored."""
    infos = [(name, checkpoint.info(name)) for name in checkpoint.names]
    units = settings.units()
    layer, projection = units[0]
    dtype = checkpoint.dtype(checkpoint.expert_sources(layer, projection)[0])
    n, p, d = checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd
    return make_plan(
        settings.solver(),
        n=n,
        p=p,
        d=d,
        units=len(units),
        moe_layers=len(checkpoint.moe_layers),
        model_parameters=sum(info.numel for name, info in infos if not name.endswith("_scale_inv")),
        model_bytes=sum(info.end - info.begin for _, info in infos),
        unit_bytes=n * p * d * dtype.itemsize,
    )


def resume_settings(old: JobSettings, options: Options) -> JobSettings:
    """The settings of a job that is taken up again; MobeError names the first one that the user changed."""
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
