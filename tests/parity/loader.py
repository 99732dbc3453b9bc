"""Load GGUF files that may crash whoever loads them: each in a process of its own, forked from one that is ready.

    with Loader() as loader:
        outcome = loader.load(path)     # Outcome(loaded=False, signal=None, errors="... tensor 'x' ...")

A fork takes some milliseconds; a fresh interpreter with llama_cpp in it takes a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
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
    """The running interpreter's llama_cpp, on the libraries in ``lib`` if given, on the installed ones if not."""

    def __init__(self, lib: Path | None = None):
        from mobe_gguf import runtime

        runtime.lib_dir()  # says what to do when there is none
        env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        env.pop("LLAMA_CPP_LIB_PATH", None)
        if lib is not None:
            env["LLAMA_CPP_LIB_PATH"] = str(lib)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
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


def _serve() -> None:
    import llama_cpp  # noqa: F401 - every fork has it then

    for line in sys.stdin:
        read_end, write_end = os.pipe()
        with tempfile.TemporaryFile() as stderr:
            child = os.fork()
            if child == 0:
                signal.alarm(TIMEOUT)
                os.dup2(stderr.fileno(), 2)
                os.dup2(2, 1)
                _load(line.rstrip("\n"), write_end)
                os._exit(0)
            os.close(write_end)
            with os.fdopen(read_end, encoding="utf-8", errors="replace") as result:
                text = result.read()
            _, status = os.waitpid(child, 0)
            stderr.seek(0)
            printed = stderr.read().decode(errors="replace")
        killed = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None
        loaded, errors = json.loads(text) if text else (False, "")
        print(json.dumps(dict(loaded=loaded, errors=errors, stderr=printed, signal=killed)), flush=True)


def _load(path: str, write_end: int) -> None:
    """Runs in the fork; writes its result only when all went well or was refused."""
    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
        context = llama_cpp.llama_init_from_model(model, params)
        for tokens in ((5, 6, 7, 8, 9), (10,)):
            ids = (llama_cpp.llama_token * len(tokens))(*tokens)
            failed = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens)))
            assert not failed, f"llama_decode: {failed}"
    os.write(write_end, json.dumps((bool(model), "".join(errors))).encode())


if __name__ == "__main__":
    _serve()
