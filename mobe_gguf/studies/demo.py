"""``mobe-gguf compress`` on the tiny model that ships with the project, and what the file writes.

    demo = run(Path("demo"))

leaves in ``demo/`` the file that compress chose, and says how it compares.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from mobe_gguf import runtime
from mobe_gguf.compress import report
from mobe_gguf.compress.pipeline import Compression, Result
from mobe_gguf.compress.wishes import Wishes
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.progress import say
from mobe_gguf.evaluate import tool
from mobe_gguf.runtime.install import Environment

MODEL = "tiny-moe"
#: What is asked for, as the command has it: a quarter of the original's size.
SIZE = 3_950_000

#: Opens many a verse of what the model was trained on.
PROMPT = "And it came to pass"
TEMPERATURE, SEED = 0.7, 1

#: In a model this small threads wait for each other, and on a busy machine for most of the time.
THREADS = 1

#: How often a program is run that ends without its answer.
ATTEMPTS = 5


@dataclass(frozen=True)
class Effort:
    """How much work is done; the defaults are the demo's, the tests do with less.

    ``steps`` of the solver for each unit, ``chunks`` of 512 tokens to calibrate with (None: all of the text) and ``eval_chunks`` to
    measure on, ``tokens`` of text to write.
    """

    steps: int | None = 60
    chunks: int | None = None
    eval_chunks: int = 32
    tokens: int = 110

    def wishes(self) -> Wishes:
        """The model learned on old books, so it is calibrated with some."""
        return Wishes(
            size=SIZE,
            text=(resources.path("models") / "calibration.txt",),
            chunks=self.chunks,
            eval_chunks=self.eval_chunks,
            steps=self.steps,
            threads=THREADS,
        )

    def command(self, out: Path) -> str:
        """The same as a command."""
        models = resources.path("models")
        words = f"--size {SIZE / 1e6:g}M --text {_shown(models / 'calibration.txt')}"
        words += "" if self.steps is None else f" --steps {self.steps}"
        words += "" if self.chunks is None else f" --chunks {self.chunks}"
        return f"mobe-gguf compress {_shown(models / MODEL)} {_shown(out)} {words} --eval-chunks {self.eval_chunks} --threads {THREADS}"


@dataclass(frozen=True)
class Demo:
    """``result`` of the compression; ``text`` that its file wrote."""

    result: Result
    text: str
    seconds: float


def run(directory: Path, effort: Effort = Effort()) -> Demo:
    """Do all of it in ``directory``.  A stopped run resumes; a file of an earlier one is replaced.

    MobeError if the runtime is not built, or ``directory`` cannot be written.
    """
    started = time.monotonic()
    for name in ("llama-perplexity", "llama-completion"):
        runtime.tool(name)  # better said now than after the work
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MobeError(f"{directory}: cannot be made a directory: {e.strerror}; name another") from e
    out = directory / f"{MODEL}.gguf"
    say(effort.command(out))
    result = Compression(resources.path("models") / MODEL, out, effort.wishes()).run(resume=True)
    return Demo(result, complete(out, effort.tokens), time.monotonic() - started)


def complete(gguf: Path, tokens: int) -> str:
    """PROMPT and what the model makes of it.

    The program may end before its log's last lines are written (``common_log_main`` says so; on a busy machine it was
    one run in ten), so if its last line is missing it is asked again.
    """
    options = ("-p", PROMPT, "-n", str(tokens), "--temp", str(TEMPERATURE), "--seed", str(SEED))
    quiet = ("-no-cnv", "--no-display-prompt", "--simple-io", "--perf")
    for _ in range(ATTEMPTS):
        done = tool.run("llama-completion", "-m", str(gguf), "-t", str(THREADS), *options, *quiet)
        # this line comes after the text: where it is found, the text is whole
        if re.search(r"\beval time =.* runs .*?([0-9.]+) tokens per second", done.stderr):
            return (PROMPT + done.stdout.strip("\n").removesuffix(" [end of text]")).rstrip()
    raise done.failure(f"llama-completion -m {gguf} did not say that it was done:")


# what a person sees


def render(demo: Demo) -> RenderableType:
    """compress' own page, what the file wrote and what to try next; fits 100 columns."""
    out = demo.result.out
    title = Text(out.name)
    return Group(
        report.page(demo.result),
        "",
        Panel(Text(demo.text), title=title, title_align="left", padding=(0, 1)),
        Text(
            f"done in {demo.seconds:.0f} s. To try it:\n"
            f'  {_program("llama-completion")} -m {out} -p "{PROMPT}" -n 100 -no-cnv\n'
            f"  {_program('llama-cli')} -m {out}"
        ),
    )


def _shown(path: Path) -> Path:
    """From here, where it lies below."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _program(name: str) -> str:
    """How to call an installed program from here: by its name where the PATH has it, else by its path."""
    script = Environment.active().scripts / name
    on_path = shutil.which(name)
    if on_path and script.exists() and os.path.samefile(on_path, script):
        return name
    return str(_shown(script))
