"""The whole path on the tiny model that ships with the project: factors, GGUF files, perplexity, text.

    demo = run(Path("demo"))

leaves in ``demo/`` the MoBE checkpoint and one GGUF file for each of :data:`FILES`, and says how they compare.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import amount, describe_size
from mobe_gguf.core.progress import say
from mobe_gguf.evaluate import EvalSettings, heldout, perplexity, tool
from mobe_gguf.export import Recipe, Report, export, parse_quant
from mobe_gguf.factorize import job as jobs
from mobe_gguf.factorize.plan import plan_checkpoint, settle
from mobe_gguf.factorize.spec import Options
from mobe_gguf.formats.contents import rows
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.runtime.install import Environment

MODEL = "tiny-moe"
MOBE = f"{MODEL}-mobe"

#: (model, --quant) of each file that is written and measured.  What MoBE is up against is not only the same model in
#: the same type but also the same model in fewer bits: the third file is the rival of the last.
FILES = ((MODEL, "f16"), (MODEL, "q4_k"), (MODEL, "q3_k"), (MOBE, "f16"), (MOBE, "q4_k"))

#: Those whose text is shown side by side.
SHOWN = ((MODEL, "q4_k"), (MOBE, "q4_k"))

#: Opens many a verse of what the model was trained on.
PROMPT = "And it came to pass"
TEMPERATURE, SEED = 0.7, 1

#: Tokens of a chunk of held-out text; llama-perplexity counts those of its second half.
CONTEXT = 512

#: In a model this small threads wait for each other, and on a busy machine for most of the time.
THREADS = 1

#: How often a program is run that ends without its answer.
ATTEMPTS = 5


@dataclass(frozen=True)
class Effort:
    """How much work is done; the defaults are the demo's, the tests do with less.

    ``steps`` of the solver for each unit, ``chunks`` of CONTEXT held-out tokens, ``tokens`` of text to write.
    """

    steps: int = 500
    chunks: int = 64
    tokens: int = 110

    def options(self) -> Options:
        """A quarter as many bases as experts: the paper's ratio."""
        return Options(bases=6, activation="tanh", steps=self.steps, seed=0)


@dataclass(frozen=True)
class DemoFile:
    """One GGUF file.  ``spread`` is llama-perplexity's standard error; ``speed``: tokens per second of decoding,
    on one core."""

    model: str
    quant: str
    report: Report
    perplexity: float
    spread: float
    text: str = ""
    speed: float | None = None

    @property
    def path(self) -> Path:
        return Path(self.report.path)

    @property
    def expert_params(self) -> int:
        """Parameters that stand for routed experts."""
        kinds = ("A", "B", "mix", "down", "experts")
        return sum(row.n_params for row in rows(self.report.entries) if row.label in kinds)


@dataclass(frozen=True)
class Demo:
    """``error``: mean of |W - W'|^2 / |W|^2 over the factorized units; ``settings``: of the factorization."""

    files: tuple[DemoFile, ...]
    settings: dict[str, Any]
    n_expert: int
    error: float
    seconds: float


def run(directory: Path, effort: Effort = Effort()) -> Demo:
    """Do all of it in ``directory``.  Factors of an earlier run are kept if their settings and source are the same.

    MobeError if the runtime is not built, or ``directory`` cannot be written.
    """
    started = time.monotonic()
    for name in ("llama-perplexity", "llama-completion"):
        runtime.tool(name)  # better said now than after the factorization
    models, text = resources.path("models"), heldout()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MobeError(f"{directory}: cannot be made a directory: {e.strerror}; name another") from e
    source = {MODEL: models / MODEL, MOBE: directory / MOBE}
    factorize(source[MODEL], source[MOBE], effort.options())
    files = tuple(measure(model, source[model], quant, directory, text, effort) for model, quant in FILES)
    about = json.loads((source[MOBE] / "config.json").read_text(encoding="utf-8"))["mobe"]
    errors = [error for layer in about["errors"].values() for error in layer.values()]
    return Demo(
        files=files,
        settings=about["settings"],
        n_expert=Checkpoint(source[MODEL]).n_expert,
        error=sum(errors) / len(errors),
        seconds=time.monotonic() - started,
    )


def factorize(model: Path, out: Path, options: Options) -> None:
    """Make ``out`` the MoBE checkpoint of ``model``, unless it is that already; continues a stopped job.

    MobeError if something else is in the way.
    """
    checkpoint = Checkpoint(model)
    settings = settle(options, checkpoint)
    wanted = jobs.Job(checkpoint, out, settings, plan_checkpoint(checkpoint, settings), None).description()
    if os.path.lexists(out):
        found = _description(out)
        if found is None:
            raise MobeError(
                f"{out} is in the way and was not made by mobe-gguf; move it, or name another directory"
            )
        if {key: found.get(key) for key in wanted} == wanted:
            say(f"{out}: factors of an earlier run, with the same settings")
            return
        shutil.rmtree(out)
    try:
        job = jobs.prepare(model, out, options, resume=True)
    except MobeError:
        if not jobs.work_directory(out).exists():
            raise
        shutil.rmtree(jobs.work_directory(out))  # a stopped job with other settings
        job = jobs.prepare(model, out, options)
    say(
        f"factorize {model.name}: {len(settings.units())} units of {checkpoint.n_expert} experts, "
        f"{settings.steps} steps each"
    )
    result = jobs.run(job)
    done = [unit for unit in result.units if unit.seconds is not None]
    if done:
        a_step = sum(unit.seconds or 0 for unit in done) / sum(unit.steps for unit in done)
        say(f"{out}: made in {result.seconds:.0f} s, {1000 * a_step:.1f} ms a step of one unit")


def _description(mobe: Path) -> dict[str, Any] | None:
    """What ``factorize`` wrote about itself into config.json; None if this is not its work."""
    try:
        about = json.loads((mobe / "config.json").read_text(encoding="utf-8"))["mobe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about if isinstance(about, dict) else None


def measure(model: str, source: Path, quant: str, directory: Path, text: Path, effort: Effort) -> DemoFile:
    """Write ``directory/model-quant.gguf`` from ``source``, measure its perplexity and, if SHOWN, let it write."""
    path = directory / f"{model}-{quant}.gguf"
    started = time.monotonic()
    report = export(source, path, Recipe(parse_quant(quant)), allow_dense=True, quiet=True)
    found = perplexity(path, text, EvalSettings(CONTEXT, effort.chunks, THREADS))
    measured = DemoFile(model, quant, report, found.value, found.error)
    if (model, quant) in SHOWN:
        written, speed = complete(path, effort.tokens)
        measured = replace(measured, text=written, speed=speed)
    spent = time.monotonic() - started
    say(f"{path}: {describe_size(report.n_bytes)}, perplexity {found.value:.2f}, {spent:.1f} s")
    return measured


def complete(gguf: Path, tokens: int) -> tuple[str, float]:
    """PROMPT and what the model makes of it; tokens per second.

    The program may end before its log's last lines are written (``common_log_main`` says so; on a busy machine it was
    one run in ten), so if it gives no speed it is asked again.
    """
    options = ("-p", PROMPT, "-n", str(tokens), "--temp", str(TEMPERATURE), "--seed", str(SEED))
    quiet = ("-no-cnv", "--no-display-prompt", "--simple-io", "--perf")
    for _ in range(ATTEMPTS):
        done = tool.run("llama-completion", "-m", str(gguf), "-t", str(THREADS), *options, *quiet)
        # this line comes after the text: where it is found, the text is whole
        speed = re.search(r"\beval time =.* runs .*?([0-9.]+) tokens per second", done.stderr)
        if speed:
            text = PROMPT + done.stdout.strip("\n").removesuffix(" [end of text]")
            return text.rstrip(), float(speed[1])
    raise done.failure(f"llama-completion -m {gguf} did not say how fast it was:")


# what a person sees


def render(demo: Demo) -> RenderableType:
    """Table, texts side by side and what to try next; fits 100 columns."""
    table = Table(pad_edge=False, box=None)
    table.add_column("file", no_wrap=True)
    for column in ("MB", "bits/weight", "parameters", "in experts", "perplexity", "tokens/s"):
        table.add_column(column, justify="right")
    for file in demo.files:
        table.add_row(
            file.path.name,
            f"{file.report.n_bytes / 1e6:.2f}",
            f"{file.report.bits_per_weight:.2f}",
            amount(file.report.n_params),
            amount(file.expert_params),
            f"{file.perplexity:.2f} ± {file.spread:.2f}",
            "" if file.speed is None else f"{file.speed:.0f}",
            style="bold" if file.model == MOBE else None,
        )
    s = demo.settings
    about = (
        f"MoBE: {demo.n_expert} experts from {s['bases']} bases of rank {s['rank']}, {s['activation']}, "
        f"{s['steps']} steps; relative error of gate and up {demo.error:.3f}. "
        "tokens/s: writing, on one core."
    )
    shown = [file for file in demo.files if file.text]
    texts = Table.grid(expand=True)
    for _ in shown:
        texts.add_column(ratio=1)
    texts.add_row(
        *(Panel(Text(f.text), title=Text(f.path.name), title_align="left", padding=(0, 1)) for f in shown)
    )
    last = demo.files[-1].path
    try_it = (
        f"done in {demo.seconds:.0f} s. To try it:\n"
        f'  {_program("llama-completion")} -m {last} -p "{PROMPT}" -n 100 -no-cnv\n'
        f"  {_program('llama-cli')} -m {last}"
    )
    return Group(table, "", Text(about), "", texts, Text(try_it))


def _program(name: str) -> str:
    """How to call an installed program from here: by its name where the PATH has it, else by its path."""
    script = Environment.active().scripts / name
    on_path = shutil.which(name)
    if on_path and script.exists() and os.path.samefile(on_path, script):
        return name
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)
