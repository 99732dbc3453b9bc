"""``mobe-gguf compress`` on the tiny model that ships with the project, and a text that the result generates.

    demo = run(Path("demo"))

leaves the file that compress chose in ``demo/``, and returns the comparison.
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
#: The size asked for in bytes: a quarter of the original's.
SIZE = 3_950_000

#: Begins many verses of the model's training text.
PROMPT = "And it came to pass"
TEMPERATURE, SEED = 0.7, 1

#: In a model this small several threads would mostly wait for each other, above all on a busy machine.
THREADS = 1

#: How often a program is run if it ends without its answer.
ATTEMPTS = 5


@dataclass(frozen=True)
class Effort:
    """How much work is done; the defaults are the demo's, tests use less.

    ``steps``: of the solver for each unit.  ``chunks``: of 512 tokens for calibration (None: all of the text);
    ``eval_chunks``: for measurements.  ``tokens``: of text to generate.
    """

    steps: int | None = 60
    chunks: int | None = None
    eval_chunks: int = 32
    tokens: int = 110

    def wishes(self) -> Wishes:
        """What is asked of compress.  The model was trained on old books, so it is calibrated with such text."""
        return Wishes(
            size=SIZE,
            text=(resources.path("models") / "calibration.txt",),
            chunks=self.chunks,
            eval_chunks=self.eval_chunks,
            steps=self.steps,
            threads=THREADS,
        )

    def command(self, out: Path) -> str:
        """The same as a command line."""
        models = resources.path("models")
        words = f"--size {SIZE / 1e6:g}M --text {_shown(models / 'calibration.txt')}"
        words += "" if self.steps is None else f" --steps {self.steps}"
        words += "" if self.chunks is None else f" --chunks {self.chunks}"
        return f"mobe-gguf compress {_shown(models / MODEL)} {_shown(out)} {words} --eval-chunks {self.eval_chunks} --threads {THREADS}"


@dataclass(frozen=True)
class Demo:
    """``result`` of the compression; ``text`` that its file generated."""

    result: Result
    text: str
    seconds: float


def run(directory: Path, effort: Effort = Effort()) -> Demo:
    """Run the demo in ``directory``.  A stopped run resumes; the file of an earlier run is replaced.

    MobeError if the runtime is not built, or ``directory`` cannot be written.
    """
    started = time.monotonic()
    for name in ("llama-perplexity", "llama-completion"):
        runtime.tool(name)  # raises now rather than after the work
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MobeError(f"{directory}: cannot be made a directory: {e.strerror}; name another") from e
    out = directory / f"{MODEL}.gguf"
    say(effort.command(out))
    result = Compression(resources.path("models") / MODEL, out, effort.wishes()).run(resume=True)
    return Demo(result, complete(out, effort.tokens), time.monotonic() - started)


def complete(gguf: Path, tokens: int) -> str:
    """PROMPT and the model's continuation.

    The program may end before the last lines of its log are written (see ``common_log_main``; on a busy machine it was
    one run in ten), so it is run again if the last line is missing.
    """
    options = ("-p", PROMPT, "-n", str(tokens), "--temp", str(TEMPERATURE), "--seed", str(SEED))
    quiet = ("-no-cnv", "--no-display-prompt", "--simple-io", "--perf")
    for _ in range(ATTEMPTS):
        done = tool.run("llama-completion", "-m", str(gguf), "-t", str(THREADS), *options, *quiet)
        # this line follows the text: if it is there, the text is complete
        if re.search(r"\beval time =.* runs .*?([0-9.]+) tokens per second", done.stderr):
            return (PROMPT + done.stdout.strip("\n").removesuffix(" [end of text]")).rstrip()
    raise done.failure(f"llama-completion -m {gguf} did not say that it was done:")


# output


def render(demo: Demo) -> RenderableType:
    """The report of compress, the generated text and commands to try; fits 100 columns."""
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
    """``path`` relative to the current directory, if it is below it."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _program(name: str) -> str:
    """How to call an installed program from here: by name if PATH has it, else by path."""
    script = Environment.active().scripts / name
    on_path = shutil.which(name)
    if on_path and script.exists() and os.path.samefile(on_path, script):
        return name
    return str(_shown(script))
