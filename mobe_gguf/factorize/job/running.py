"""Run a job, or the rest of one: first all units, then the output."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.executors import Place, Work, each
from mobe_gguf.core.executors.base import Done
from mobe_gguf.core.executors.cluster import await_file, cluster
from mobe_gguf.core.files import Unchanged, describe_sizes
from mobe_gguf.core.progress import Bar, bar, say
from mobe_gguf.factorize.job import probing
from mobe_gguf.factorize.job.remote import JobAddress
from mobe_gguf.factorize.job.state import Job, disk_errors
from mobe_gguf.factorize.job.unit import UnitResult, fit_unit, probe_unit
from mobe_gguf.factorize.plan import Plan, baseline, plan_checkpoint
from mobe_gguf.factorize.spec import JobSettings
from mobe_gguf.factorize.target import Size, Unit
from mobe_gguf.formats.safetensors import read_header
from mobe_gguf.models.writer import write_output


@dataclass(frozen=True)
class JobResult:
    """What :func:`run` did: ``units`` in order, the plan with all sizes, and ``sizes`` of a ``--target`` job."""

    out: Path
    settings: JobSettings
    plan: Plan
    units: list[UnitResult]
    seconds: float
    sizes: Mapping[Unit, Size] | None = None


def run(
    job: Job, *, device: str = "cpu", quiet: bool = False, workers: int | None = None, ray: str | None = None
) -> JobResult:
    """Run the job, or the rest of it.  MobeError if it fails; finished units are then kept.

    ``device``: one, or several as ``cuda:0,cuda:1``, each with its own process.  ``workers``: units fitted at once on one
    device; on the CPU by default as many as memory and torch's number of threads allow.  ``ray``: address of a cluster that
    runs all units.
    """
    place = Place.of(device, ray, workers)
    start = time.monotonic()
    unchanged = Unchanged(job.checkpoint.path)
    with cluster(ray), disk_errors(job.out), job.workspace.running():
        if job.goal is not None and job.sizes is None:
            _describe(job)
            job = _choose_sizes(job, place, quiet)
        results = {unit: _finished(job, *unit) for unit in job.settings.units()}
        _check_space(job, results)
        _describe(job)
        with bar("factorize", len(results), quiet) as progress:
            for r in filter(None, results.values()):
                progress.found(1, f"layer {r.layer} {r.projection}: {_error(job, r)}, finished earlier")
            left = [unit for unit, result in results.items() if result is None]
            for r in each(work(job, fit_unit), left, place, progress):
                if ray is not None:
                    await_file(job.unit_path(r.layer, r.projection))
                results[r.layer, r.projection] = r
                progress.advance(
                    1,
                    f"layer {r.layer} {r.projection}: {_error(job, r)}, {r.steps} steps, {r.seconds:.1f} s",
                )
        units = [result for result in results.values() if result is not None]
        files = {unit: job.unit_path(*unit) for unit in job.settings.units()}
        unchanged.check(f"begin again:\n  rm -r {job.workspace.path}")
        write_output(job.out, job.checkpoint, files, _config(job, units))
    job.workspace.remove()
    return JobResult(job.out, job.settings, job.plan, units, time.monotonic() - start, job.sizes)


def _error(job: Job, result: UnitResult) -> str:
    """The minimized error as text."""
    if job.settings.objective == "mse":
        return f"error of the weights {result.error:.5f}"
    return f"error of the outputs {result.objective:.5f}"


def work(job: Job, do: Callable[..., Done]) -> Work[Job, Done]:
    """``do(job, layer, projection, device, on_step)`` as :class:`Work` for executors."""
    return Work(do, job, lambda: JobAddress.of(job), label, job.plan.memory_bytes)


def label(unit: Unit) -> str:
    """A unit's name in messages."""
    return f"layer {unit[0]} {unit[1]}"


def _describe(job: Job) -> None:
    if not job.workspace.any("job.json"):
        job.workspace.write("job.json", job.description())


def _choose_sizes(job: Job, place: Place, quiet: bool) -> Job:
    """Probe all units that an earlier run did not probe, and choose m and r of each for ``--target``."""
    units = job.settings.units()
    probes = {unit: found for unit in units if (found := probing.read_probes(job, unit))}

    def probe(wanted: Mapping[Unit, list[Size]], progress: Bar) -> None:
        do = partial(probe_unit, dict(probes), wanted)
        for unit, found in each(work(job, do), list(wanted), place, progress):
            probes[unit] = found
            said = ", ".join(
                f"{p.error:.4f} with {p.size.bases} x {p.size.rank}" for p in found.again or found.first
            )
            progress.advance(1, f"layer {unit[0]} {unit[1]}: error {said}")

    with bar("probe", len(units), quiet) as progress:
        progress.found(len(probes))
        probe({unit: [] for unit in units if unit not in probes}, progress)
    weights, why = probing.layer_weights(job)
    if not quiet:
        say(why)
    again = probing.to_probe_again(job, {unit: probes[unit] for unit in units}, weights)
    with bar("probe again", sum(1 for sizes in again.values() if sizes), quiet) as progress:
        left = {unit: sizes for unit, sizes in again.items() if sizes and probes[unit].again is None}
        progress.found(sum(1 for sizes in again.values() if sizes) - len(left))
        probe(left, progress)
    sizes = probing.choose(job, {unit: probes[unit] for unit in units}, weights)
    return replace(job, sizes=sizes, plan=plan_checkpoint(job.checkpoint, job.settings, sizes, job.moments))


def _finished(job: Job, layer: int, projection: str) -> UnitResult | None:
    """The result of a unit that an earlier run finished; None if there is none or its file is damaged."""
    path = job.unit_path(layer, projection)
    try:
        read_header(path)
        with safe_open(path, framework="pt") as f:
            about = json.loads(f.metadata()["mobe"])
        size = job.size((layer, projection))
        if size and (about["bases"], about["rank"]) != (size.bases, size.rank):
            raise ValueError("fitted with another size")
        return UnitResult(layer, projection, about["error"], about["objective"], about["steps"])
    except (MobeError, SafetensorError, ValueError, KeyError, TypeError):
        path.unlink(missing_ok=True)
        return None


def _config(job: Job, results: list[UnitResult]) -> dict[str, Any]:
    """config.json of the MoBE checkpoint: the original's plus the keys that its readers need."""
    errors: dict[str, dict[str, float]] = {}
    for r in results:
        errors.setdefault(str(r.layer), {})[r.projection] = r.error
    mobe = job.description() | {"source": str(job.checkpoint.path.absolute()), "errors": errors}
    if job.settings.objective != "mse":
        mobe["objectives"] = {f"{r.layer}.{r.projection}": r.objective for r in results}
    if job.sizes:
        mobe["sizes"] = {f"{layer}.{projection}": asdict(s) for (layer, projection), s in job.sizes.items()}
    bases = max(s.bases for s in job.sizes.values()) if job.sizes else job.settings.bases
    if not job.settings.how.fitted:
        shape = job.checkpoint.n_expert, job.checkpoint.n_ff_exp, job.checkpoint.n_embd
        chosen = baseline(job.settings, *shape)
        mobe |= {"method": chosen.method.name, "rank": chosen.rank, "kept": chosen.kept / math.prod(shape)}
        if not chosen.method.is_factors:  # an ordinary model with the matrices that the factors represent
            return job.checkpoint.config_file | {"mobe": mobe}
        bases = chosen.method.bases(shape[0])
    return job.checkpoint.config_file | {"num_B": bases, "activation": job.settings.activation, "mobe": mobe}


def _check_space(job: Job, done: dict[tuple[int, str], UnitResult | None]) -> None:
    """MobeError if the disk cannot hold what is still to be written."""
    present = sum(job.unit_path(*unit).stat().st_size for unit, result in done.items() if result)
    needed, free = job.plan.output_bytes - present, shutil.disk_usage(job.work).free
    if needed > free:
        left, there = describe_sizes(needed, free)
        raise MobeError(
            f"{job.out.parent}: not enough space on the disk: {left} are still to be written, {there} are free. Free some, or "
            "choose OUT on another disk."
        )
