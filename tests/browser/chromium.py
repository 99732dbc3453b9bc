"""Drive Debian's chromium by its DevTools protocol, over a pipe: open a page, ask it, photograph it.

with Browser() as browser:
    page = browser.open("file:///tmp/page.html", width=360)
    page.ask("document.title")
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

#: Seconds that an answer, or what a test waits for, may take.
PATIENCE = 60


class Browser:
    """A headless browser of its own, with no network but what a page of the test itself asks for."""

    def __enter__(self) -> Browser:
        self.home = tempfile.mkdtemp(prefix="chromium-")
        read, their_write = os.pipe()
        their_read, self._write = os.pipe()
        for fd in (their_read, their_write):
            os.set_inheritable(fd, True)
        # the protocol's pipe is fd 3 (to the browser) and fd 4 (from it)
        line = f'exec "$0" "$@" 3<&{their_read} 4>&{their_write}'
        options = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        )
        options += (
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={self.home}",
        )
        self._process = subprocess.Popen(
            ["bash", "-c", line, str(PROGRAM), *options, "about:blank"],
            pass_fds=(their_read, their_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self.home},
        )
        os.close(their_read)
        os.close(their_write)
        self._read, self._rest, self._next = read, b"", 0
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self.home, ignore_errors=True)

    def messages(self, seconds: float) -> Iterator[dict[str, Any]]:
        """What the browser says within that time."""
        import select

        end = time.monotonic() + seconds
        while True:
            while b"\0" in self._rest:
                one, _, self._rest = self._rest.partition(b"\0")
                yield json.loads(one)
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                return
            got = os.read(self._read, 1 << 20)
            if not got:
                raise RuntimeError(f"{PROGRAM} ended")
            self._rest += got

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events on the way are kept."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        for answer in self.messages(PATIENCE):
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)
        raise RuntimeError(f"{method}: no answer")

    def open(self, url: str, width: int, height: int = 800, dark: bool = False) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session, url, width, height, dark)


class Page:
    """An open page.  ``requests``: addresses that it asked for, itself left out; ``errors``: what its console says."""

    def __init__(self, browser: Browser, session: str, url: str, width: int, height: int, dark: bool):
        self._browser, self._session = browser, session
        self.url, self.width, self.height = url, width, height
        self._dark = dark
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.look(width, dark)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def look(self, width: int, dark: bool) -> None:
        """Another width and scheme of colors."""
        self.width = width
        size = {"width": width, "height": self.height, "deviceScaleFactor": 2, "mobile": width < 640}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = PATIENCE) -> None:
        """Until it is true."""
        end = time.monotonic() + seconds
        while not self.ask(expression):
            if time.monotonic() > end:
                raise RuntimeError(f"{expression}: still not true; {self.errors}")
            time.sleep(0.05)

    def _events(self, method: str) -> list[dict[str, Any]]:
        return [
            e["params"]
            for e in self._browser.events
            if e.get("method") == method and e.get("sessionId") == self._session
        ]

    @property
    def requests(self) -> list[str]:
        found = [e["request"]["url"] for e in self._events("Network.requestWillBeSent")]
        return [url for url in found if url != self.url and not url.startswith("data:")]

    @property
    def errors(self) -> list[str]:
        said = [
            e["entry"]["text"]
            for e in self._events("Log.entryAdded")
            if e["entry"]["level"] in ("error", "warning")
        ]
        said += [str(e["args"]) for e in self._events("Runtime.consoleAPICalled")]
        return said + [e["exceptionDetails"]["text"] for e in self._events("Runtime.exceptionThrown")]

    def photograph(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page from top to bottom."""
        data = self.call(
            "Page.captureScreenshot", captureBeyondViewport=whole, format="png", **self._clip(whole)
        )
        path.write_bytes(base64.b64decode(data["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        height = min(12000, self.ask("document.documentElement.scrollHeight"))
        return {"clip": {"x": 0, "y": 0, "width": self.width, "height": height, "scale": 1}}

    def pdf(self) -> bytes:
        return base64.b64decode(
            self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]
        )


@contextmanager
def opened(path: Path, width: int = 360, dark: bool = False) -> Iterator[Page]:
    """A file in a browser of its own."""
    with Browser() as browser:
        yield browser.open(path.absolute().as_uri(), width, dark=dark)
