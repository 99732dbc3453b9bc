"""The stages of ``mobe-gguf compress``, each finished in OUT.work before the next begins.

    moments -> choose -> plain file, factorized file (fit, round, write) -> original -> rivals -> measure -> verify -> OUT

A stage whose result is in the work folder is not run again, so a job that was killed resumes; stages that take long resume
inside, too (``moments``, ``factorize``).  Settings stand in ``job.json``: others than those of the stopped job are an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mobe_gguf.calibrate.moments import collect
from mobe_gguf.compress import rivals
from mobe_gguf.compress.rivals import Rival
from mobe_gguf.core import resources
from mobe_gguf.core.atomic import check_output, destination, held, write_json
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import describe_size, sha256
from mobe_gguf.core.progress import say
from mobe_gguf.evaluate import EvalSettings, Row, compare, heldout
from mobe_gguf.evaluate.verify import verify
from mobe_gguf.export import ExportOptions, ExportRequest, Recipe, write_model
from mobe_gguf.export.agreement import check_written
from mobe_gguf.factorize import job as jobs
from mobe_gguf.factorize.spec import Options
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.plan.cost import expected_kl
from mobe_gguf.plan.forms import Form, factorized_forms, plain_form, why_not_factorized
from mobe_gguf.plan.layout import Layout, read_layout
from mobe_gguf.quant.allocate import Target

FORMS = ("auto", "plain", "mobe")
#: What one of two numbers within a file's rounding of sizes may exceed the other by.
SLACK = 1.001


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was asked for.  ``size`` in bytes, of the file; without it ``quant`` decides.  ``bases``, ``rank``, ``activation``,
    ``basis_type``, ``transform_type``: of the factorized form, chosen where they are None.  ``text``: to calibrate with,
    ``eval_text``: to measure on, the shipped ones if None."""

    size: int | None = None
    form: str = "auto"
    quant: str | None = None
    text: tuple[Path, ...] = ()
    eval_text: Path | None = None
    ctx: int = 512
    chunks: int | None = None
    eval_chunks: int | None = 64
    bases: int | None = None
    rank: int | None = None
    activation: str | None = None
    steps: int | None = None
    basis_type: str | None = None
    transform_type: str | None = None
    memory: int | None = None
    device: str = "cpu"
    threads: int | None = None
    rivals: bool = True
    measure: bool = True
    verify: bool = True

    def description(self) -> dict[str, Any]:
        """What must be the same where a job is resumed; texts by their content."""
        made = dataclasses.asdict(self) | {"text": [sha256(path) for path in self.text]}
        made["eval_text"] = self.eval_text and sha256(self.eval_text)
        return {k: v for k, v in made.items() if k not in ("memory", "device", "threads", "verify")}


@dataclass
class Result:
    """``out`` is ``kind`` ("plain" or "mobe"); ``rows``: what was measured, of candidates and rivals; ``speeds``: tokens a
    second by file name; ``seconds`` of each stage."""

    out: Path
    kind: str
    why: str
    rows: list[Row]
    speeds: dict[str, float]
    names: dict[str, str]
    seconds: dict[str, float]
    original: Path | None = None


class Compression:
    """One compression; ``work`` is its folder."""

    def __init__(self, model: Path, out: Path, wishes: Wishes, quiet: bool = False):
        if wishes.form not in FORMS:
            raise UsageError(f"--form {wishes.form}: expected one of {', '.join(FORMS)}")
        if wishes.size is None and wishes.quant is None:
            raise UsageError(
                "say how large the file may be: --size 80G or --bpw 2.5 (or --quant q3_k); mobe-gguf plan MODEL lists what fits"
            )
        check_output(out)
        self.model, self.out, self.wishes, self.quiet = model, out, wishes, quiet
        self.work = out.with_name(out.name + ".work")
        self.layout: Layout = read_layout(model)
        self.layout.expert_shape()
        self.seconds: dict[str, float] = {}
        self.texts = wishes.text or (resources.path("models") / "calibration.txt",)
        self.eval_text = wishes.eval_text or heldout()

    def run(self, resume: bool = False) -> Result:
        """All stages; the work folder goes when OUT is there."""
        with held(self.work.with_name(self.work.name + ".lock"), self.out):
            self._open(resume)
            result = self._stages()
        shutil.rmtree(self.work, ignore_errors=True)
        return result

    def _open(self, resume: bool) -> None:
        """Make the work folder, or check that it is of the same job."""
        path = self.work / "job.json"
        described = {"model": str(self.model.resolve()), **self.wishes.description()}
        described = json.loads(json.dumps(described, default=str))
        if not self.work.exists():
            self.work.mkdir(parents=True)
            write_json(path, described)
            return
        if not resume:
            raise MobeError(
                f"{self.work} is there from a stopped job; go on with it by --resume, or delete it to start over"
            )
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise MobeError(f"{path}: cannot be read ({e}); delete {self.work} to start over") from e
        for key, value in described.items():
            if before.get(key) != value:
                raise UsageError(
                    f"{key.replace('_', '-')}: the stopped job had {before.get(key)!r}, now it is {value!r}. Give the same, or "
                    f"delete {self.work} to start over"
                )

    def _stages(self) -> Result:
        self._stage("moments", "moments.safetensors", self._moments)
        candidates: dict[str, Path] = {}
        if self.wishes.form != "mobe":
            candidates["plain"] = self._stage("plain", "plain.gguf", self._plain)
        form, why = self._factorized_form()
        if form is not None:
            self._stage("fit", "mobe", lambda path: self._fit(path, form))
            candidates["mobe"] = self._stage("write", "mobe.gguf", lambda path: self._factorized(path, form))
        if not self.wishes.measure:
            kind = "mobe" if "mobe" in candidates else "plain"
            return self._finish(kind, candidates[kind], "nothing was measured", [], {}, {})
        original = self._stage("original", "original.gguf", self._original)
        made = self._rivals(original, max(path.stat().st_size for path in candidates.values()))
        files = {**{kind: path for kind, path in candidates.items()}, **{r.name: r.path for r in made}}
        settings = EvalSettings(
            ctx=self.wishes.ctx, chunks=self.wishes.eval_chunks, threads=self.wishes.threads
        )
        started = time.monotonic()
        rows = compare(original, files.values(), self.eval_text, settings, quiet=self.quiet)
        speeds = {name: rivals.speed(path, self.wishes.threads) for name, path in files.items()}
        self.seconds["measure"] = time.monotonic() - started
        kind, why = self._best(files, rows, why)
        return self._finish(
            kind, files[kind], why, rows, speeds, {path.name: name for name, path in files.items()}
        )

    def _stage(self, name: str, file: str, make: Callable[[Path], None]) -> Path:
        """``work/file``, made if it is not there."""
        path = self.work / file
        if not path.exists():
            if not self.quiet:
                say(f"{name}: {', '.join(f'{n} {s:.0f} s' for n, s in self.seconds.items()) or 'begin'}")
            started = time.monotonic()
            make(path)
            self.seconds[name] = time.monotonic() - started
        return path

    # stages

    def _moments(self, path: Path) -> None:
        w = self.wishes
        collect(
            self.model,
            self.texts,
            path,
            ctx=w.ctx,
            chunks=w.chunks,
            memory=w.memory,
            device=w.device,
            resume=True,
            quiet=self.quiet,
        )

    def _recipe(self, quant: str, **more: Any) -> Recipe:
        target = None if self.wishes.size is None else Target(n_bytes=self.wishes.size)
        return Recipe(quant, moments=str(self.work / "moments.safetensors"), target=target, **more)

    def _plain(self, path: Path) -> None:
        """Rounded by moments, types divided for the size."""
        quant = self.wishes.quant or self._quant_for_size()
        options = ExportOptions(dense=True, allow_dense=True, quiet=self.quiet)
        write_model(ExportRequest(self.model, path, self._recipe(quant), options))

    def _quant_for_size(self) -> str:
        """The ``--quant`` whose plain file is the smallest that is not smaller than the size; what it gives all but experts."""
        fitting = [
            quant
            for quant in rivals.QUANTS
            if plain_form(self.layout, quant).n_bytes >= (self.wishes.size or 0)
        ]
        return fitting[-1] if fitting else rivals.QUANTS[0]

    def _factorized_form(self) -> tuple[Form | None, str]:
        """The factorized form to try, and why there is none."""
        w, reason = self.wishes, why_not_factorized(self.layout)
        if w.form == "plain":
            return None, "a plain file was asked for"
        if reason and w.form == "auto":
            return None, reason
        found = list(factorized_forms(self.layout, w.bases, w.rank, w.basis_type, w.transform_type, w.quant))
        small = [form for form in found if w.size is None or form.n_bytes <= w.size * SLACK]
        if not small:
            if w.form == "mobe":
                least = min(found, key=lambda form: form.n_bytes, default=None)
                said = f"; the smallest that is tried takes {describe_size(least.n_bytes)}" if least else ""
                raise MobeError(
                    f"{self.model}: no factorized form of at most {describe_size(w.size or 0)}{said}"
                )
            return None, "no factorized form is as small"
        return min(small, key=lambda form: expected_kl(self.layout, form)), ""

    def _fit(self, path: Path, form: Form) -> None:
        options = Options(
            bases=form.bases,
            rank=form.rank,
            activation=self.wishes.activation or "none",
            steps=self.wishes.steps,
            moments=str(self.work / "moments.safetensors"),
            for_basis=form.basis_type,
            for_transform=form.transform_type,
        )
        jobs.run(
            jobs.prepare(self.model, path, options, resume=True), device=self.wishes.device, quiet=self.quiet
        )

    def _factorized(self, path: Path, form: Form) -> None:
        recipe = dataclasses.replace(
            self._recipe(form.quant), basis=form.basis_type, transform=form.transform_type, target=None
        )
        options = ExportOptions(original=self.model, quiet=self.quiet)
        write_model(ExportRequest(self.work / "mobe", path, recipe, options))

    def _original(self, path: Path) -> None:
        """What the others are compared with: the source's own precision, as far as 16 bits hold it."""
        dtype = "f16" if is_float16(self.model) else "bf16"
        options = ExportOptions(dense=True, allow_dense=True, quiet=self.quiet)
        write_model(ExportRequest(self.model, path, Recipe(dtype), options))

    def _rivals(self, original: Path, size: int) -> list[Rival]:
        if not self.wishes.rivals:
            return []
        imatrix = self._stage(
            "imatrix",
            "imatrix.gguf",
            lambda p: rivals.imatrix(original, self.texts, p, self.wishes.ctx, self.wishes.chunks),
        )
        made = []
        for quant in rivals.around(self.layout, size):
            path = self._stage(
                quant, f"{quant}.gguf", partial(rivals.write, self.model, quant=quant, imatrix_file=imatrix)
            )
            made.append(Rival(quant, path))
        return made

    def _best(self, files: dict[str, Path], rows: list[Row], why: str) -> tuple[str, str]:
        """Which file becomes OUT: of those that are not larger than what was asked for, the one of least KL divergence."""
        kl = {name: row.divergence.kl.value for name, row in zip(files, rows, strict=True)}
        if self.wishes.form == "mobe":
            return "mobe", "--form mobe"
        limit = self.wishes.size or max(
            files[name].stat().st_size for name in ("plain", "mobe") if name in files
        )
        fitting = [name for name, path in files.items() if path.stat().st_size <= limit * SLACK]
        best = min(fitting or list(files), key=lambda name: kl[name])
        said = ", ".join(f"{name} {kl[name]:.5f}" for name in sorted(fitting, key=lambda name: kl[name]))
        return best, f"least KL divergence of the files that fit: {said}" + (
            f" (no factors: {why})" if why else ""
        )

    def _finish(
        self,
        kind: str,
        path: Path,
        why: str,
        rows: list[Row],
        speeds: dict[str, float],
        names: dict[str, str],
    ) -> Result:
        verdict = verify(path)
        if verdict.problems:
            raise MobeError(f"{path}: {': '.join(verdict.problems[0])}; the work folder is kept")
        if self.wishes.verify:
            compared = check_written(path, self.model)
            if not self.quiet:
                say(compared)
        target = destination(self.out)
        os.replace(path, target)
        return Result(self.out, kind, why, rows, speeds, names, self.seconds)


def is_float16(model: Path) -> bool:
    """Whether the weights are stored in more bits of mantissa than bfloat16 has."""
    config = Checkpoint(model).config
    return str(config.get("dtype") or config.get("torch_dtype")) in ("float16", "float32")
