"""The plan as a table for a person, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mobe_gguf.core.files import describe_size
from mobe_gguf.plan.cost import Cost
from mobe_gguf.plan.layout import Layout
from mobe_gguf.plan.machine import Machine
from mobe_gguf.plan.memory import Beside
from mobe_gguf.plan.probe import Probe


@dataclass(frozen=True)
class PlanWishes:
    """What was asked for: the largest size and the lowest speed allowed."""

    size: int | None = None
    tokens_per_second: float | None = None
    ctx: int = 32768


#: A file with factors goes before a plain one if its estimated KL divergence is at most this share of the plain one's.
#: The estimate is not more exact, and any llama.cpp runs the plain file.
CLEARLY = 0.8


def order(costs: Sequence[Cost], wishes: PlanWishes) -> list[Cost]:
    """First the files that fit and meet the wishes, the best one at the top, then the rest by size."""
    good = [c for c in costs if meets(c, wishes)]
    rest = [c for c in costs if not meets(c, wishes)]
    return sorted(good, key=lambda c: (_rank(c), -c.tokens_per_second)) + sorted(
        rest, key=lambda c: c.form.n_bytes
    )


def _rank(cost: Cost) -> float:
    """KL divergence to put files in order by; measured errors count as they are."""
    estimated = cost.form.factorized and cost.error is None
    return cost.kl / CLEARLY if estimated else cost.kl


def meets(cost: Cost, wishes: PlanWishes) -> bool:
    """Whether it fits and is as small and as fast as was asked for."""
    small = wishes.size is None or cost.form.n_bytes <= wishes.size
    return cost.fits and small and cost.tokens_per_second >= (wishes.tokens_per_second or 0)


def table(model: str, layout: Layout, costs: Sequence[Cost], wishes: PlanWishes) -> Table:
    """The table of files, best first; fits 100 columns."""
    out = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
    out.add_column("form", overflow="fold")
    quality = "error (probe)" if any(c.error is not None for c in costs) else "KL (table)"
    for column in ("file", "bits", "in VRAM", "in RAM", "read/token", "tokens/s", quality, ""):
        out.add_column(column, justify="right", no_wrap=True)
    for c in costs:
        read = describe_size(c.read_vram + c.read_ram)
        out.add_row(
            Text(c.form.name),
            describe_size(c.form.n_bytes),
            f"{8 * c.form.n_bytes / layout.parameters:.2f}",
            describe_size(c.vram) if c.vram else "-",
            describe_size(c.ram),
            read,
            f"{c.tokens_per_second:.1f}",
            f"{c.kl:.4f}" if c.error is None else f"{c.error:.4f}",
            "" if meets(c, wishes) else ("too slow" if c.fits and _small(c, wishes) else "too large"),
        )
    return out


def _small(cost: Cost, wishes: PlanWishes) -> bool:
    return wishes.size is None or cost.form.n_bytes <= wishes.size


def head(layout: Layout, machine: Machine, beside: Beside, wishes: PlanWishes) -> str:
    """The model and the machine, a line each."""
    n, p, d = layout.expert_shape()
    size = (
        ""
        if not layout.vocabulary_bytes
        else "; no tokenizer here, so sizes leave out its exact keys (some MB)"
    )
    memory = (
        f"RAM {describe_size(machine.ram)}, VRAM {describe_size(machine.vram) if machine.vram else 'none'}"
    )
    return (
        f"{layout.name}: {layout.parameters / 1e9:.2f} G parameters, {len(layout.expert_layers)} layers of {n} experts "
        f"({p} x {d}), {layout.n_expert_used} used by a token ({layout.origin}{size}).\n"
        f"Machine: {memory}. Context {wishes.ctx}: {describe_size(beside.states)} of KV cache, "
        f"{describe_size(beside.compute)} of buffers."
    )


def advice(
    model: str, layout: Layout, costs: Sequence[Cost], wishes: PlanWishes, no_factors: str | None
) -> str:
    """Which file to take, why not factors, and the command."""
    lines = []
    if no_factors:
        lines.append(f"MoBE is not the answer here. {no_factors}")
    good = [c for c in costs if meets(c, wishes)]
    if not good:
        smallest = min(costs, key=lambda c: c.form.n_bytes)
        needed = smallest.ram + smallest.vram
        lines.append(
            f"Nothing fits. The smallest ({smallest.form.name}) needs {describe_size(needed)} of memory in all; a shorter "
            "--ctx saves KV cache."
        )
        return "\n".join(lines)
    best = good[0]
    plain = next((c for c in good if not c.form.factorized), None)
    if not no_factors and not best.form.factorized and any(c.form.factorized for c in costs):
        lines.append("A plain file that fits is expected to be better than every factorized one here.")
    elif best.form.factorized and plain:
        lines.append(
            f"Expected to be better than the best plain file that fits ({plain.form.name})"
            + ("; --probe measures it." if best.error is None else ", as measured on one layer.")
        )
    where = f" -ngl 99 --n-cpu-moe {best.cpu_layers}" if best.vram else ""
    lines.append(f"Best: {best.form.name}. A token waits mostly for {best.limit}.")
    lines.append(f"  mobe-gguf compress {model} {layout.name}.gguf {best.form.options}")
    lines.append(f"  llama-cli -m {layout.name}.gguf -c {wishes.ctx}{where}")
    return "\n".join(lines)


LEGEND = (
    "bits: of the file, per weight of the original. KL (table): KL divergence of the shipped small model with experts of these "
    "types, rounded by moments; it puts files in order, it is no promise for this model. tokens/s: writing, short context; from "
    "bytes read and this machine's measured rates."
)


PROBE_LEGEND = (
    "bits: of the file, per weight of the original. error (probe): squared error of the experts' outputs relative to their size, as "
    "measured on one layer (below). tokens/s: writing, short context; from bytes read and this machine's measured rates."
)


def probe_page(probe: Probe) -> list[RenderableType]:
    """The probe's results: types, factors against plain types of the same bits, and how much the experts share."""
    all_of = "all" if probe.experts == probe.of else f"{probe.experts} of"
    weighed = f"by {probe.moments}" if probe.moments else "of the weights alone, for there are no --moments"
    lines = [
        f"Probe: layer {probe.layer} {probe.projection}, {all_of} {probe.of} experts, errors {weighed}, {probe.seconds:.0f} s."
    ]
    if probe.experts < probe.of:
        lines.append(
            "Fewer experts share their bases more easily: the factors look better here than they are."
        )
    types = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
    for column in ("type", "bits", "error, nearest", "by moments"):
        types.add_column(column, justify="left" if column == "type" else "right")
    for name, one in sorted(probe.types.items(), key=lambda item: -item[1].bits):
        types.add_row(name, f"{one.bits:.2f}", f"{one.before:.4f}", f"{one.after:.4f}")
    parts: list[RenderableType] = [Text("\n".join(lines)), Text(), types]
    if probe.forms:
        forms = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
        for column in ("factors", "bits", "error, fitted", "rounded", "plain, same bits", "gain"):
            forms.add_column(column, justify="left" if column == "factors" else "right")
        for name, form in probe.forms.items():
            numbers = (f"{form.fit:.4f}", f"{form.after:.4f}", f"{form.plain:.4f}", f"{form.gain:.2f}")
            forms.add_row(Text(name), f"{form.bits:.2f}", *numbers)
        parts += [Text(), forms]
    said = (
        f"The stronger half of the experts' shared directions holds {probe.shared:.0%} of their weights' squares; of random "
        f"matrices {probe.random:.0%}."
    )
    return [*parts, Text(), Text(said)]


def page(
    model: str,
    layout: Layout,
    machine: Machine,
    beside: Beside,
    costs: Sequence[Cost],
    wishes: PlanWishes,
    no: str | None,
    probe: Probe | None = None,
) -> RenderableType:
    """The whole plan, for a terminal."""
    legend = LEGEND if probe is None else PROBE_LEGEND
    parts = (head(layout, machine, beside, wishes), "", table(model, layout, costs, wishes), "", legend, "")
    seen = [] if probe is None else [*probe_page(probe), Text()]
    return Group(
        *(Text(part) if isinstance(part, str) else part for part in parts),
        *seen,
        Text(advice(model, layout, costs, wishes, no)),
    )


def as_json(
    model: str,
    layout: Layout,
    machine: Machine,
    beside: Beside,
    costs: Sequence[Cost],
    wishes: PlanWishes,
    no: str | None,
    probe: Probe | None = None,
) -> dict[str, Any]:
    """The same as numbers: bytes, tokens per second."""
    n, p, d = layout.expert_shape()
    return {
        "model": layout.name,
        "origin": layout.origin,
        "parameters": layout.parameters,
        "experts": {
            "n": n,
            "used": layout.n_expert_used,
            "p": p,
            "d": d,
            "layers": len(layout.expert_layers),
        },
        "vocabulary_known": layout.vocabulary_bytes == 0,
        "machine": {"ram": machine.ram, "vram": machine.vram, "gpu": machine.gpu},
        "ctx": wishes.ctx,
        "beside": asdict(beside),
        "why_not_factorized": no,
        "probe": probe and asdict(probe),
        "forms": [
            {
                "name": c.form.name,
                "bytes": c.form.n_bytes,
                "bits_per_weight": 8 * c.form.n_bytes / layout.parameters,
                "factorized": c.form.factorized,
                "vram": c.vram,
                "ram": c.ram,
                "read_vram": c.read_vram,
                "read_ram": c.read_ram,
                "tokens_per_second": c.tokens_per_second if math.isfinite(c.tokens_per_second) else None,
                "n_cpu_moe": c.cpu_layers,
                "kl_estimate": c.kl,
                "kl_basis": "table of the shipped model"
                if c.error is None
                else "error that a probe measured",
                "error": c.error,
                "fits": c.fits,
                "meets_wishes": meets(c, wishes),
                "make": c.form.made(),
                "command": f"mobe-gguf compress {model} {layout.name}.gguf {c.form.options}",
            }
            for c in costs
        ],
    }
