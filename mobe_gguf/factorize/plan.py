"""What a factorization will do, computed from shapes: settings with defaults filled in, parameters, bytes, memory.

Pure functions over a model's shapes; only headers are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.layers import format_layers
from mobe_gguf.core.names import ALL_PROJECTIONS, PROJECTIONS
from mobe_gguf.factorize.baselines import Baseline
from mobe_gguf.factorize.linear import expert_bytes, fit_bytes, linear_block, suits
from mobe_gguf.factorize.methods import MOBE, method_named
from mobe_gguf.factorize.solver import Settings, block_bytes, cpu_block
from mobe_gguf.factorize.spec import JobSettings, Options
from mobe_gguf.factorize.target import Size, Unit
from mobe_gguf.formats.moments import Moments
from mobe_gguf.formats.safetensors import STORED
from mobe_gguf.models.checkpoint import PLAIN_FLOATS
from mobe_gguf.models.original import Original

#: A unit's memory is counted by its tensors.  This allows for freed small ones that the allocator keeps.
SPARE = 1.05


def default_bases(n_expert: int, n_group: int) -> int:
    """A quarter of the experts, the paper's ratio, rounded to a multiple of the groups."""
    return max(1, round(n_expert / 4 / n_group)) * n_group


def default_rank(p: int, d: int) -> int:
    """r = p, as in the paper; r = d/2 where experts are wider than the model (Mixtral) and r = p would save nothing."""
    return p if p <= d else d // 2


#: Numbers of wide bases, and the share of parameters that they may keep: as much as the paper's sizes, but at most LARGEST, and
#: up to SLACK more or less to get whole blocks.
WIDE, LARGEST, SLACK = (4, 3, 2, 1), 0.75, 1.05


def block_of(d: int) -> int:
    """Values in a block of the types that A will have, of which the rank is a multiple."""
    return 256 if d >= 1024 else 32 if d >= 64 else 1  # k-quants; other types


def wide_size(n: int, p: int, d: int) -> Size:
    """Few bases, with ranks of whole blocks.  They keep about the same share as the paper's sizes, p/d + 1/4, but at most 3/4.
    So they save parameters even where experts are as wide as the model (gpt-oss) and r = p, m = n/4 would keep 125 %.
    """
    block = block_of(d)
    share = min(p / d + 0.25, LARGEST)
    less = []
    for m in WIDE:  # the most bases that come near the goal; else the nearest below it
        if m > n:
            continue
        each = 1 / d + m / (n * p)  # share kept by one row of all bases and all A
        for rank in (block * (int(share / each / block) + more) for more in (0, 1)):
            kept = rank * each
            if 1 <= rank <= d and share / SLACK <= kept <= share * SLACK:
                return Size(m, rank)
            if 1 <= rank <= d and kept < share:
                less.append((kept, Size(m, rank)))
    return max(less)[1] if less else Size(1, max(1, int(share / (1 / d + 1 / (n * p)))))


def settle(options: Options, checkpoint: Original) -> JobSettings:
    """The settings of a new job, with defaults for everything left open.  UsageError if they do not fit the model."""
    n, d = checkpoint.n_expert, checkpoint.n_embd
    widths = widths_of(checkpoint, options.layers)
    p = widths[0]
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
        objective="mse" if options.imatrix is None and options.moments is None else "activation",
        imatrix=None,
        layers=checkpoint.moe_layers,
        projections=tuple(PROJECTIONS),
    )
    if options.target is not None:
        defaults |= dict(bases=None, rank=None)
    if options.wide and options.says_no_form:
        size = wide_size(n, p, d)
        defaults |= dict(bases=size.bases, rank=size.rank, activation="none")
    check_method(options)
    if not method_named(options.method or MOBE.name).fitted:
        defaults |= dict(activation="none", steps=0)
    settings = JobSettings(**(defaults | options.said()))
    # --target has not chosen yet: check what every choice has in common with the defaults
    least = groups * (settings.mix_terms or 1)
    size = Size(
        settings.bases or max(least, default_bases(n, max(groups, 1))), settings.rank or default_rank(p, d)
    )
    for projection in settings.projections:
        solver = settings.solver(size, projection)
        for width in widths:
            (solver if settings.how.fitted else replace(solver, steps=1)).check(n, width, d)
    if not settings.how.fitted:
        if len(widths) > 1:
            raise UsageError(
                f"--method {settings.method} is for experts of one width, and the layers of {checkpoint.path} have "
                f"{widths[0]} to {widths[-1]}; choose layers of one width with --layers"
            )
        baseline(settings, n, p, d)
    return settings


def widths_of(checkpoint: Original, layers: Iterable[int] | None = None) -> list[int]:
    """The different p of ``layers`` (None: all MoE layers), the least first.  UsageError if one has no experts."""
    found = checkpoint.moe_layers if layers is None else tuple(layers)
    for layer in found:
        if layer not in checkpoint.moe_layers:
            moe = format_layers(checkpoint.moe_layers)
            raise UsageError(
                f"--layers: layer {layer} has no routed experts; the MoE layers of this model are {moe}"
            )
    return sorted({checkpoint.width(layer) for layer in found})


def check_saving(job: JobSettings, checkpoint: Original) -> None:
    """UsageError if A and the bases have more parameters than the experts, as the paper's sizes do where experts are nearly as
    wide as the model.
    """
    if not job.how.fitted or job.target is not None:
        return
    settings, n, d = job.solver(), checkpoint.n_expert, checkpoint.n_embd
    widths = [checkpoint.width(layer) for layer in job.layers]
    after = sum(parameters(settings, n, p, d) - _mixing(settings, n, d) for p in widths)
    before = n * d * sum(widths)
    if after <= before:
        return
    p = min(widths)
    size = wide_size(n, p, d)
    kept = parameters(replace(settings, n_basis=size.bases, rank=size.rank, n_group=1), n, p, d) / (n * p * d)
    raise UsageError(
        f"{settings.n_basis} bases of rank {settings.rank} have {after / before:.0%} of the parameters of the {n} experts of {p} x {d} that "
        f"they replace. Choose fewer or smaller ones, for instance --bases {size.bases} --rank {size.rank}, which keep {kept:.0%}"
    )


def check_method(options: Options) -> None:
    """UsageError if a number is less than 1, or ``method``, ``target`` and the other options contradict each other."""
    for name in ("bases", "rank", "groups", "steps", "mix_terms"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    method, target = method_named(options.method or MOBE.name), options.target
    if target is not None and options.bases is not None:
        raise UsageError("--target chooses the number of bases; leave out --bases or --target")
    if isinstance(target, int) and options.quant is None:
        raise UsageError(
            "--target with a file's size needs --quant TYPE, the type that it will be exported in"
        )
    if options.quant is not None and not isinstance(target, int):
        raise UsageError("--quant is only used with --target SIZE, as --target 12.5GB --quant q4_k")
    if method.fitted:
        return
    if isinstance(target, int):
        raise UsageError(
            f"--method {method.name} keeps a share of the parameters: --target 0.75, not a file's size"
        )
    for projection in options.projections or ():
        if projection not in method.projections:
            raise UsageError(
                f"--method {method.name} takes {' and '.join(method.projections)}; leave {projection} out of --projections"
            )
    if target is not None and options.rank is not None:
        raise UsageError(f"--target chooses the rank of --method {method.name}; leave out --rank or --target")
    for name in ("groups", "activation", "mix", "steps", "seed", "for_basis", "for_transform", "mix_terms"):
        if getattr(options, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} means nothing to --method {method.name}; leave it out"
            )


def baseline(settings: JobSettings, n: int, p: int, d: int) -> Baseline:
    """Another method than MoBE with the same number of parameters: the share ``target``, or what ``bases`` and ``rank`` would
    keep.  UsageError if these are too few for it.
    """
    if settings.target is not None:
        allowance = int(settings.target * n * p * d)
    else:
        allowance = parameters(settings.solver(), n, p, d)
    return Baseline.within(settings.method, allowance, n, p, d)


def source_dtype(checkpoint: Original) -> str:
    """The default type of stored factors: the experts' own type, or bf16 for FP8 and quantized experts.

    Measured on SmolLM2 slices (error 0.196498 in f32): 0.196522 in bf16, 0.196499 in f16.
    """
    layer = checkpoint.moe_layers[0]
    dtype = checkpoint.dtype(checkpoint.expert_sources(layer, "up")[0])
    if dtype not in PLAIN_FLOATS:
        return "bf16"
    return {v: k for k, v in STORED.items()}.get(dtype, "f32")


def parse_projections(text: str) -> tuple[str, ...]:
    """``"up,gate"`` -> ("gate", "up"); UsageError if one is unknown."""
    asked = [part.strip() for part in text.split(",")]
    for name in asked:
        if name not in ALL_PROJECTIONS:
            known = ",".join(ALL_PROJECTIONS)
            raise UsageError(f"--projections: {name!r} is unknown; expected some of {known}")
    return tuple(p for p in ALL_PROJECTIONS if p in asked)


@dataclass(frozen=True)
class Plan:
    """Parameters before and after, bytes on disk, memory of one unit at the peak.

    ``projected``: the matrices that are factorized.  ``experts``: all routed experts, down included.  ``model``: everything.
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


def parameters(settings: Settings, n: int, p: int, d: int) -> int:
    """Parameters of one unit's factors: A, B and alpha."""
    return n * p * settings.rank + settings.n_basis * settings.rank * d + _mixing(settings, n, d)


def _mixing(settings: Settings, n: int, d: int) -> int:
    rows = d if settings.transposed else settings.rank
    return n * (settings.n_basis // settings.n_group) * (rows if settings.mix == "row" else 1)


def unit_memory(settings: Settings, n: int, p: int, d: int, directions: int | None = None) -> int:
    """Bytes at the peak of fitting experts ``[n, p, d]`` on the CPU (:func:`solver.fit`, W scaled in its place).

    ``directions``: columns of each expert's root if there are moments (:class:`metric.Roots`), 0 if there are weights of
    single channels, None without weights.
    """
    m, r, g = settings.n_basis, settings.rank, settings.n_group
    inputs = p if settings.transposed else d
    # With a diagonal rest, an expert has this many more columns in the metric than inputs.
    more = directions if directions and directions < inputs else 0
    rows, columns = (p + more, d) if settings.transposed else (p, d + more)
    always = n * p * d
    if directions is not None:  # W in the metric
        always += n // g * rows * columns
    if directions:  # the moments as read, and scaled
        always += 2 * n * inputs * (directions + 1)
    results = m * r * d + n * p * r if g > 1 else 0  # of finished groups, joined in the end
    always += results
    basis = m // g * r * d
    block = block_bytes(cpu_block(n // g, rows, columns, r), rows, columns, r) // 4
    copies = 0 if settings.mix == "scalar" else 2 if settings.transposed else 1  # of transposed tensors
    # B at the start, now and at its best, its gradient, Adam's two moments and the root of one
    steps = 7 * basis + (1 + copies) * block
    if suits(settings.activation, settings.mix, m // g, settings.mix_terms):
        at_once = linear_block(cpu_block(n // g, rows, columns, r), rows, columns, r)
        linear = (fit_bytes(m // g, r, d) + at_once * expert_bytes(rows, columns, r)) // 4
        steps = max(steps, linear) if settings.basis_type else linear
    if settings.basis_type:
        # a rounded B, too; while it is computed there are copies and an encoding, but no block
        steps += basis + max(0, (3 if settings.transposed else 2) * basis - block)
    # when A is solved for in float64, the gradient and Adam's moments are already freed
    end = 6 * basis + n * p * r + 2 * block_bytes(1, rows, columns, r) // 4
    if settings.dtype != torch.float32:  # A in its stored type, too
        end += n * p * r // 2
    return int(SPARE * 4 * (always + max(steps, end, results)))


# wide: independent sizes of a job
def make_plan(
    settings: Settings,
    *,
    n: int,
    p: int,
    d: int,
    units: int,
    moe_layers: int,
    model_parameters: int,
    kept_bytes: int = 0,
    directions: int | None = None,
) -> Plan:
    """Compute the plan for ``units`` factorized stacks of experts ``[n, p, d]`` in a model of ``model_parameters``.

    ``kept_bytes``: bytes that are copied from the source to the output.  ``directions``: see :func:`unit_memory`.
    Each expert matrix keeps p r numbers of A and the share m/n of a basis r d, plus alpha: ``r/d + m r/(n p)`` of p d.
    """
    mixing = _mixing(settings, n, d)
    after = parameters(settings, n, p, d)
    stored = settings.dtype.itemsize * (after - mixing) + 4 * mixing
    return Plan(
        units=units,
        projected_before=units * n * p * d,
        projected_after=units * after,
        experts_before=3 * moe_layers * n * p * d,
        model_before=model_parameters,
        output_bytes=kept_bytes + units * stored,
        memory_bytes=unit_memory(settings, n, p, d, directions),
    )


def plan_checkpoint(
    checkpoint: Original,
    settings: JobSettings,
    sizes: Mapping[Unit, Size] | None = None,
    moments: Moments | None = None,
) -> Plan:
    """:func:`make_plan` for a model on disk.  Stored multi-token-prediction layers are included.

    ``sizes``: m and r of each unit, if they differ.  ``moments``: already checked to belong to the model.
    """
    units = settings.units()
    n, p, d = checkpoint.n_expert, widths_of(checkpoint, settings.layers)[0], checkpoint.n_embd
    model = dict(n=n, d=d, moe_layers=len(checkpoint.moe_layers), model_parameters=checkpoint.n_params)
    experts = 3 * n * d * sum(checkpoint.width(layer) for layer in checkpoint.moe_layers)
    kept = checkpoint.kept_bytes(units)
    if not settings.how.fitted:
        chosen, itemsize = baseline(settings, n, p, d), STORED[settings.dtype].itemsize
        return Plan(
            units=len(units),
            projected_before=len(units) * n * p * d,
            projected_after=len(units) * chosen.kept,
            experts_before=experts,
            model_before=checkpoint.n_params,
            output_bytes=kept + len(units) * itemsize * chosen.stored,
            memory_bytes=chosen.memory + (moments.nbytes(*units[0]) if moments else 0),
        )
    directions: dict[str, int | None] = dict.fromkeys(settings.projections)
    if settings.objective != "mse":
        for name in directions:
            directions[name] = moments.directions(settings.layers[0], name) if moments else 0
    counts = Counter(
        (None if sizes is None else sizes[unit], unit[1], checkpoint.width(unit[0])) for unit in units
    )
    parts = [
        make_plan(
            settings.solver(size, projection),
            p=width,
            units=count,
            directions=directions[projection],
            **model,
        )
        for (size, projection, width), count in counts.items()
    ]
    return replace(
        parts[0],
        units=len(units),
        experts_before=experts,
        projected_before=sum(part.projected_before for part in parts),
        projected_after=sum(part.projected_after for part in parts),
        output_bytes=kept + sum(part.output_bytes for part in parts),
        memory_bytes=max(part.memory_bytes for part in parts),
    )
