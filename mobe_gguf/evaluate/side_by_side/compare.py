"""Start two llama-servers and the page's web server; if one ends, all end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.core.errors import MobeError
from mobe_gguf.evaluate.facts import facts_of
from mobe_gguf.evaluate.report import short_names
from mobe_gguf.evaluate.server import Server
from mobe_gguf.evaluate.side_by_side.http import PageServer
from mobe_gguf.formats.gguf import read_model

#: Seconds between two looks at the servers.
LOOK = 0.2


@dataclass
class Running:
    """The running servers; ``address``: of the page."""

    address: str
    servers: tuple[Server, Server]

    def wait(self) -> None:
        """Wait until a server ends, then raise MobeError; Ctrl-C and SIGTERM are not caught."""
        while True:
            for server in self.servers:
                if server.failure():
                    time.sleep(LOOK)  # its last lines may still arrive
                    raise MobeError(server.failure() or "")
            time.sleep(LOOK)


@contextlib.contextmanager
def running(left: Path, right: Path, port: int = 0, options: Sequence[str] = ()) -> Iterator[Running]:
    """Load both files and serve the page until the block ends.  ``port`` 0: a free one; ``options``: of llama-server,
    for both.

    MobeError if a file is not a model, a server does not start, or the port is in use.
    """
    names = short_names([left, right])
    files = [
        {
            "name": name,
            "bytes": facts_of(path).n_bytes,
            "chat": read_model(path).text("tokenizer.chat_template") is not None,
        }
        for name, path in zip(names, (left, right), strict=True)
    ]
    with contextlib.ExitStack() as stack:
        servers = []
        for path in (left, right):  # both load at the same time
            servers.append(Server(path, tuple(options)))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait()
        try:
            page = PageServer((servers[0], servers[1]), files, port)
        except OSError as e:
            raise MobeError(f"port {port}: {e.strerror}; name another with --port, or none") from e
        stack.callback(page.server_close)
        threading.Thread(target=page.serve_forever, daemon=True).start()
        stack.callback(page.shutdown)
        yield Running(page.address, (servers[0], servers[1]))
