"""The web server of the page.  It answers only requests for its own address, so no other site can use it through a
browser."""

from __future__ import annotations

import http.client
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mobe_gguf.evaluate.server import HOST, Server

#: Files of the page, and their types.
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
#: Paths of the two servers, below ``/a`` and ``/b``, to which requests are forwarded.
PASSED = ("/completion", "/apply-template")

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"

#: Most bytes of a request, and of a piece of an answer.
LARGEST, PIECE = 1 << 20, 1 << 14


class PageServer(ThreadingHTTPServer):
    """``files``: what the page shows of the files: name, size, whether there is a chat template."""

    daemon_threads = True

    def __init__(self, servers: tuple[Server, Server], files: list[dict[str, Any]], port: int):
        self.servers, self.files = servers, files
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.0"  # an answer ends with its connection, so streams need no length

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing on the terminal."""

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if self.path == "/files":
            self._send("application/json", json.dumps(self.server.files).encode())
        elif self.path in FILES:
            name, kind = FILES[self.path]
            self._send(kind, (Path(__file__).parent / name).read_bytes())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        which, path = self.path[1:2], self.path[2:]
        length = self.headers.get("Content-Length", "")
        if which not in ("a", "b") or path not in PASSED:
            self.send_error(HTTPStatus.NOT_FOUND)
        elif self.headers.get_content_type() != "application/json":
            self.send_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif not length.isdecimal() or int(length) > LARGEST:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            self._pass_on(self.server.servers["ab".index(which)], path, self.rfile.read(int(length)))

    def _is_ours(self) -> bool:
        """Whether the request comes from the page itself; sites that resolve to loopback or post from elsewhere are
        refused."""
        port = self.server.server_address[1]
        hosts = (f"{HOST}:{port}", f"localhost:{port}")
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and origin in (None, *(f"http://{host}" for host in hosts)):
            return True
        self.send_error(HTTPStatus.FORBIDDEN, "only for this computer's own page")
        return False

    def _send(self, kind: str, data: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def _pass_on(self, server: Server, path: str, body: bytes) -> None:
        """Forward the answer piece by piece, as it comes; if the page disconnects, llama-server stops generating."""
        connection = http.client.HTTPConnection(HOST, server.port)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):
            self.send_error(HTTPStatus.BAD_GATEWAY, f"{server.file.name} does not answer")
            return
        try:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
            self.end_headers()
            while piece := answer.read1(PIECE):
                self.wfile.write(piece)
        except (OSError, http.client.HTTPException):
            pass  # the page or the server has disconnected
        finally:
            connection.close()
