"""llama-server as a child process: on loopback, on a free port; it ends with the process that started it."""

from __future__ import annotations

import collections
import contextlib
import ctypes  # prctl is no part of Python
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError

HOST = "127.0.0.1"

#: Seconds that a server has for stopping before it is killed, and seconds that a request may take.
PATIENCE, ANSWER = 5.0, 600.0

#: How many last lines of a server's messages are kept.
TAIL = 12


def free_port() -> int:
    """A loopback port on which nobody listens now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


class Server:
    """A running llama-server; ``address`` is ``http://127.0.0.1:PORT``."""

    def __init__(self, file: Path, options: tuple[str, ...]):
        self.file = file
        self.port = free_port()
        self.address = f"http://{HOST}:{self.port}"
        self._said: collections.deque[str] = collections.deque(maxlen=TAIL)
        command = [
            str(runtime.tool("llama-server")),
            "-m",
            str(file),
            "--host",
            HOST,
            "--port",
            str(self.port),
        ]
        command += ["--no-webui", "--cache-ram", "0", *options]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=_die_with_parent,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.decode(errors="replace").rstrip())

    def failure(self) -> str | None:
        """Why it no longer runs, with its last messages; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        how = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
        words = "".join(f"\n  {line}" for line in self._said)
        return f"llama-server -m {self.file} ended ({how}){':' if words else ''}{words}"

    def wait(self) -> None:
        """Wait until it has loaded the file; MobeError if it ends before."""
        while True:
            if why := self.failure():
                time.sleep(0.1)  # its last lines may still arrive
                raise MobeError(self.failure() or why)
            with contextlib.suppress(urllib.error.URLError, OSError):
                with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            time.sleep(0.1)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Its answer to a request; MobeError if there is none."""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER) as answer:
                found = json.load(answer)
        except (urllib.error.URLError, OSError, ValueError) as e:
            said = e.read().decode(errors="replace")[:300] if isinstance(e, urllib.error.HTTPError) else e
            raise MobeError(self.failure() or f"llama-server -m {self.file} gave no answer: {said}") from e
        if not isinstance(found, dict):
            raise MobeError(f"llama-server -m {self.file} answered something else: {str(found)[:100]}")
        return found

    def stop(self) -> None:
        """End the server; returns when it has exited."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def serving(file: Path, *options: str) -> Iterator[Server]:
    """A llama-server that has loaded ``file``; it is ended after the block.  MobeError if it cannot start."""
    server = Server(file, options)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


#: Loaded here, because nothing may be imported between fork and exec.
_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """Runs in the child, on Linux: makes it end even if its parent is killed."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
