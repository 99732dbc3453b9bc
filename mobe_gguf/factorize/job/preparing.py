"""Everything that can be checked before a job does any work."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.records import record
from mobe_gguf.factorize.job import probing, state
from mobe_gguf.factorize.job.state import FORMAT, Job, JobWorkspace, disk_errors
from mobe_gguf.factorize.plan import plan_checkpoint, settle
from mobe_gguf.factorize.spec import JobRecord, JobSettings, Options, resume_settings
from mobe_gguf.formats.imatrix import ImatrixFile
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.original import Original, open_original


def prepare(
    model: Path,
    out: Path,
    options: Options,
    *,
    resume: bool = False,
    predict: probing.Predict | None = None,
    dry: bool = False,
) -> Job:
    """Check everything that can be checked from headers, and complete the settings.  Writes nothing.

    ``predict``: predicts the size of a GGUF file, for a target in bytes.  ``dry``: nothing will be written, so existing files
    at OUT or in its work directory do not matter; with ``resume`` the job there is planned.

    Raises MobeError or UsageError if the source is damaged or already factorized, OUT exists, or settings do not fit.
    """
    checkpoint = open_original(model)
    if checkpoint.is_mobe:
        raise MobeError(
            f"{model} is a MoBE checkpoint already. Export it:\n  mobe-gguf export {model} model.gguf --quant q4_k"
        )
    imatrix = ImatrixFile(options.imatrix) if options.imatrix is not None else None
    moments = Moments(Path(options.moments)) if options.moments is not None else None
    with disk_errors(out):
        settings = _settings(checkpoint, out, options, imatrix, moments, resume, dry)
    if not settings.how.is_factors and checkpoint.directory is None:
        raise UsageError(
            f"--method {settings.method} writes an ordinary model, for its factors have no form of their own: it needs a Hugging Face "
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
            imatrix.weight(
                layer, projection, checkpoint.n_expert, checkpoint.expert_shape(layer, projection)[1]
            )
        if moments:
            moments.check(
                layer, projection, checkpoint.n_expert, checkpoint.expert_shape(layer, projection)[1]
            )
    checkpoint.check_whole()
    checkpoint.check_values()
    goal = probing.goal_of(checkpoint, settings, imatrix, predict)
    job = Job(
        checkpoint,
        out,
        settings,
        plan_checkpoint(checkpoint, settings, None if goal is None else goal.nominal(), moments),
        imatrix,
        goal,
        moments=moments,
    )
    if goal is None:
        return job
    sizes = probing.read_sizes(job)
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
    dry: bool,
) -> JobSettings:
    """The settings of the job in the work directory if it is resumed, else new ones."""
    if imatrix:
        options = options.replace(imatrix=imatrix.checksum)
    if moments:
        options = options.replace(moments=moments.checksum)
    workspace = JobWorkspace.beside(out)
    work = workspace.path
    if dry and not resume:
        return settle(options, checkpoint)
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
        old = record(JobRecord, workspace.read("job.json"))
    except ValueError as e:
        raise MobeError(f"{work / 'job.json'}: cannot be read ({e}); remove {work} to start anew") from e
    for name, before, now in (
        ("work directory's version", old.version, FORMAT),
        ("solver", old.solver, state.SOLVER),
        ("checksum of MODEL", old.source_checksum, checkpoint.checksum),
    ):
        if before != now:
            raise MobeError(
                f"the job in {work} cannot be resumed: the {name} was {before}, now it is {now}. "
                "Remove the directory or choose another OUT."
            )
    return resume_settings(old.settings, options)
