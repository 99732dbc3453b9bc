"""Factorize some layers in several ways, one after the other, and measure each; what is measured stays measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mobe_gguf import evaluate
from mobe_gguf.core.atomic import rename
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.names import ACTIVATIONS, PROJECTIONS
from mobe_gguf.core.progress import Bar, bar
from mobe_gguf.core.records import record
from mobe_gguf.core.workspace import Workspace, work_directory
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.factorize import job as jobs
from mobe_gguf.factorize.plan import LARGEST, SLACK, block_of, default_bases
from mobe_gguf.factorize.spec import Options
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint

VERSION = 1

#: In the work directory: what is studied.
STUDY = "study.json"

#: Values are counted in bins of equal width from -EDGE to EDGE; what lies outside counts in the last bin.
BINS, EDGE = 120, 3.0

#: Activations with which sizes of equal parameters are compared, and their numbers of bases.
WIDE_FORMS, WIDE_BASES = ("tanh", "none"), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
#: Of the GGUF files: rounding is not what is studied.
QUANT = "f16"


@dataclass(frozen=True)
class Trial:
    """One way to factorize the layers of the study."""

    bases: int
    activation: str
    rank: int | None = None

    @property
    def name(self) -> str:
        rank = "" if self.rank is None else f"-rank-{self.rank:05d}"
        return f"bases-{self.bases:03d}{rank}-{self.activation}"


@dataclass(frozen=True)
class Asked:
    """What the user asked for; None is the default of :func:`settle`."""

    layers: tuple[int, ...] | None = None
    projections: tuple[str, ...] | None = None
    bases: tuple[int, ...] | None = None
    activations: tuple[str, ...] | None = None
    steps: int = 100
    seed: int = 0
    imatrix: str | None = None
    text: Path | None = None
    ctx: int = 512
    chunks: int | None = 16
    divergence: bool = True
    wide: bool = False


@dataclass(frozen=True)
class Study:
    """What is measured.  Each number of ``bases`` with tanh, each of ``activations`` with ``middle`` bases, and each of ``sizes``,
    (bases, rank), which keep as many parameters as these, with tanh and with none.

    ``text``: what KL divergence is measured on, None to leave that out; ``chunks`` of ``ctx`` tokens of it.
    """

    layers: tuple[int, ...]
    projections: tuple[str, ...]
    bases: tuple[int, ...]
    activations: tuple[str, ...]
    middle: int
    steps: int
    seed: int
    imatrix: str | None
    text: str | None
    ctx: int
    chunks: int | None
    sizes: tuple[tuple[int, int], ...] = ()

    def trials(self) -> list[Trial]:
        """In the order of work, each once."""
        trials = [Trial(m, "tanh") for m in self.bases] + [Trial(self.middle, f) for f in self.activations]
        return list(dict.fromkeys(trials)) + [Trial(m, f, r) for m, r in self.sizes for f in WIDE_FORMS]

    def options(self, trial: Trial) -> Options:
        return Options(
            bases=trial.bases,
            rank=trial.rank,
            activation=trial.activation,
            steps=self.steps,
            seed=self.seed,
            imatrix=self.imatrix,
            layers=self.layers,
            projections=self.projections,
        )

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class TrialResult:
    """What came out of one trial.

    ``kept``: share of the parameters of the factorized matrices.  ``errors``, ``objectives``: by ``"layer.projection"``,
    |W - W'|^2 / |W|^2 and the same in the metric that was minimised.  ``before``, ``after``: how many values of the combined
    bases, as f gets them and as it gives them, are in each bin (see BINS).  ``divergence``: KL divergence from the original in
    nats and its standard error, None where it was not measured.
    """

    trial: Trial
    rank: int
    kept: float
    errors: dict[str, float]
    objectives: dict[str, float]
    before: list[int]
    after: list[int]
    divergence: tuple[float, float] | None

    @property
    def error(self) -> float:
        """Mean over the units."""
        return sum(self.errors.values()) / len(self.errors)

    @property
    def objective(self) -> float:
        """Mean over the units."""
        return sum(self.objectives.values()) / len(self.objectives)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"error": self.error, "objective": self.objective}


def settle(checkpoint: Checkpoint, asked: Asked) -> Study:
    """Defaults: the first, middle and last MoE layer; an eighth, a quarter and half as many bases as experts; all
    activations.  UsageError if a choice is out of bounds.
    """
    moe, n = checkpoint.moe_layers, checkpoint.n_expert
    layers = asked.layers or tuple(sorted({moe[0], moe[len(moe) // 2], moe[-1]}))
    bases = asked.bases or tuple(sorted({max(1, round(n * share)) for share in (0.125, 0.25, 0.5)}))
    for m in bases:
        if not 1 <= m <= n:
            raise UsageError(f"--bases {m}: expected 1 to {n}, the experts of a layer")
    for name in asked.activations or ():
        if name not in ACTIVATIONS:
            raise UsageError(
                f"--activations: {name!r} is unknown; expected some of {','.join(sorted(ACTIVATIONS))}"
            )
    text = None
    if asked.divergence:
        text = str((asked.text or evaluate.heldout()).absolute())
    return Study(
        layers=layers,
        projections=asked.projections or tuple(PROJECTIONS),
        bases=tuple(sorted(set(bases))),
        activations=asked.activations or tuple(sorted(ACTIVATIONS)),
        middle=default_bases(n, 1),
        steps=asked.steps,
        seed=asked.seed,
        imatrix=asked.imatrix and os.path.abspath(asked.imatrix),
        text=text,
        ctx=asked.ctx,
        chunks=asked.chunks if asked.divergence else None,
        sizes=equal_sizes(n, checkpoint.n_ff_exp, checkpoint.n_embd) if asked.wide else (),
    )


def equal_sizes(n: int, p: int, d: int) -> tuple[tuple[int, int], ...]:
    """(bases, rank) with about as many parameters as n/4 bases of rank p, ranks of whole blocks where that comes within a
    twentieth, up to half as many bases as experts."""
    share = min(p / d + default_bases(n, 1) / n, LARGEST)
    found = []
    for m in WIDE_BASES:
        exact = share / (1 / d + m / (n * p))
        rank = max(1, round(exact / block_of(d))) * block_of(d)
        rank = rank if abs(rank / exact - 1) <= SLACK - 1 else round(exact)
        if m <= n // 2 and 1 <= rank <= d:
            found.append((m, rank))
    return tuple(found)


def run(
    model: Path,
    out: Path,
    study: Study,
    *,
    device: str = "cpu",
    threads: int | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> list[TrialResult]:
    """All trials of ``study``, those that an earlier run measured taken over; the rows also in ``OUT.work/rows/``.

    The factors and files of a trial are removed once it is measured: at no time is there more than one.
    MobeError or UsageError as factorize, export and eval raise them, and if OUT or an unfinished study is in the way.
    """
    checkpoint = Checkpoint(model)
    work = work_directory(out)
    trials = study.trials()
    if not work.exists():  # all that can be checked now
        jobs.prepare(model, out, study.options(trials[0]))
    _begin(out, work, checkpoint, study, resume)
    rows = []
    with bar("ablate", len(trials), quiet) as progress:
        for trial in trials:
            name = f"rows/{trial.name}.json"
            row = _read(Workspace(work), name)
            earlier = row is not None
            if row is None:
                progress.update(trial.name)
                row = _measure(checkpoint, work, study, trial, device, threads, progress)
                Workspace(work).write(name, row.to_json())
            rows.append(row)
            progress.advance(1, f"{trial.name}: {_said(row)}{', measured earlier' if earlier else ''}")
    return rows


def finish(out: Path) -> None:
    """What the work directory holds for good becomes OUT; the rest goes."""
    work = work_directory(out)
    shutil.rmtree(work / "rows", ignore_errors=True)
    for name in ("logits", "reference.gguf", STUDY):
        (work / name).unlink(missing_ok=True)
    rename(work, out)


def _begin(out: Path, work: Path, checkpoint: Checkpoint, study: Study, resume: bool) -> None:
    """MobeError if there is something that this study would overwrite or must not continue."""
    described = {"version": VERSION, "source_checksum": checkpoint.checksum, "study": study.to_json()}
    if out.exists():
        raise MobeError(f"{out} exists already. Choose another OUT or remove it.")
    if not out.absolute().parent.is_dir():
        raise MobeError(f"{out}: there is no directory {out.parent}; make it first:\n  mkdir -p {out.parent}")
    workspace = Workspace(work)
    if workspace.any(STUDY):
        if not resume:
            raise MobeError(
                f"{work} holds an unfinished study. Add --resume to continue it, or remove it to start anew."
            )
        before = workspace.read(STUDY)
        for name, value in study.to_json().items():
            if before.get("study", {}).get(name) != value:
                raise MobeError(
                    f"{name} is {value} now, but the study in {work} was started with "
                    f"{before.get('study', {}).get(name)}. Say the same again, or remove the directory."
                )
        if before != described:
            raise MobeError(f"{work}: the study is of another model or version; remove it to start anew")
    else:
        workspace.write(STUDY, described)


def _read(workspace: Workspace, name: str) -> TrialResult | None:
    try:
        return record(TrialResult, workspace.read(name))
    except (OSError, ValueError):
        return None


def _said(row: TrialResult) -> str:
    divergence = "" if row.divergence is None else f", KL divergence {row.divergence[0]:.5f}"
    return f"error {row.error:.5f}{divergence}"


def _measure(
    checkpoint: Checkpoint,
    work: Path,
    study: Study,
    trial: Trial,
    device: str,
    threads: int | None,
    progress: Bar,
) -> TrialResult:
    """Factorize, look at the values, export, compare; then remove what it took."""
    out, file = work / trial.name, work / f"{trial.name}.gguf"
    if not out.exists():  # else an earlier run was stopped after it
        job = jobs.prepare(checkpoint.path, out, study.options(trial), resume=True)
        jobs.run(job, device=device, quiet=True)
    mobe = MobeCheckpoint(out)
    said = mobe.config["mobe"]
    errors = {f"{layer}.{p}": e for layer, found in said["errors"].items() for p, e in found.items()}
    before, after = _values(mobe)
    divergence = None
    if study.text is not None:
        progress.update(f"{trial.name}: KL divergence")
        divergence = _divergence(checkpoint, work, study, out, file, threads)
    layer = mobe.layer(study.layers[0])
    n, p, d = checkpoint.n_expert, checkpoint.n_ff_exp, checkpoint.n_embd
    rank = layer.rank(study.projections[0])
    row = TrialResult(
        trial,
        rank,
        rank / d + trial.bases * rank / (n * p),
        errors,
        said.get("objectives") or errors,
        before,
        after,
        divergence,
    )
    shutil.rmtree(out, ignore_errors=True)
    file.unlink(missing_ok=True)
    return row


def _divergence(
    checkpoint: Checkpoint, work: Path, study: Study, out: Path, file: Path, threads: int | None
) -> tuple[float, float]:
    """Of the model with these factors from the original, which is written and run once for all trials."""
    reference, recipe = work / "reference.gguf", Recipe(parse_quant(QUANT))
    if not reference.exists():
        export(checkpoint.path, reference, recipe, allow_dense=True, quiet=True)
    export(out, file, recipe, quiet=True)
    settings = evaluate.EvalSettings(study.ctx, study.chunks, threads)
    logits = work / "logits"
    rows = evaluate.compare(
        reference,
        [file],
        study.text or "",
        settings,
        keep_logits=logits,
        reuse_logits=logits.exists(),
        quiet=True,
    )
    return rows[0].divergence.kl.value, rows[0].divergence.kl.error


def _values(mobe: MobeCheckpoint) -> tuple[list[int], list[int]]:
    """How the combined bases are distributed before and after f, over all factorized units."""
    before, after = torch.zeros(BINS), torch.zeros(BINS)
    for u in _combined(mobe):
        for total, x in ((before, u), (after, activate(u, mobe.activation))):
            total += torch.histc(x.clamp(-EDGE, EDGE), BINS, -EDGE, EDGE)
    return [int(x) for x in before], [int(x) for x in after]


def _combined(mobe: MobeCheckpoint) -> Iterator[torch.Tensor]:
    """``sum_j alpha_ij B_j`` of one expert after the other."""
    for index in mobe.moe_layers:
        layer = mobe.layer(index)
        for projection in layer.projections:
            basis, mix = layer.basis(projection), layer.mix(projection)
            for e in range(mix.shape[0]):
                yield combine(mix[e : e + 1], basis)


def summary(checkpoint: Checkpoint, study: Study, rows: list[TrialResult]) -> dict[str, Any]:
    """What ``ablation.json`` and ``--json`` hold."""
    edges = [-EDGE + 2 * EDGE * i / BINS for i in range(BINS + 1)]
    return {
        "version": VERSION,
        "model": str(checkpoint.path),
        "experts": checkpoint.n_expert,
        "study": study.to_json(),
        "bin_edges": edges,
        "rows": [row.to_json() for row in rows],
    }
