"""Factorizing a whole checkpoint: one unit is one projection of one layer; what is finished stays finished.

Beside OUT grows ``OUT.work/``: ``job.json`` with the settings, ``units/`` with one safetensors file for each finished
unit, complete or absent, already under the tensor names of the final checkpoint.  A killed job is taken up from there.
When all units are there OUT is assembled and the work directory goes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mobe_gguf.atomic import atomic_path, write_json
from mobe_gguf.checkpoint import Checkpoint, read_header
from mobe_gguf.errors import MobeError, UsageError
from mobe_gguf.factorize.imatrix import Imatrix
from mobe_gguf.factorize.plan import JobSettings, Options, Plan, plan_checkpoint, resume_settings, settle
from mobe_gguf.factorize.solver import Factors, fit
from mobe_gguf.factorize.writer import Entry, write_checkpoint, write_safetensors
from mobe_gguf.progress import Bar, bar

#: Version of the ``mobe`` key in config.json and of the work directory.
FORMAT = 1
#: Goes up with every change that makes the same settings give other factors.
SOLVER = "projected-adam-1"

#: One unit at a time reads the source: a disk is quickest in order.
_READING = threading.Lock()


@dataclass(frozen=True)
class UnitResult:
    """``error``: |W - W'|^2 / |W|^2; ``objective``: the same in the metric minimised; ``seconds`` None if resumed."""

    layer: int
    projection: str
    error: float
    objective: float
    steps: int
    seconds: float | None = None


@dataclass(frozen=True)
class Result:
    """What :func:`run` did: ``units`` in order, and the arithmetic of sizes."""

    out: Path
    settings: JobSettings
    plan: Plan
    units: list[UnitResult]
    seconds: float


@dataclass(frozen=True)
class Job:
    """A job that passed every check but has done no work yet."""

    checkpoint: Checkpoint
    out: Path
    settings: JobSettings
    plan: Plan
    imatrix: Imatrix | None

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
    return out.with_name(out.name + ".work")


def prepare(model: Path, out: Path, options: Options, *, resume: bool = False) -> Job:
    """Check everything that can be checked from headers, and settle the settings.  Writes nothing.

    Raises MobeError or UsageError: source broken or already factorized, OUT in the way, settings that do not fit.
    """
    checkpoint = Checkpoint(model)
    if checkpoint.is_mobe:
        raise MobeError(
            f"{model} is a MoBE checkpoint already. Export it:\n  mobe-gguf export {model} model.gguf --quant q4_k"
        )
    imatrix = Imatrix(Path(options.imatrix)) if options.imatrix is not None else None
    with _disk_errors(out):
        settings = _settings(checkpoint, out, options, imatrix, resume)
    if settings.objective == "activation" and imatrix is None:
        if settings.imatrix is None:
            raise UsageError("--objective activation needs --imatrix FILE (from llama-imatrix)")
        raise MobeError("the job to resume was started with an --imatrix; give the same file again")
    if settings.objective == "mse" and imatrix is not None:
        raise UsageError("--imatrix is only used with --objective activation; leave one of them out")
    for layer, projection in settings.units():
        checkpoint.check_experts(layer, projection)
        if imatrix:
            imatrix.weight(layer, projection, checkpoint.n_expert, checkpoint.n_embd)
    return Job(checkpoint, out, settings, plan_checkpoint(checkpoint, settings), imatrix)


def _settings(
    checkpoint: Checkpoint, out: Path, options: Options, imatrix: Imatrix | None, resume: bool
) -> JobSettings:
    """Those of the job in the work directory if it is resumed, else new ones."""
    if imatrix:
        options = options.replace(imatrix=imatrix.checksum)
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


def run(job: Job, *, device: str = "cpu", quiet: bool = False, workers: int | None = None) -> Result:
    """Do the work, or what is left of it.  MobeError if it fails; finished units are kept then.

    ``workers``: units fitted at once, on the CPU by default as many as memory and torch's number of threads allow.
    """
    start = time.monotonic()
    with _disk_errors(job.out), _lock(job):
        results = {unit: _finished(job, *unit) for unit in job.settings.units()}
        _check_space(job, results)
        if not (job.work / "job.json").exists():
            write_json(job.work / "job.json", job.description())
        with bar("factorize", len(results), quiet) as progress:
            for r in filter(None, results.values()):
                progress.advance(1, f"layer {r.layer} {r.projection}: error {r.error:.5f}, finished earlier")
            left = [unit for unit, result in results.items() if result is None]
            for r in _fit_all(job, left, device, workers, progress):
                results[r.layer, r.projection] = r
                progress.advance(
                    1,
                    f"layer {r.layer} {r.projection}: error {r.error:.5f}, {r.steps} steps, {r.seconds:.1f} s",
                )
        units = [results[unit] for unit in job.settings.units()]
        files = {unit: job.unit_path(*unit) for unit in job.settings.units()}
        write_checkpoint(job.out, job.checkpoint, files, _config(job, units))
    shutil.rmtree(job.work, ignore_errors=True)
    return Result(job.out, job.settings, job.plan, units, time.monotonic() - start)


def _fit_all(
    job: Job, units: list[tuple[int, str]], device: str, workers: int | None, progress: Bar
) -> Iterator[UnitResult]:
    """Fit ``units``, several at once; yields each as it is finished.  The first failure stops the others.

    Units side by side on one thread each, not one unit on many threads: the matrices of a small model are too small to
    share out (measured: on two busy cores a second thread made a step of the tiny model six times slower).
    """
    threads = torch.get_num_threads()
    if workers is None:
        workers = (
            min(threads, len(units), int(0.5 * _free_memory() / job.plan.memory_bytes))
            if device == "cpu"
            else 1
        )
    workers = max(1, workers)
    stop = threading.Event()

    def work(unit: tuple[int, str]) -> UnitResult:
        torch.set_num_threads(max(1, threads // workers))  # of this worker
        began = time.monotonic()

        def on_step(share: float, error: float) -> None:
            if stop.is_set():
                raise Stopped
            progress.update(
                f"layer {unit[0]} {unit[1]}: {share:4.0%}, error {error:.5f}, {time.monotonic() - began:.0f} s"
            )

        return fit_unit(job, *unit, device, on_step)

    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(work, unit) for unit in units]):
            yield future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class Stopped(Exception):
    """Ends a fit from its progress callback because another one failed or the user gave up."""


def _free_memory() -> int:
    """Bytes that can be had without swapping (Linux), else all there are."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fit_unit(
    job: Job, layer: int, projection: str, device: str, on_step: Callable[[float, float], None] | None = None
) -> UnitResult:
    """Read, fit and write one unit."""
    checkpoint = job.checkpoint
    weight = job.imatrix and job.imatrix.weight(layer, projection, checkpoint.n_expert, checkpoint.n_embd)
    with _READING:
        stack = checkpoint.expert_stack(layer, projection)
    factors = fit(
        stack,
        job.settings.solver(),
        weight=weight,
        device=device,
        label=f"layer {layer} {projection}",
        on_step=on_step,
        overwrite_w=True,
    )
    result = UnitResult(layer, projection, factors.error, factors.objective, factors.steps, factors.seconds)
    # No times in the file: a resumed job gives the same bytes as one that was never stopped.
    about = {"error": result.error, "objective": result.objective, "steps": result.steps}
    with atomic_path(job.unit_path(layer, projection)) as part:
        entries = [Entry.of(name, tensor) for name, tensor in _tensors(job, result, factors).items()]
        write_safetensors(part, entries, {"format": "pt", "mobe": json.dumps(about)})
    return result


def _tensors(job: Job, unit: UnitResult, factors: Factors) -> dict[str, torch.Tensor]:
    """The unit's factors under the names of the MoBE checkpoint."""
    family, g = job.checkpoint.family, job.settings.groups
    tensors = {}
    for group, (basis, mix) in enumerate(zip(factors.basis.chunk(g), factors.mix.chunk(g), strict=True)):
        index = group if g > 1 else None
        tensors[family.basis(unit.layer, unit.projection, index)] = basis
        tensors[family.mix(unit.layer, unit.projection, index)] = mix
    for e, transform in enumerate(factors.transform):
        tensors[family.expert_weight(unit.layer, e, unit.projection)] = transform
    return tensors


def _finished(job: Job, layer: int, projection: str) -> UnitResult | None:
    """The result of a unit that an earlier run finished; None if there is none or its file is damaged."""
    path = job.unit_path(layer, projection)
    try:
        read_header(path)
        with safe_open(path, framework="pt") as f:
            about = json.loads(f.metadata()["mobe"])
        return UnitResult(layer, projection, about["error"], about["objective"], about["steps"])
    except (MobeError, SafetensorError, ValueError, KeyError, TypeError):
        path.unlink(missing_ok=True)
        return None


def _config(job: Job, results: list[UnitResult]) -> dict[str, Any]:
    """config.json of the MoBE checkpoint: the original's, and what its readers need."""
    errors: dict[str, dict[str, float]] = {}
    for r in results:
        errors.setdefault(str(r.layer), {})[r.projection] = r.error
    mobe = job.description() | {"source": str(job.checkpoint.path), "errors": errors}
    if job.settings.objective != "mse":
        mobe["objectives"] = {f"{r.layer}.{r.projection}": r.objective for r in results}
    return job.checkpoint.config | {
        "num_B": job.settings.bases,
        "activation": job.settings.activation,
        "mobe": mobe,
    }


def _check_space(job: Job, done: dict[tuple[int, str], UnitResult | None]) -> None:
    """MobeError if the disk cannot hold what is still to be written."""
    present = sum(job.unit_path(*unit).stat().st_size for unit, result in done.items() if result)
    needed, free = job.plan.output_bytes - present, shutil.disk_usage(job.work).free
    if needed > free:
        raise MobeError(
            f"{job.out.parent}: not enough space on the disk: {needed / 1e9:.2f} GB are still to be written, "
            f"{free / 1e9:.2f} GB are free. Free some, or choose OUT on another disk."
        )


@contextlib.contextmanager
def _lock(job: Job) -> Iterator[None]:
    """Hold the work directory against a second run; removes it again if nothing was finished in it."""
    (job.work / "units").mkdir(parents=True, exist_ok=True)
    with open(job.work / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise MobeError(
                f"{job.work}: another run is working on it; wait for it or choose another OUT"
            ) from e
        try:
            yield
        except BaseException:
            if not any((job.work / "units").glob("layer-*.safetensors")):
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
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MobeError(f"{out.parent}: the disk is full ({e}). Free some space.{again}") from e
        raise MobeError(f"{out}: cannot be written: {e}. Choose another OUT.{again}") from e
