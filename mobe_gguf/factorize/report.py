"""Reports of a plan and of a finished job: tables, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from mobe_gguf.core.files import describe_size
from mobe_gguf.core.layers import format_layers
from mobe_gguf.core.progress import duration
from mobe_gguf.core.sides import by_side, side
from mobe_gguf.factorize.expected import expected_time, gpu_seconds
from mobe_gguf.factorize.job import Job, JobResult
from mobe_gguf.factorize.plan import Plan, baseline
from mobe_gguf.factorize.spec import JobSettings
from mobe_gguf.models.original import Original

#: For lines of text: no colours and no wrapping, so that commands and paths can be copied.
PLAIN: dict[str, Any] = dict(highlight=False, soft_wrap=True)


def print_plan(job: Job, console: Console) -> None:
    """Print the plan before the work: settings, parameters, disk and memory."""
    c, s = job.checkpoint, job.settings
    console.print(
        f"{c.path}: {c.family.name}, {len(c.moe_layers)} of {c.n_layer} layers MoE, {c.n_expert} experts "
        f"({c.n_expert_used} used) of {c.n_ff_exp} x {c.n_embd}",
        **PLAIN,
    )
    console.print(_settings_line(s, c), **PLAIN)
    console.print(_parameters(s, job.plan))
    if not s.how.is_factors:
        console.print(_written_dense(s), **PLAIN)
    if job.goal is not None and job.sizes is None:
        example = job.goal.nominal()[s.units()[0]]
        console.print(
            f"as if all units had an even share ({example.bases} bases of rank {example.rank}); what each gets is settled "
            "by short fits, which a dry run does not make",
            **PLAIN,
        )
    console.print(
        f"on disk {describe_size(job.plan.output_bytes)}, memory about {describe_size(job.plan.memory_bytes)} for each unit at work",
        **PLAIN,
    )


def cautions(job: Job) -> list[str]:
    """Warnings before the work: about the model, and about a rank that is not a whole number of blocks of any type."""
    lines = [f"note: {note}" for note in getattr(job.checkpoint, "notes", ())]
    lines += [f"note: {note}" for note in job.checkpoint.check_values().notes]
    lines += [f"note: {note}" for note in (job.imatrix.notes if job.imatrix else ())]
    rank, s = job.settings.rank, job.settings
    if isinstance(s.target, float):
        whole = job.plan.model_after / job.plan.model_before
        lines.append(
            f"note: --target {s.target:g} is of {_listed(s.projections)} alone; the whole model keeps {whole:.1%} of its parameters"
        )
    if s.how.fitted and rank is not None and rank % 32 and not all(side(p).output for p in s.projections):
        lines.append(
            f"warning: A has rows of --rank {rank} values, which are no whole blocks of 32: every --quant writes it as f16. "
            f"{rank // 32 * 32 or 32} and {-(-rank // 32) * 32} are"
        )
    return lines


def print_time(job: Job, device: str, console: Console) -> None:
    """Print how long the job will take."""
    t = expected_time(job, device)
    probing = f"probing {duration(t['probing'])}, fitting {duration(t['fitting'])}; " if t["probing"] else ""
    console.print(
        f"time about {duration(t['seconds'])} on {device} ({probing}{t['at_once']} units at once; by a trial of "
        f"{t['trial']:.1f} s on random experts, without reading, and a fit may stop sooner)",
        **PLAIN,
    )
    if gpus := gpu_seconds(job):
        listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in gpus.items())
        console.print(f"fitting on one GPU, computed and not measured: {listed}", **PLAIN)


def print_result(result: JobResult, console: Console, moments: str | None = None) -> None:
    """Print the result after the work: error per layer, the minimized error first; parameters before and after; the next
    command, with the file ``moments`` that the fit used."""
    settings, projections = result.settings, result.settings.projections
    by_inputs = settings.objective != "mse"
    console.print(_minimized(settings), **PLAIN)
    table = Table()
    table.add_column("layer", justify="right")
    weights = tuple(f"{name}, weights" for name in projections) if by_inputs else ()
    for name in (*projections, *weights, *(("m x r",) if result.sizes else ()), "seconds"):
        table.add_column(name, justify="right")
    for layer in result.settings.layers:
        units = {u.projection: u for u in result.units if u.layer == layer}
        seconds = [u.seconds for u in units.values() if u.seconds is not None]
        errors = [f"{units[p].objective:.5f}" for p in projections]
        errors += [f"{units[p].error:.5f}" for p in projections] if by_inputs else []
        if result.sizes:
            chosen = [result.sizes[layer, p] for p in projections]
            errors.append(", ".join(f"{size.bases} x {size.rank}" for size in chosen))
        table.add_row(str(layer), *errors, f"{sum(seconds):.1f}" if seconds else "-")
    means = [_mean([u.objective for u in result.units if u.projection == p]) for p in projections]
    if by_inputs:
        means += [_mean([u.error for u in result.units if u.projection == p]) for p in projections]
    table.add_section()
    table.add_row(
        "mean", *(f"{m:.5f}" for m in means), *([""] if result.sizes else []), f"{result.seconds:.1f}"
    )
    console.print(table)
    console.print(_parameters(result.settings, result.plan))
    if not result.settings.how.is_factors:
        console.print(_written_dense(result.settings), **PLAIN)
    console.print(f"{result.out}: {describe_size(result.plan.output_bytes)}. Next:", **PLAIN)
    quant = result.settings.quant or result.settings.how.quant
    command = f"  mobe-gguf export {result.out} {result.out.name}.gguf --quant {quant}"
    command += "" if result.settings.how.is_factors else " --dense"
    for option, name in (
        ("basis", result.settings.for_basis),
        ("transform", result.settings.for_transform),
    ):
        command += f" --{option}-type {name}" if name else ""
    command += f" --moments {moments}" if moments else ""
    console.print(command, **PLAIN)


def _minimized(settings: JobSettings) -> str:
    """A heading for the error that the fit minimized."""
    if settings.objective == "mse":
        return "minimized: relative error of the weights, |W - W'|² / |W|²"
    of = (
        "every expert's inputs, from the moments"
        if settings.moments
        else "the inputs' squares, from the imatrix"
    )
    return (
        f"minimized: relative error of the outputs, |(W - W') x|² / |W x|², over {of}; beside it that of the weights, "
        "|W - W'|² / |W|², which is larger for it"
    )


def plan_json(job: Job) -> dict[str, Any]:
    """The output of ``--dry-run --json``."""
    return {"out": str(job.out), "settings": job.settings.to_json(), "plan": job.plan.to_json()}


def result_json(result: JobResult) -> dict[str, Any]:
    """The output of ``--json``."""
    return {
        "out": str(result.out),
        "settings": result.settings.to_json(),
        "plan": result.plan.to_json(),
        "units": [asdict(u) for u in result.units],
        "seconds": result.seconds,
    }


def _settings_line(s: JobSettings, model: Original) -> str:
    where = f"layers {format_layers(s.layers)}, {_listed(s.projections)}: "
    if not s.how.fitted:
        rank = baseline(s, model.n_expert, model.n_ff_exp, model.n_embd).rank
        return where + f"{s.method} of rank {rank}, objective {s.objective}, stored as {s.dtype}"
    if isinstance(s.target, float):
        size = f"bases to keep {s.target:.1%} of these matrices' parameters"
    elif s.target is not None:
        size = f"bases for a {s.quant} file of {describe_size(s.target)}"
    else:
        size = f"{s.bases} bases of rank {s.rank}"
    terms = f" of at most {s.mix_terms} terms" if s.mix_terms else ""
    return (
        where
        + size
        + (f" in {s.groups} groups" if s.groups > 1 else "")
        + f", {s.activation}, {s.mix} mix{terms}, {s.steps} steps, objective {s.objective}, stored as {s.dtype}, seed {s.seed}"
    )


def _written_dense(s: JobSettings) -> str:
    return (
        f"{s.method} has no form that the runtime knows: the matrices that its factors stand for are written, an ordinary "
        "model of the original's size; what is kept counts the factors"
    )


def print_types(job: Job, console: Console) -> None:
    """Print the types for which the factors are fitted, if any; if a type does not fit the rows, also its replacement."""
    s, c = job.settings, job.checkpoint
    if not (s.for_basis or s.for_transform):
        return
    said = []
    sides = by_side(s.projections)
    for found in sides:
        solver = s.solver(job.example(), found[0]).resolved(c.n_ff_exp, c.n_embd)
        basis_row, transform_row = solver.rows(c.n_ff_exp, c.n_embd)
        of = f" of {_listed(found)}" if side(found[0]).output or len(sides) > 1 else ""
        for factor, asked, got, row in (
            ("bases", s.for_basis, solver.basis_type, basis_row),
            ("A", s.for_transform, solver.transform_type, transform_row),
        ):
            if asked:
                why = f" ({asked} does not fit rows of {row})" if got != asked else ""
                said.append(f"{factor}{of} {got}{why}")
    if said:
        console.print("fitted to be exported as: " + ", ".join(said), **PLAIN)


def _parameters(s: JobSettings, plan: Plan) -> Table:
    table = Table()
    for name in ("parameters", "before", "after", "kept"):
        table.add_column(name, justify="left" if name == "parameters" else "right")
    for name, before, after in (
        (_listed(s.projections) + ", chosen layers", plan.projected_before, plan.projected_after),
        ("all routed experts", plan.experts_before, plan.experts_after),
        ("whole model", plan.model_before, plan.model_after),
    ):
        table.add_row(name, _count(before), _count(after), f"{after / before:.1%}")
    return table


def _listed(words: tuple[str, ...]) -> str:
    """``gate, up and down``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return str(n)
