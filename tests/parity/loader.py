"""Load GGUF files that may crash whoever loads them: in a process of its own, forked from one that is ready.

    with Loader() as loader:
        outcome = loader.load(path)     # Outcome(loaded=False, signal=None, errors="... tensor 'x' ...")

A fork takes some milliseconds, 20 with AddressSanitizer; a fresh interpreter with llama_cpp in it takes a second.  A fork may load
several files, one after the other; one that crashes it is loaded once more in a fork of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

#: Seconds that one file may take.
TIMEOUT = 30


@dataclass(frozen=True)
class Outcome:
    """``errors``: what llama.cpp logged as an error.  ``stderr``: what it printed, as when it aborts.

    ``signal`` names the signal that ended the process (SIGALRM: it took longer than TIMEOUT).
    """

    loaded: bool
    errors: str
    stderr: str
    signal: str | None


class Loader:
    """The running interpreter's llama_cpp, on the libraries in ``lib`` if given, on the installed ones if not.  ``files``: how many a
    fork may load."""

    def __init__(self, lib: Path | None = None, files: int = 1):
        from mobe_gguf import runtime

        runtime.lib_dir()  # says what to do when there is none
        env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        env.pop("LLAMA_CPP_LIB_PATH", None)
        if lib is not None:
            env["LLAMA_CPP_LIB_PATH"] = str(lib)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(files)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def load(self, path: Path) -> Outcome:
        """Load ``path`` and, if that works, evaluate a prompt and one more token."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class _Fork:
    """A fork that loads files until one kills it."""

    def __init__(self) -> None:
        paths, self._paths = os.pipe()
        self._results, results = os.pipe()
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115, closed by ``end``
        self.loaded = 0
        self._child = os.fork()
        if self._child == 0:
            os.close(self._paths)
            os.close(self._results)
            os.dup2(self._printed.fileno(), 2)
            os.dup2(2, 1)
            try:
                _work(paths, results)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(paths)
        os.close(results)
        self._answers = os.fdopen(self._results, encoding="utf-8", errors="replace")

    def load(self, path: str) -> tuple[Outcome, bool]:
        """The outcome, and whether the fork is still there."""
        self.loaded += 1
        os.ftruncate(self._printed.fileno(), 0)
        os.write(self._paths, f"{path}\n".encode())
        text = self._answers.readline()
        loaded, errors = json.loads(text) if text else (False, "")
        status = 0 if text else os.waitpid(self._child, 0)[1]
        self._printed.seek(0)
        printed = self._printed.read().decode(errors="replace")
        killed = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None
        return Outcome(loaded, errors, printed, killed), bool(text)

    def end(self, alive: bool) -> None:
        os.close(self._paths)
        self._answers.close()
        self._printed.close()
        if alive:
            os.waitpid(self._child, 0)


def _serve(files: int) -> None:
    import llama_cpp  # noqa: F401 - every fork has it then

    fork: _Fork | None = None
    for line in sys.stdin:
        fork = fork or _Fork()
        outcome, alive = fork.load(line.rstrip("\n"))
        if not alive and fork.loaded > 1:  # is it this file alone?
            fork.end(alive)
            fork = _Fork()
            again, alive = fork.load(line.rstrip("\n"))
            outcome = outcome if again.signal is None else again
        if not alive or fork.loaded >= files:
            fork.end(alive)
            fork = None
        print(json.dumps(asdict(outcome)), flush=True)
    if fork is not None:
        fork.end(True)


def _work(paths: int, results: int) -> None:
    """Runs in the fork: loads files; writes a result only when all went well or the file was refused."""
    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    with os.fdopen(paths) as lines:
        for line in lines:
            signal.alarm(TIMEOUT)
            os.lseek(2, 0, os.SEEK_SET)
            errors.clear()
            loaded = _load(line.rstrip("\n"))
            os.write(results, (json.dumps((loaded, "".join(errors))) + "\n").encode())
            signal.alarm(0)


def _load(path: str) -> bool:
    import llama_cpp

    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        return False
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    context = llama_cpp.llama_init_from_model(model, params)
    for tokens in ((5, 6, 7, 8, 9), (10,)):
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        failed = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens)))
        assert not failed, f"llama_decode: {failed}"
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return True


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
