"""Factorizing a whole checkpoint: one unit is one projection of one layer; what is finished stays finished.

Beside OUT grows ``OUT.work/``: ``job.json`` with the settings, ``units/`` with one safetensors file for each finished
unit, complete or absent, already under the tensor names of the final checkpoint.  A killed job is taken up from there.
When all units are there OUT is assembled and the work directory goes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mobe_gguf.core.atomic import write_json
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import FULL, describe_sizes
from mobe_gguf.core.locks import Busy, locked
from mobe_gguf.core.progress import Bar, bar, say
from mobe_gguf.factorize import probing
from mobe_gguf.factorize.distributed import await_file, cluster
from mobe_gguf.factorize.plan import (
    JobSettings,
    Options,
    Plan,
    baseline,
    plan_checkpoint,
    resume_settings,
    settle,
)
from mobe_gguf.factorize.target import Goal, Size, Unit
from mobe_gguf.factorize.unit import UnitResult, fit_unit, probe_unit
from mobe_gguf.factorize.workers import Place, each
from mobe_gguf.formats.imatrix import ImatrixFile
from mobe_gguf.formats.moments import Moments
from mobe_gguf.formats.safetensors import read_header
from mobe_gguf.models.gguf_source import GgufModel
from mobe_gguf.models.original import Original, open_original
from mobe_gguf.models.writer import write_output

#: Version of the ``mobe`` key in config.json and of the work directory.
FORMAT = 1
#: Goes up with every change that makes the same settings give other factors.
SOLVER = "projected-adam-2"


@dataclass(frozen=True)
class Result:
    """What :func:`run` did: ``units`` in order, and the arithmetic of sizes; ``sizes`` of a ``--target`` job."""

    out: Path
    settings: JobSettings
    plan: Plan
    units: list[UnitResult]
    seconds: float
    sizes: Mapping[Unit, Size] | None = None


@dataclass(frozen=True)
class Job:
    """A job that passed every check but has done no work yet.

    ``goal``: what ``--target`` asks for, ``sizes`` what was chosen for it, None before the units are probed: ``plan`` is that
    of an even share then.  ``shared``: others may write the same unit at the same time, as one that was given up for dead.
    """

    checkpoint: Original
    out: Path
    settings: JobSettings
    plan: Plan
    imatrix: ImatrixFile | None
    goal: Goal | None = None
    sizes: Mapping[Unit, Size] | None = None
    moments: Moments | None = None
    shared: bool = False

    def example(self) -> Size | None:
        """A size such as a unit has or may get; None where all have the settings' own."""
        sizes = self.sizes or (self.goal and self.goal.nominal())
        return next(iter(sizes.values())) if sizes else None

    def size(self, unit: Unit) -> Size | None:
        """m and r of a unit, None where they are the settings' own."""
        return self.sizes[unit] if self.sizes else None

    @property
    def moments_of_another(self) -> bool:
        """Whether the moments say that another model, or copy of it, was run; of a GGUF file the model was one of course."""
        about = self.moments and not isinstance(self.checkpoint, GgufModel) and self.moments.about
        return bool(about) and about.get("source_checksum") != self.checkpoint.checksum

    @property
    def work(self) -> Path:
        return work_directory(self.out)

    def unit_path(self, layer: int, projection: str) -> Path:
        return self.work / "units" / f"layer-{layer:03d}-{projection}.safetensors"

    def description(self) -> dict[str, Any]:
        """Content of job.json: all that a resumed job must agree with."""
        return {
            "version": FORMAT,
            "solver": SOLVER,
            "source_checksum": self.checkpoint.checksum,
            "settings": self.settings.to_json(),
        }


def work_directory(out: Path) -> Path:
    """Beside ``out``.  UsageError if that is no name for a directory to be made: ``.``, ``/``, ``..``, nothing."""
    if out.name in ("", ".."):
        raise UsageError(
            f"OUT is {str(out)!r}, a directory that is there already; name a new one, as {out / 'mobe'}"
        )
    return out.with_name(out.name + ".work")


def prepare(
    model: Path, out: Path, options: Options, *, resume: bool = False, predict: probing.Predict | None = None
) -> Job:
    """Check everything that can be checked from headers, and settle the settings.  Writes nothing.

    ``predict``: what tells the size of a GGUF file, for a target in bytes.

    Raises MobeError or UsageError: source broken or already factorized, OUT in the way, settings that do not fit.
    """
    checkpoint = open_original(model)
    if checkpoint.is_mobe:
        raise MobeError(
            f"{model} is a MoBE checkpoint already. Export it:\n  mobe-gguf export {model} model.gguf --quant q4_k"
        )
    imatrix = ImatrixFile(options.imatrix) if options.imatrix is not None else None
    moments = Moments(Path(options.moments)) if options.moments is not None else None
    with _disk_errors(out):
        settings = _settings(checkpoint, out, options, imatrix, moments, resume)
    if settings.method == "d2moe" and isinstance(checkpoint, GgufModel):
        raise UsageError(
            "--method d2moe writes an ordinary model, for its factors have no form of their own: it needs a Hugging Face "
            f"directory, and {model} is a GGUF file"
        )
    given = {"imatrix": imatrix, "moments": moments}
    for name, file in given.items():
        if getattr(settings, name) is not None and file is None:
            raise MobeError(f"the job to resume was started with an --{name}; give the same file again")
        if settings.objective == "mse" and file is not None:
            raise UsageError(f"--{name} is only used with --objective activation; leave one of them out")
    if settings.objective == "activation" and not any(given.values()):
        raise UsageError(
            "--objective activation needs --imatrix FILE (from llama-imatrix) or --moments FILE (from mobe-gguf moments)"
        )
    for layer, projection in settings.units():
        checkpoint.check_experts(layer, projection)
        if imatrix:
            imatrix.weight(layer, projection, checkpoint.n_expert, checkpoint.expert_shape(projection)[1])
        if moments:
            moments.check(layer, projection, checkpoint.n_expert, checkpoint.expert_shape(projection)[1])
    checkpoint.check_whole()
    checkpoint.check_values()
    goal = probing.goal_of(checkpoint, settings, imatrix, predict)
    job = Job(
        checkpoint,
        out,
        settings,
        plan_checkpoint(checkpoint, settings, goal and goal.nominal(), moments),
        imatrix,
        goal,
        moments=moments,
    )
    if goal is None:
        return job
    sizes = probing.read_sizes(probing.sizes_path(job), settings.units())
    if sizes:
        return replace(job, sizes=sizes, plan=plan_checkpoint(checkpoint, settings, sizes, moments))
    largest = plan_checkpoint(checkpoint, settings, dict.fromkeys(settings.units(), goal.largest()), moments)
    return replace(job, plan=replace(job.plan, memory_bytes=largest.memory_bytes))


def _settings(
    checkpoint: Original,
    out: Path,
    options: Options,
    imatrix: ImatrixFile | None,
    moments: Moments | None,
    resume: bool,
) -> JobSettings:
    """Those of the job in the work directory if it is resumed, else new ones."""
    if imatrix:
        options = options.replace(imatrix=imatrix.checksum)
    if moments:
        options = options.replace(moments=moments.checksum)
    work = work_directory(out)
    if os.path.lexists(out):
        if resume and work.exists():
            raise MobeError(f"{out} is whole already: there is nothing left to do. {work} can be removed.")
        raise MobeError(
            f"{out} exists already. Choose another OUT or remove it. (--resume continues from {work.name}.)"
        )
    if not (work / "job.json").exists():
        return settle(options, checkpoint)
    if not resume:
        done = len(list((work / "units").glob("layer-*.safetensors")))
        raise MobeError(
            f"{work} holds an unfinished job with {done} finished units. Add --resume to continue it, or remove it "
            "to start anew."
        )
    try:
        old = json.loads((work / "job.json").read_text(encoding="utf-8"))
        settings = JobSettings.from_json(old["settings"])
        version, solver, source = old["version"], old["solver"], old["source_checksum"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise MobeError(f"{work / 'job.json'}: cannot be read ({e}); remove {work} to start anew") from e
    for name, before, now in (
        ("work directory's version", version, FORMAT),
        ("solver", solver, SOLVER),
        ("checksum of MODEL", source, checkpoint.checksum),
    ):
        if before != now:
            raise MobeError(
                f"the job in {work} cannot be resumed: the {name} was {before}, now it is {now}. "
                "Remove the directory or choose another OUT."
            )
    return resume_settings(settings, options)


def run(
    job: Job, *, device: str = "cpu", quiet: bool = False, workers: int | None = None, ray: str | None = None
) -> Result:
    """Do the work, or what is left of it.  MobeError if it fails; finished units are kept then.

    ``device``: one, or several as ``cuda:0,cuda:1``, each with a process of its own.  ``workers``: units fitted at once on
    one device, on the CPU by default as many as memory and torch's number of threads allow.  ``ray``: address of a cluster
    that does it all.
    """
    place = Place.of(device, ray, workers)
    start = time.monotonic()
    with cluster(ray), _disk_errors(job.out), _lock(job):
        if job.goal is not None and job.sizes is None:
            _describe(job)
            job = _choose_sizes(job, place, quiet)
        results = {unit: _finished(job, *unit) for unit in job.settings.units()}
        _check_space(job, results)
        _describe(job)
        with bar("factorize", len(results), quiet) as progress:
            for r in filter(None, results.values()):
                progress.advance(1, f"layer {r.layer} {r.projection}: error {r.error:.5f}, finished earlier")
            left = [unit for unit, result in results.items() if result is None]
            for r in each(job, left, place, progress, fit_unit):
                if ray is not None:
                    await_file(job.unit_path(r.layer, r.projection))
                results[r.layer, r.projection] = r
                progress.advance(
                    1,
                    f"layer {r.layer} {r.projection}: error {r.error:.5f}, {r.steps} steps, {r.seconds:.1f} s",
                )
        units = [results[unit] for unit in job.settings.units()]
        files = {unit: job.unit_path(*unit) for unit in job.settings.units()}
        write_output(job.out, job.checkpoint, files, _config(job, units))
    shutil.rmtree(job.work, ignore_errors=True)
    return Result(job.out, job.settings, job.plan, units, time.monotonic() - start, job.sizes)


def _describe(job: Job) -> None:
    if not (job.work / "job.json").exists():
        write_json(job.work / "job.json", job.description())


def _choose_sizes(job: Job, place: Place, quiet: bool) -> Job:
    """Probe all units, or those that an earlier run did not, and settle m and r of each for ``--target``."""
    units = job.settings.units()
    probes = {unit: found for unit in units if (found := probing.read_probes(job, unit))}

    def probe(wanted: Mapping[Unit, list[Size]], progress: Bar) -> None:
        do = partial(probe_unit, dict(probes), wanted)
        for unit, found in each(job, list(wanted), place, progress, do):
            probes[unit] = found
            said = ", ".join(
                f"{p.error:.4f} with {p.size.bases} x {p.size.rank}" for p in found.again or found.first
            )
            progress.advance(1, f"layer {unit[0]} {unit[1]}: error {said}")

    with bar("probe", len(units), quiet) as progress:
        progress.advance(len(probes))
        probe({unit: [] for unit in units if unit not in probes}, progress)
    weights, why = probing.layer_weights(job)
    if not quiet:
        say(why)
    again = probing.to_probe_again(job, {unit: probes[unit] for unit in units}, weights)
    with bar("probe again", sum(1 for sizes in again.values() if sizes), quiet) as progress:
        left = {unit: sizes for unit, sizes in again.items() if sizes and probes[unit].again is None}
        progress.advance(sum(1 for sizes in again.values() if sizes) - len(left))
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
    """config.json of the MoBE checkpoint: the original's, and what its readers need."""
    errors: dict[str, dict[str, float]] = {}
    for r in results:
        errors.setdefault(str(r.layer), {})[r.projection] = r.error
    mobe = job.description() | {"source": str(job.checkpoint.path.absolute()), "errors": errors}
    if job.settings.objective != "mse":
        mobe["objectives"] = {f"{r.layer}.{r.projection}": r.objective for r in results}
    if job.sizes:
        mobe["sizes"] = {f"{layer}.{projection}": asdict(s) for (layer, projection), s in job.sizes.items()}
    bases = max(s.bases for s in job.sizes.values()) if job.sizes else job.settings.bases
    if job.settings.method != "mobe":
        shape = job.checkpoint.n_expert, job.checkpoint.n_ff_exp, job.checkpoint.n_embd
        chosen = baseline(job.settings, *shape)
        mobe |= {"method": chosen.method, "rank": chosen.rank, "kept": chosen.kept / math.prod(shape)}
        if not chosen.is_factors:  # an ordinary model, whose experts are what the factors stand for
            return job.checkpoint.config | {"mobe": mobe}
        bases = shape[0] if chosen.method == "svd" else 1
    return job.checkpoint.config | {"num_B": bases, "activation": job.settings.activation, "mobe": mobe}


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


@contextlib.contextmanager
def _lock(job: Job) -> Iterator[None]:
    """Hold the work directory against a second run; removes it again if nothing was finished in it."""
    (job.work / "units").mkdir(parents=True, exist_ok=True)
    lock = job.work / "lock"
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(locked(lock))
        except Busy as e:
            raise MobeError(
                f"{job.work}: another run is working on it; wait for it or choose another OUT"
            ) from e
        if held is None:
            say(f"note: {job.work} is on a file system without locks: start one run at a time")
        with open(lock, "w") as f:  # not atomically: the lock is on this very file
            f.write(uuid.uuid4().hex)  # by which workers of this run know the directory
            f.flush()
            os.fsync(f.fileno())
        try:
            yield
        except BaseException:
            if not any(job.work.glob("units/layer-*.safetensors")) and not any(
                job.work.glob("probes/layer-*.json")
            ):
                shutil.rmtree(job.work, ignore_errors=True)
            raise


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """What the operating system says of the disk, as a MobeError with the next step."""
    try:
        yield
    except OSError as e:
        again = ""
        with contextlib.suppress(OSError):
            if any((work_directory(out) / "units").glob("layer-*.safetensors")):
                again = " Finished units are kept; run the same command again with --resume."
        if e.errno in FULL:
            raise MobeError(f"{out.parent}: the disk is full ({e}). Free some space.{again}") from e
        raise MobeError(f"{out}: cannot be written: {e}. Choose another OUT.{again}") from e
