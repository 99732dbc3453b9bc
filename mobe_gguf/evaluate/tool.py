"""Run one of llama.cpp's programs and follow its output."""

from __future__ import annotations

import codecs
import io
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError

#: How many last lines of a program's messages an error shows.
TAIL = 12

#: A program that fails at once may end before its logging thread has written the reason (see ``common_log_main``).  If
#: it fails within PATIENCE seconds without a reason, it is run again, at most ATTEMPTS times in all.
ATTEMPTS, PATIENCE = 5, 20
ERROR_LINE = re.compile(r"^([\d.]+ E |error)", re.MULTILINE)


@dataclass(frozen=True)
class Finished:
    """What a program printed; its exit code was 0."""

    stdout: str
    stderr: str

    def failure(self, what: str) -> MobeError:
        """A MobeError with ``what`` and the program's last messages."""
        return _error(what, self.stdout, self.stderr)


def run(name: str, *arguments: str, on_stdout: Callable[[str], None] | None = None) -> Finished:
    """Run program ``name`` of the installed runtime; ``on_stdout`` gets its output piece by piece, as it comes.

    The program ends with the caller: an exception (Ctrl-C) kills it.
    Raises MobeError, with its last lines, if it fails, and if the runtime is not installed.
    """
    command = [str(runtime.tool(name)), *arguments]
    for _ in range(ATTEMPTS):
        started = time.monotonic()
        code, stdout, stderr = _run(command, on_stdout)
        if code == 0:
            return Finished(stdout, stderr)
        if stdout or re.search(ERROR_LINE, stderr) or time.monotonic() - started > PATIENCE:
            break
    how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
    raise _error(f"{name} {' '.join(arguments)} failed ({how}):", stdout, stderr)


def _run(command: list[str], on_stdout: Callable[[str], None] | None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    with subprocess.Popen(
        command,
        env=_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            stdout, stderr = _read(process, on_stdout)
        except BaseException:
            process.kill()
            raise
    return process.returncode, stdout, stderr


def _read(process: subprocess.Popen[bytes], on_stdout: Callable[[str], None] | None) -> tuple[str, str]:
    """All of stdout and stderr; a thread drains the second, so that neither pipe can fill up."""
    out, err = process.stdout, process.stderr
    assert isinstance(out, io.BufferedReader) and err is not None
    errors: list[bytes] = []
    drain = threading.Thread(target=lambda: errors.append(err.read()), daemon=True)
    drain.start()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = []
    while chunk := out.read1(1 << 16):
        pieces.append(decoder.decode(chunk))
        if on_stdout is not None:
            on_stdout(pieces[-1])
    drain.join()
    return "".join(pieces) + decoder.decode(b"", final=True), b"".join(errors).decode(errors="replace")


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """``given`` without the variables that change the programs' logging, because their output is parsed."""
    return {name: value for name, value in given.items() if not re.match(r"LLAMA_(ARG_)?LOG_", name)}


def _error(what: str, stdout: str, stderr: str) -> MobeError:
    lines = (stderr.strip() or stdout.strip() or "(it printed nothing)").splitlines()[-TAIL:]
    tail = "\n".join(f"  {line}" for line in lines)
    return MobeError(f"{what}\n{tail}\nIs the runtime older than this mobe-gguf? Run mobe-gguf build")
