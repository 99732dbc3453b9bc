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

import cffi
import pytest
from parity.gguf_files import factorize, qwen3moe

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.names import ALL_PROJECTIONS

#: GGML_OP_MOBE_PROJ, the last of the operators, and RPC_CMD_GRAPH_COMPUTE: a command is one byte.
MOBE_PROJ, GRAPH_COMPUTE = 101, 10

#: In ``rpc_tensor``: its size, and where the operator's number lies.
TENSOR_BYTES, OP_AT = 296, 52


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
    env["GGML_SCHED_DEBUG"] = "2"  # with -v: where each node is computed
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


def test_cpu_moe_leaves_bases_on_the_device(server_program, files, tmp_path):
    """All tokens use them, so that is where they belong; the experts' A and down are in main memory."""
    with server(server_program, tmp_path / "1.log") as endpoint:
        done = perplexity(files, "--rpc", endpoint, "-ngl", "99", "--cpu-moe", "-v")
    places: dict[str, set[str]] = {"basis": set(), "exps": set()}
    for line in (done.stdout + done.stderr).splitlines():
        node = re.search(r"node #\s*\d+ \(\s*\w+\):.*?\[\s*(\w+)", line)
        used = re.search(
            r"ffn_(?:gate|up|down)_(basis|exps)", line[line.find("use=") :]
        )  # cut after 20 characters
        if node and used:
            places[used[1]].add(node[1])
    assert places == {"basis": {"RPC0"}, "exps": {"CPU"}}
    assert values(done) == pytest.approx(values(perplexity(files)), rel=1e-3)


def received(connection: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes; OSError when the other end is gone."""
    parts = b""
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise OSError
        parts += part
    return parts


@contextlib.contextmanager
def ended(connection: socket.socket):
    """Ends the connection, whoever waits for it: a server has one client at a time."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def operators(graph: bytes) -> set[int]:
    """The operators in a message RPC_CMD_GRAPH_COMPUTE: | device | n | n numbers of 8 bytes | n_tensors | tensors |."""
    n_nodes = int.from_bytes(graph[4:8], "little")
    tensors = graph[8 + 8 * n_nodes + 4 :]
    assert tensors and len(tensors) % TENSOR_BYTES == 0
    return {
        int.from_bytes(tensors[at + OP_AT : at + OP_AT + 4], "little")
        for at in range(0, len(tensors), TENSOR_BYTES)
    }


class Between:
    """Stands between a client and a server, as one that does not know the operator if ``stock``; notes what a client sends."""

    def __init__(self, endpoint: str, stock: bool) -> None:
        self.host, self.port = endpoint.split(":")
        self.stock = stock
        self.seen: set[int] = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection((self.host, int(self.port)))
                for target in (self._requests, self._answers):
                    threading.Thread(target=target, args=(client, server), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), ended(server):
            while True:
                head = received(client, 9)
                body = received(client, int.from_bytes(head[1:], "little"))
                if head[0] == GRAPH_COMPUTE:
                    self.seen |= operators(body)
                server.sendall(head + body)

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), ended(client):
            hello = bytearray(received(server, 8 + 28))
            assert hello[8:10] == bytes([7, 0])  # upstream's version: a stock client compares these
            if self.stock:
                hello[10] = 0
            client.sendall(hello)
            while part := server.recv(1 << 16):
                client.sendall(part)


@pytest.mark.parametrize("stock", [True, False], ids=["unpatched", "patched"])
def test_a_server_without_the_operator_gets_all_else(server_program, files, stock, tmp_path):
    """Its bases stay where they can be multiplied, and the answers are the same."""
    with server(server_program, tmp_path / "1.log") as endpoint:
        between = Between(endpoint, stock)
        done = perplexity(files, "--rpc", between.endpoint, "-ngl", "99", "-v")
        between.listener.close()
    assert len(values(done)) >= 5 and values(done) == pytest.approx(values(perplexity(files)), rel=1e-3)
    said = "does not know the operator of factorized experts" in done.stdout + done.stderr
    assert len(between.seen) > 5, "nothing was computed there"
    holds = b"qwen3moe.mobe.activation" in files[0].read_bytes() and b"tanh" in files[0].read_bytes()
    assert (MOBE_PROJ in between.seen) == (holds and not stock)
    assert said == (holds and stock)


def test_what_a_server_takes_for_the_operator():
    """A node that another program describes, whose number for another operator may be ours."""
    from native.ggml_graph import F32, I32, ffi, library

    fields = cffi.FFI()
    fields.cdef(
        "typedef struct { int type; void * buffer; int64_t ne[4]; size_t nb[4]; int op; int32_t op_params[16]; "
        "int32_t flags; void * src[10]; } tensor;"
    )
    lib = library()
    context = lib.ggml_init(ffi.new("ggml_init_params *", (1 << 20, ffi.NULL, True))[0])
    d, r, m, n, k, t = 64, 32, 4, 8, 2, 3
    operands = [
        lib.ggml_new_tensor_3d(context, F32, d, r, m), lib.ggml_new_tensor_2d(context, F32, m, n),
        lib.ggml_new_tensor_3d(context, F32, d, 1, t), lib.ggml_new_tensor_2d(context, I32, k, t),
    ]  # fmt: skip
    node = lib.ggml_mobe_proj(context, *operands, 2)
    seen = fields.cast("tensor *", int(ffi.cast("intptr_t", node)))
    assert seen.op == MOBE_PROJ and lib.ggml_mobe_proj_is_sound(node)
    for array, index, value in (
        (seen.ne, 0, r + 1), (seen.ne, 1, k + 1), (seen.ne, 2, t + 1), (seen.ne, 3, 2), (seen.op_params, 0, 3),
        (seen.op_params, 0, -1), (seen.src, 0, fields.NULL), (seen.src, 3, fields.NULL), (seen.src, 2, seen.src[1]),
    ):  # fmt: skip
        before, array[index] = array[index], value
        assert not lib.ggml_mobe_proj_is_sound(node), (index, value)
        array[index] = before
    assert lib.ggml_mobe_proj_is_sound(node)
    lib.ggml_free(context)
