"""``mobe-gguf serve-compare``: its page in a real browser, who may use it, and that its servers end with it, whatever ends it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .chromium import PROGRAM, Browser

PATIENCE = 60

PROGRAM_OF = "from mobe_gguf.cli import main; main(prog_name='mobe-gguf')"


def servers_of(pid: int) -> list[int]:
    """Children of a process that are llama-servers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid and "llama-server" in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except OSError:
                pass
    return sorted(found)


def is_gone(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_gone(pids: list[int]) -> None:
    end = time.monotonic() + PATIENCE
    while not all(map(is_gone, pids)):
        assert time.monotonic() < end, f"still there: {[pid for pid in pids if not is_gone(pid)]}"
        time.sleep(0.05)


@contextmanager
def serving(*files: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, running, and the page's address."""
    command = [sys.executable, "-c", PROGRAM_OF, "serve-compare", *map(str, files), "-t", "1", "-c", "512"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.skipif(PROGRAM is None, reason="there is no chromium: apt-get install chromium")
def test_the_page(two: tuple[Path, Path]) -> None:
    with serving(*two) as (_, address), Browser() as browser:
        page = browser.open(address + "/", 360)
        page.wait("document.querySelector('#b h2').textContent.startsWith('q2_k, ')")
        page.ask("document.getElementById('tokens').value = '40'")
        for turns in ("false", "true"):
            page.ask(
                f"document.getElementById('turns').checked = {turns}; document.getElementById('send').click()"
            )
            page.wait("!document.getElementById('send').disabled")
            assert page.ask("document.getElementById('said').textContent") == ""
            for which, file in zip("ab", two, strict=True):
                shown = page.ask(f"document.querySelector('#{which} .words').textContent")
                assert shown == complete(address, which), file
                speed = page.ask(f"document.querySelector('#{which} .speed').textContent")
                assert speed.startswith("40 tokens, ") and "prompt " in speed and speed.endswith(" tokens/s")
            marks = "document.querySelectorAll('#%s mark.part').length"
            assert [page.ask(marks % which) for which in "ab"] == [1, 1], (
                "the two types part within 40 tokens"
            )
            before = "document.querySelector('#%s mark.part').previousSibling.textContent"
            assert page.ask("((a, b) => a === b)(" + ",".join(before % which for which in "ab") + ")")
        assert page.ask("document.documentElement.scrollWidth") <= 360
        assert page.errors == [] and all(url.startswith(address + "/") for url in page.requests)


def ask(address: str, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=PATIENCE)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), given)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def complete(address: str, which: str) -> str:
    body = {"prompt": "And it came to pass", "n_predict": 40, "temperature": 0, "cache_prompt": False}
    status, data = ask(address, "POST", f"/{which}/completion", body, Content_Type="application/json")
    assert status == 200
    return json.loads(data)["content"]


def test_who_may_use_it_and_sigterm(two: tuple[Path, Path]) -> None:
    with serving(*two) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        assert ask(address, "GET", "/")[0] == 200 and ask(address, "GET", "/etc/passwd")[0] == 404
        assert ask(address, "GET", "/", Host="example.com")[0] == 403
        kind = {"Content_Type": "application/json"}
        assert ask(address, "POST", "/a/completion", {}, Origin="http://example.com", **kind)[0] == 403
        assert ask(address, "POST", "/a/completion", {}, Content_Type="text/plain")[0] == 415
        assert ask(address, "POST", "/a/props", {}, **kind)[0] == 404
        assert ask(address, "POST", "/a/completion", {}, Content_Length="99999999", **kind)[0] == 413
        pids = servers_of(process.pid)
        assert len(pids) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 130
        wait_gone(pids)


def test_a_server_that_ends_ends_all(two: tuple[Path, Path]) -> None:
    with serving(*two) as (process, _):
        pids = servers_of(process.pid)
        os.kill(pids[1], signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert "q2_k.gguf ended (killed by signal 9)" in said and "Traceback" not in said
        wait_gone(pids)


def test_servers_end_where_the_command_is_killed(two: tuple[Path, Path]) -> None:
    with serving(*two) as (process, _):
        pids = servers_of(process.pid)
        process.kill()
        process.wait()
        wait_gone(pids)


def test_a_file_that_is_none(two: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    name = b"blk.1.attn_k.weight"
    broken.write_bytes(two[1].read_bytes().replace(name, name.replace(b"_k", b"_x")))
    with serving(two[0], broken) as (process, address):
        _, said = process.communicate(timeout=PATIENCE)
        assert address == "" and process.returncode == 1 and "broken.gguf ended (exit code 1)" in said
        assert "blk.1.attn_k.weight" in said
