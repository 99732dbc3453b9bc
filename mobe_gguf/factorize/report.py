"""What a person sees of a plan and of a finished job: tables, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from mobe_gguf.factorize.job import Job, Result
from mobe_gguf.factorize.plan import JobSettings, Plan, format_layers

#: For lines of text: no colouring, and no wrapping, so that commands and paths can be copied.
PLAIN: dict[str, Any] = dict(highlight=False, markup=False, soft_wrap=True)


def print_plan(job: Job, console: Console) -> None:
    """Before the work: settings, parameters, disk and memory."""
    c, s = job.checkpoint, job.settings
    console.print(
        f"{c.path}: {c.family.name}, {len(c.moe_layers)} of {c.n_layer} layers MoE, {c.n_expert} experts "
        f"({c.n_expert_used} used) of {c.n_ff_exp} x {c.n_embd}",
        **PLAIN,
    )
    console.print(_settings_line(s), **PLAIN)
    console.print(_parameters(s, job.plan))
    console.print(
        f"on disk {_bytes(job.plan.output_bytes)}, memory about {_bytes(job.plan.memory_bytes)} for each unit at work",
        **PLAIN,
    )


def print_result(result: Result, console: Console) -> None:
    """After the work: error per layer, parameters before and after."""
    projections = result.settings.projections
    table = Table(title="relative error, |W - W'|² / |W|²", title_justify="left")
    table.add_column("layer", justify="right")
    for name in (*projections, "seconds"):
        table.add_column(name, justify="right")
    for layer in result.settings.layers:
        units = {u.projection: u for u in result.units if u.layer == layer}
        seconds = [u.seconds for u in units.values() if u.seconds is not None]
        errors = [f"{units[p].error:.5f}" for p in projections]
        table.add_row(str(layer), *errors, f"{sum(seconds):.1f}" if seconds else "-")
    means = [_mean([u.error for u in result.units if u.projection == p]) for p in projections]
    table.add_section()
    table.add_row("mean", *(f"{m:.5f}" for m in means), f"{result.seconds:.1f}")
    console.print(table)
    console.print(_parameters(result.settings, result.plan))
    console.print(f"{result.out}: {_bytes(result.plan.output_bytes)}. Next:", **PLAIN)
    command = f"  mobe-gguf export {result.out} {result.out.name}.gguf --quant q4_k"
    for option, name in (
        ("basis", result.settings.for_basis),
        ("transform", result.settings.for_transform),
    ):
        command += f" --{option}-type {name}" if name else ""
    console.print(command, **PLAIN)


def plan_json(job: Job) -> dict[str, Any]:
    """``--dry-run --json``."""
    return {"out": str(job.out), "settings": job.settings.to_json(), "plan": job.plan.to_json()}


def result_json(result: Result) -> dict[str, Any]:
    """``--json``."""
    return {
        "out": str(result.out),
        "settings": result.settings.to_json(),
        "plan": result.plan.to_json(),
        "units": [asdict(u) for u in result.units],
        "seconds": result.seconds,
    }


def _settings_line(s: JobSettings) -> str:
    terms = f" of at most {s.mix_terms} terms" if s.mix_terms else ""
    return (
        f"layers {format_layers(s.layers)}, {' and '.join(s.projections)}: {s.bases} bases of rank {s.rank}"
        + (f" in {s.groups} groups" if s.groups > 1 else "")
        + f", {s.activation}, {s.mix} mix{terms}, {s.steps} steps, objective {s.objective}, stored as {s.dtype}, seed {s.seed}"
    )


def print_types(job: Job, console: Console) -> None:
    """The types that the factors are fitted for, if any, and where one does not fit the rows, what it becomes."""
    s, d = job.settings, job.checkpoint.n_embd
    solver = s.solver().resolved(d)
    said = []
    for factor, asked, got, row in (
        ("bases", s.for_basis, solver.basis_type, d),
        ("A", s.for_transform, solver.transform_type, s.rank),
    ):
        if asked:
            said.append(
                f"{factor} {got}" + (f" ({asked} does not fit rows of {row})" if got != asked else "")
            )
    if said:
        console.print("fitted to be exported as: " + ", ".join(said), **PLAIN)


def _parameters(s: JobSettings, plan: Plan) -> Table:
    table = Table()
    for name in ("parameters", "before", "after", "kept"):
        table.add_column(name, justify="left" if name == "parameters" else "right")
    for name, before, after in (
        (" and ".join(s.projections) + ", chosen layers", plan.projected_before, plan.projected_after),
        ("all routed experts", plan.experts_before, plan.experts_after),
        ("whole model", plan.model_before, plan.model_after),
    ):
        table.add_row(name, _count(before), _count(after), f"{after / before:.1%}")
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return str(n)


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"
