"""Running a module of this package as a program of its own: llama.cpp ends the process if a file does not fit its graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError


def run_apart(module: str, path: Path, *arguments: object, out: Path) -> None:
    """Run ``python -m module path arguments... out``, which writes ``out``.  MobeError, with the program's output, if the runtime
    fails to run the model at ``path``."""
    runtime.lib_dir()  # raises an error that says what to do if there is no runtime
    command = [sys.executable, "-m", module, *map(str, (path, *arguments, out))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not out.exists():
        lines = [line for line in done.stderr.splitlines() if "rror" in line or "ASSERT" in line]
        own = [line for line in lines if "raise " not in line and "ValueError" not in line]  # not Python's
        said = " ".join((own or lines)[:3]) or f"it ended with code {done.returncode}"
        raise MobeError(f"{path}: the runtime does not run this file: {said}")
