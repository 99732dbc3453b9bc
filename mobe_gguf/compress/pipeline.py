"""The stages of ``mobe-gguf compress``.  Each is finished in OUT.work before the next begins.

    moments -> choose -> plain file, factorized file (fit, round, write) -> original -> rivals -> measure -> verify -> OUT

A stage whose result is in the work folder is not run again, so a killed job resumes there.  Long stages also resume
within themselves (``moments``, ``fit``, ``measure`` after each file).  ``job.json`` holds the settings; resuming with
other settings is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mobe_gguf.calibrate.moments import collect
from mobe_gguf.calibrate.text import default_texts
from mobe_gguf.compress import expected, rivals
from mobe_gguf.compress.measure import Measures
from mobe_gguf.compress.rivals import Rival
from mobe_gguf.compress.split import check_limit, split
from mobe_gguf.compress.wishes import MOBE, PLAIN, Wishes
from mobe_gguf.core.atomic import check_output, destination, rename
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import Unchanged, describe_size
from mobe_gguf.core.progress import duration, say, stages
from mobe_gguf.core.records import plain, record
from mobe_gguf.core.workspace import Workspace
from mobe_gguf.evaluate import EvalSettings, Row, heldout
from mobe_gguf.evaluate.report import sentence
from mobe_gguf.evaluate.verify import verify
from mobe_gguf.export import ExportOptions, ExportRequest, Recipe, write_model
from mobe_gguf.export.agreement import check_written
from mobe_gguf.export.card import card_of, deliver, note
from mobe_gguf.export.rehearsal import rehearse
from mobe_gguf.export.sequential import Unsuited
from mobe_gguf.factorize import job as jobs
from mobe_gguf.factorize.plan import settle
from mobe_gguf.factorize.spec import Options
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.original import open_original
from mobe_gguf.plan.cost import expected_kl
from mobe_gguf.plan.forms import Form, factorized_forms, plain_form, why_not_factorized
from mobe_gguf.plan.layout import Layout, read_layout
from mobe_gguf.quant.allocate import Target

#: Patterns of finished work that a run can resume from.
FINISHED = ("moments.safetensors*", "plain*", "factors*", "mobe*", "*.gguf")
#: Seconds of each stage, of all runs together.
TIMES = "seconds.json"


@dataclass
class Result:
    """The result of a compression.

    - ``kind``: what ``out`` is: "plain", "mobe" or a rival's name.
    - ``rows``: measurements of candidates and rivals, by such a name.
    - ``speeds``: tokens per second, by the same names and "original".
    - ``original``: bytes of the file that all were compared with.
    - ``seconds``: of each stage; ``card``: where the card is.
    """

    out: Path
    kind: str
    why: str
    rows: dict[str, Row]
    speeds: dict[str, float]
    original: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    card: str | None = None

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the original, None if it was not measured."""
        return next((row.divergence.reference.value for row in self.rows.values()), None)


class Compression:
    """One compression; ``work`` is its folder."""

    def __init__(
        self, model: Path, out: Path, wishes: Wishes, quiet: bool = False, layout: Layout | None = None
    ):
        """``layout``: of ``model``, if it has been read."""
        wishes.check()
        check_limit(wishes.split_max_size)
        if model.is_file() and model.suffix == ".json":
            raise UsageError(
                f"{model} alone is enough for mobe-gguf plan; here the weights are needed: give the directory with them"
            )
        check_output(out, [model, wishes.moments, *(wishes.text or ()), wishes.eval_text])
        self.model, self.out, self.wishes, self.quiet = model, out, wishes, quiet
        self.workspace = Workspace.beside(out)
        self.work = self.workspace.path
        self.layout: Layout = layout or read_layout(model)
        self.layout.expert_shape()
        self.texts = wishes.text or tuple(default_texts())
        self.eval_text = wishes.eval_text or heldout()

    def run(self, resume: bool = False, on_done: Callable[[Result], None] | None = None) -> Result:
        """Run all stages.  The work folder is removed when OUT is there and ``on_done`` has been called with the
        result."""
        self.unchanged = Unchanged(self.model)
        for line in rehearse(open_original(self.model)):
            raise MobeError(line)  # compress must export: what is a note elsewhere is an error here
        described = {"model": str(self.model.resolve()), **self.wishes.description()}
        form, why = self.factorized_form()
        with self.workspace.locked(finished=FINISHED):
            self.workspace.settled("job.json", described, resume, FINISHED)
            if form is not None:
                settle(
                    self._fit_options(form), open_original(self.model)
                )  # refuses what does not fit the model
            foreseen = expected.seconds(self.layout, self.wishes, form is not None)
            keep = partial(self.workspace.write, TIMES)
            with stages(foreseen, self._earlier(), keep) as self.display:
                result = self._delivered() or self._stages(form, why)
            result.seconds = self.display.seconds
            if on_done is not None:
                on_done(result)
        self.workspace.remove()
        return result

    def _earlier(self) -> dict[str, float]:
        """Seconds of the stages in earlier runs."""
        try:
            return record(dict[str, float], self.workspace.read(TIMES))
        except (OSError, ValueError):
            return {}

    def _stages(self, form: Form | None, why: str) -> Result:
        if self.wishes.moments is None:
            self._stage("moments", "moments.safetensors", self._moments)
        else:
            self.display.skip("moments")
        files: dict[str, Path] = {}
        if self.wishes.form != MOBE:
            files[PLAIN] = self._stage("plain", f"plain/{self.out.name}", self._plain, 3)
        if form is not None:
            self._stage("fit", "factors", lambda path: self._fit(path, form))
            files[MOBE] = self._stage(
                "write", f"mobe/{self.out.name}", lambda path: self._factorized(path, form), 2
            )
        if not self.wishes.measure:
            kind = MOBE if MOBE in files else PLAIN
            return self._finish(Result(self.out, kind, "nothing was measured", {}, {}), files[kind], "")
        original = self._original_file()
        sizes = [path.stat().st_size for path in files.values()]
        files |= {r.name: r.path for r in self._rivals(original, self.wishes.size or max(sizes))}
        measures = self._measures(original)
        with self.display.stage("measure"):
            rows = measures.rows(files)
        with self.display.stage("speed", 2):
            speeds = measures.speeds({**files, "original": original})
        kind, why = self._best(files, rows, why)
        result = Result(self.out, kind, why, rows, speeds, original.stat().st_size)
        said = sentence(measures.reference, rows[kind], self.eval_text)
        return self._finish(result, files[kind], said)

    def _stage(self, name: str, file: str, make: Callable[[Path], None], bars: int = 1) -> Path:
        """The path ``work/file``; ``make`` writes it if it is not there.  ``bars``: see :meth:`Stages.stage`.

        A file in a folder of its own gets it together with its card, which is written after it.
        """
        path = self.work / file
        if path.exists():
            self.display.skip(name)
            return path
        folder = path.parent
        making = folder if folder == self.work else folder.with_name(f"{folder.name}.part")
        making.mkdir(exist_ok=True)
        with self.display.stage(name, bars):
            make(making / path.name)
        if making != folder:
            rename(making, folder)
        if not self.quiet:
            spent, left = self.display.seconds[name], self.display.left()
            say(f"{name}: done in {duration(spent)}, about {duration(left)} left in all")
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
            keep=w.keep,
            memory=w.memory,
            device=w.device,
            ray=w.ray,
            gradients=w.gradients,
            resume=True,
            quiet=self.quiet,
        )

    def _recipe(self, quant: str, **more: Any) -> Recipe:
        w = self.wishes
        target = None if w.size is None else Target(n_bytes=w.size)
        fixed = {"down": w.down_type, "output": w.output_type, "embedding": w.embedding_type}
        given = {"target": target, "overrides": w.overrides, "pure": w.pure, **fixed, **more}
        return Recipe(quant, moments=str(self.moments), **given)

    def _plain(self, path: Path) -> None:
        """Write the plain candidate: rounded by moments, with types chosen for the size."""
        quant = self.wishes.quant or self._quant_for_size()
        recipe = self._recipe(quant)
        self._write(self.model, path, recipe, self._options(dense=True, allow_dense=True))

    def _write(self, model: Path, path: Path, recipe: Recipe, options: ExportOptions) -> None:
        """Write a candidate, its experts rounded in sequence where that can be done."""
        w = self.wishes
        if w.sequential:
            sequential = dataclasses.replace(
                options,
                sequential=tuple(self.texts),
                chunks=w.chunks,
                memory=w.memory,
                device=w.device.split(",")[0],
            )
            try:
                write_model(ExportRequest(model, path, recipe, sequential))
                return
            except Unsuited as error:
                if not self.quiet:
                    say(f"note: each layer's experts are rounded on their own: {error.message}")
        write_model(ExportRequest(model, path, recipe, options))

    def _options(self, **more: Any) -> ExportOptions:
        """Options of both candidates."""
        w = self.wishes
        return ExportOptions(
            card=w.card,
            tokenizer_pre=w.tokenizer_pre,
            experts_used=w.experts_used,
            base_model=w.base_model,
            refit=w.refit,
            quiet=self.quiet,
            **more,
        )

    def _quant_for_size(self) -> str:
        """The smallest ``--quant`` whose plain file is not below the size; it gives the types of all tensors except
        experts."""
        fitting = [
            quant
            for quant in rivals.LADDER
            if plain_form(self.layout, quant).n_bytes >= (self.wishes.size or 0)
        ]
        return fitting[-1] if fitting else rivals.LADDER[0]

    def factorized_form(self) -> tuple[Form | None, str]:
        """The factorized form to try, or None and the reason."""
        w, reason = self.wishes, why_not_factorized(self.layout)
        if w.form == PLAIN:
            return None, "a plain file was asked for"
        if reason and w.form == "auto":
            return None, reason
        found = list(factorized_forms(self.layout, w.given()))
        if found and min(form.kept for form in found) > 1:
            raise UsageError(
                f"{self.model}: {found[0].name} keep {found[0].kept:.0%} of the parameters that they replace; give a smaller --rank, fewer "
                "--bases, or leave them out"
            )
        small = [form for form in found if w.size is None or form.n_bytes <= w.size]
        if not small:
            if w.form == MOBE:
                least = min(found, key=lambda form: form.n_bytes, default=None)
                said = f"; the smallest that is tried takes {describe_size(least.n_bytes)}" if least else ""
                raise MobeError(
                    f"{self.model}: no factorized form of at most {describe_size(w.size or 0)}{said}"
                )
            return None, "no factorized form is as small"
        return min(small, key=lambda form: expected_kl(self.layout, form)), ""

    def _fit_options(self, form: Form, moments: str | None = None) -> Options:
        w = self.wishes
        return Options(
            bases=form.bases if w.target is None else None,
            rank=form.rank if w.target is None else w.rank,
            target=w.target,
            groups=w.groups,
            activation=w.activation or "none",
            mix=w.mix,
            mix_terms=w.mix_terms,
            layers=w.layers,
            projections=w.projections,
            steps=w.steps,
            seed=w.seed,
            moments=moments,
            for_basis=form.basis_type,
            for_transform=form.transform_type,
        )

    def _fit(self, path: Path, form: Form) -> None:
        options = self._fit_options(form, str(self.moments))
        job = jobs.prepare(self.model, path, options, resume=True)
        jobs.run(job, device=self.wishes.device, quiet=self.quiet, ray=self.wishes.ray)

    def _factorized(self, path: Path, form: Form) -> None:
        rest = self.wishes.rest_from
        recipe = self._recipe(form.quant, basis=form.basis_type, transform=form.transform_type, target=None)
        if self.model.is_file() and rest is None:
            recipe = dataclasses.replace(recipe, rest=form.quant)
        source, original = (self.model, None) if self.model.is_file() else (None, self.model)
        options = self._options(source=source, original=original, rest_from=rest)
        self._write(self.work / "factors", path, recipe, options)

    def _original_file(self) -> Path:
        """The file that the others are compared with; a GGUF source is used itself."""
        if self.model.is_file():
            self.display.skip("original")
            return self.model
        name = f"original-{'f16' if is_float16(self.model) else 'bf16'}.gguf"
        return self._stage("original", name, self._original)

    @property
    def moments(self) -> Path:
        """Path of the file of second moments: the given one, or the one that this job gathers."""
        return self.wishes.moments or self.work / "moments.safetensors"

    @property
    def original(self) -> Path | None:
        """The file that all were compared with; None if there is none yet."""
        if self.model.is_file():
            return self.model
        return next(self.work.glob("original-*.gguf"), None)

    def _original(self, path: Path) -> None:
        """Write the original in its own precision, but at most 16 bits."""
        dtype = path.stem.rpartition("-")[2]
        pre = self.wishes.tokenizer_pre
        options = ExportOptions(dense=True, allow_dense=True, tokenizer_pre=pre, quiet=self.quiet)
        write_model(ExportRequest(self.model, path, Recipe(dtype), options))

    def _rivals(self, original: Path, size: int) -> list[Rival]:
        if not self.wishes.rivals:
            return []
        imatrix = self._stage(
            "imatrix",
            "imatrix.gguf",
            lambda p: rivals.imatrix(
                original,
                self.texts,
                p,
                self.wishes.ctx,
                rivals.enough_chunks(self.layout, self.wishes.ctx),
                self.wishes.threads,
                self.wishes.placement,
            ),
        )
        made = []
        for quant in rivals.around(self.layout, size):
            write = partial(rivals.write, original, quant=quant, imatrix_file=imatrix)
            made.append(Rival(quant, self._stage(quant, f"rival-{quant}.gguf", write)))
        return made

    def _measures(self, original: Path) -> Measures:
        w = self.wishes
        settings = EvalSettings(w.ctx, w.eval_chunks, w.threads, w.placement)
        return Measures(self.workspace, original, self.eval_text, settings, self.quiet)

    def _best(self, files: dict[str, Path], rows: dict[str, Row], why: str) -> tuple[str, str]:
        """Which file becomes OUT, and why: the one with the least KL divergence among those within the size."""
        kl = {name: row.divergence.kl.value for name, row in rows.items()}
        if self.wishes.form == MOBE:
            return MOBE, "--form mobe"
        limit = self.wishes.size or max(files[n].stat().st_size for n in (PLAIN, MOBE) if n in files)
        fitting = [name for name, path in files.items() if path.stat().st_size <= limit]
        best = min(fitting or list(files), key=lambda name: kl[name])
        said = ", ".join(f"{name} {kl[name]:.5f}" for name in sorted(fitting, key=lambda name: kl[name]))
        return best, f"least KL divergence of the files that fit: {said}" + (
            f" (no factors: {why})" if why else ""
        )

    # the end

    def _finish(self, result: Result, path: Path, measured: str) -> Result:
        """Check the file, note what was measured in its card, and deliver both."""
        self.unchanged.check(f"begin again:\n  rm -r {self.work}")
        verdict = verify(path)
        if verdict.problems:
            raise MobeError(f"{path}: {': '.join(verdict.problems[0])}; the work folder is kept")
        if self.wishes.verify:
            compared = check_written(path, self.model)
            if not self.quiet:
                say(compared)
        card = card_of(path)
        if card is not None and measured:
            note(card, path, measured)
        self.workspace.write("result.json", plain(result) | {"file": _within(path, self.work)})
        return self._deliver(result, path)

    def _deliver(self, result: Result, path: Path) -> Result:
        card, limit, out = card_of(path), self.wishes.split_max_size, destination(self.out)
        if path.exists() and limit is None:
            self.workspace.deliver(_within(path, self.work), out)
        elif path.exists() and limit is not None:
            result.out = split(path, self.work / "split", limit, out)[0]
        if card is not None:
            result.card = deliver(card, path, self.out, result.out)
        return result

    def _delivered(self) -> Result | None:
        """The result of a run that was killed while it delivered, None if there is none."""
        if not self.workspace.any("result.json"):
            return None
        value = self.workspace.read("result.json")
        path = self.work / str(value["file"])
        if not path.exists() and not self.out.exists():
            return None
        return self._deliver(record(Result, value), path)


def _within(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def is_float16(model: Path) -> bool:
    """Whether the weights' type (float16, float32) has more bits of mantissa than bfloat16."""
    config = Checkpoint(model).config
    return str(config.get("dtype") or config.get("torch_dtype")) in ("float16", "float32")
