"""Running a module of this package as a program of its own: llama.cpp ends the process if a file does not fit its graph."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError


def run_apart(
    module: str,
    path: Path,
    *arguments: object,
    out: Path,
    on_line: Callable[[str], None] = lambda line: None,
    of: object = None,
) -> None:
    """Run ``python -m module path arguments... out``, which writes ``out``; ``on_line`` gets what it prints, as it comes.

    The program ends with the caller: an exception (Ctrl-C) kills it.  MobeError, with the program's output, if the runtime fails to
    run the model at ``path``; ``of``: what the message says that file is of.
    """
    runtime.lib_dir()  # raises an error that says what to do if there is no runtime
    command = [sys.executable, "-m", module, *map(str, (path, *arguments, out))]
    with tempfile.TemporaryFile() as errors:
        code = _run(command, errors.fileno(), on_line)
        if code == 0 and out.exists():
            return
        errors.seek(0)
        said = errors.read().decode(errors="replace").splitlines()
    lines = [line for line in said if "rror" in line or "ASSERT" in line]
    own = [line for line in lines if "raise " not in line and "ValueError" not in line]  # not Python's
    why = " ".join((own or lines)[:3]) or f"it ended with code {code}"
    if of is not None:
        raise MobeError(f"{of}: the runtime would not run a file of it: {why}")
    raise MobeError(f"{path}: the runtime does not run this file: {why}")


def _run(command: list[str], errors: int, on_line: Callable[[str], None]) -> int:
    """The exit code; stderr goes to the file ``errors``."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                on_line(line)
            return process.wait()
        except BaseException:
            process.kill()
            raise
