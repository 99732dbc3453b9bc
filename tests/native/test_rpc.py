"""The operator over llama.cpp's RPC backend: two servers on loopback, and a peer that does not know it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from parity.gguf_files import factorize, qwen3moe

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.names import ALL_PROJECTIONS

#: What an unpatched llama.cpp of the pinned version answers to the first command: major, minor, patch, padding, 24 bytes.
STOCK_HELLO = bytes([7, 0, 0, 0]) + bytes(24)


@pytest.fixture(scope="module")
def server_program() -> Path:
    try:
        return runtime.tool("ggml-rpc-server")
    except MobeError as error:
        pytest.skip(str(error))


@pytest.fixture(
    scope="module",
    params=[{}, {"activation": "none", "n_basis": 19, "projections": ALL_PROJECTIONS}],
    ids=["operator", "products"],
)
def files(request, tmp_path_factory) -> tuple[Path, Path]:
    """A MoBE model, the operator's or one of ggml's own products, and a text."""
    folder = tmp_path_factory.mktemp("rpc")
    text = folder / "text.txt"
    text.write_text((resources.path("models") / "heldout.txt").read_text(encoding="utf-8")[:1500], "utf-8")
    return factorize(qwen3moe(), **request.param).write(folder / "mobe.gguf"), text


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def server(program: Path, log: Path):
    """A running ``ggml-rpc-server``; yields its endpoint."""
    port = free_port()
    with open(log, "wb") as sink:
        process = subprocess.Popen(
            [program, "--host", "127.0.0.1", "--port", str(port), "--threads", "1"],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def perplexity(files: tuple[Path, Path], *options: str) -> subprocess.CompletedProcess[str]:
    model, text = files
    env = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
    env["GGML_NO_BACKTRACE"] = "1"  # the refusal is an abort
    return subprocess.run(
        [
            runtime.tool("llama-perplexity"),
            "-m",
            model,
            "-f",
            text,
            "-c",
            "64",
            "-b",
            "64",
            "-t",
            "1",
            *options,
        ],
        capture_output=True,
        text=True,
        errors="replace",
        env=env,
        timeout=180,
    )


def values(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(value) for value in re.findall(r"\[\d+\]([0-9.]+),", done.stdout)]


def test_two_servers_compute_what_one_process_does(server_program, files, tmp_path):
    with (
        server(server_program, tmp_path / "1.log") as first,
        server(server_program, tmp_path / "2.log") as second,
    ):
        done = perplexity(files, "--rpc", f"{first},{second}", "-ngl", "99", "-v")
    got, alone = values(done), values(perplexity(files))
    for endpoint in (first, second):
        assert re.search(rf"{re.escape(endpoint)}\S* +model buffer size", done.stdout + done.stderr), (
            f"{endpoint} holds no part of the model"
        )
    assert len(got) >= 5 and got == pytest.approx(alone, rel=1e-3)


def test_a_peer_without_the_operator_is_refused(server_program, files):
    def answer(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    command = connection.recv(1 + 8 + 24, socket.MSG_WAITALL)  # it comes in three pieces
                    assert command[0] == 14  # RPC_CMD_HELLO
                    connection.sendall(len(STOCK_HELLO).to_bytes(8, "little") + STOCK_HELLO)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        done = perplexity(files, "--rpc", f"127.0.0.1:{listener.getsockname()[1]}", "-ngl", "99")
    assert done.returncode != 0
    assert "RPC handshake failed" in done.stderr and "mobe-gguf build" in done.stderr, done.stderr[-2000:]
