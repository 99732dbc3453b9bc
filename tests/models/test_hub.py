"""Models by their hub id, against a server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
from parity import gguf_files

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.models import hub

pytest.importorskip("huggingface_hub", reason="the hub's client is optional")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories by id, each file name -> content; ``asked`` are the paths of all requests."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        parts = path.split("?")[0].strip("/").removeprefix("api/models/").split("/")
        org, name, *tail = (*parts, "", "")
        repo = f"{org}/{name}"
        error = {"X-Error-Code": "RepoNotFound"}
        if repo not in self.repos:
            return 404, error, b"{}"
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        files = self.repos[repo]
        tail = [part for part in tail if part]
        if tail[:1] in (["revision"], ["tree"]):
            if tail[1] not in ("main", COMMIT, "v2"):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if tail[0] == "tree":
                entries = [
                    {"type": "file", "path": n, "size": len(c), "oid": _id(c)} for n, c in files.items()
                ]
                return 200, {}, json.dumps(entries).encode()
            siblings = [{"rfilename": name} for name in files]
            return 200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        if tail[:1] == ["resolve"] and "/".join(tail[2:]) in files:
            content = files["/".join(tail[2:])]
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{_id(content)}"'}, content
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"


def _id(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model's files, and what a repository holds beside them."""
    path = tiny.make_model("olmoe", tmp_path_factory.mktemp("hub") / "model")
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    others = (
        "modeling.py",
        "pytorch_model.bin",
        "x_WAB.pth",
        "consolidated.safetensors",
        "original/params.json",
    )
    return files | {name: b"should not be asked for" for name in others} | {"README.md": b"# Model"}


@pytest.fixture
def fake(files: dict[str, bytes], tmp_path: Path) -> Iterator[FakeHub]:
    gguf = gguf_files.qwen3moe().write(tmp_path / "m.gguf").read_bytes()
    halves = {f"q8/m-0000{i}-of-00002.gguf": gguf for i in (1, 2)}
    fake = FakeHub(
        {"org/model": files, "org/gated": files, "org/files-gguf": {"m.gguf": gguf, "x.gguf": b"x"} | halves}
    )
    fake.gated.add("org/gated")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            status, headers, body = fake.answer(self.path)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield fake
    server.shutdown()
    server.server_close()


def command(fake: FakeHub | None, home: Path, *args: Any, **env: str) -> tuple[int, str, str]:
    """``mobe-gguf`` in a process of its own: the client reads its settings when it is imported."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    url = fake.url if fake else "http://127.0.0.1:9"
    settings |= {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"} | env
    program = "from mobe_gguf.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        env=settings,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, " ".join(done.stderr.split())


def test_factorize_by_id(fake: FakeHub, tmp_path: Path) -> None:
    """Downloaded once, weights, JSON and tokenizer alone; then found offline; another id is not."""
    args = ("factorize", "org/model", "out", "--steps", 2, "--dry-run")
    code, _, err = command(fake, tmp_path, *args)
    assert code == 0 and "olmoe, 3 of 3 layers MoE" in err, err
    got = {path.split("/resolve/")[1].split("/", 1)[1] for path in fake.asked if "/resolve/" in path}
    assert "model.safetensors" in got and "tokenizer.json" in got and "README.md" in got
    assert not {n for n in got if n.endswith((".py", ".bin", ".pth")) or "consolidated" in n or "/" in n}, got
    assert not (tmp_path / "out").exists()
    fake.asked.clear()
    code, _, err = command(fake, tmp_path, *args, HF_HUB_OFFLINE="1")
    assert code == 0 and not fake.asked, err
    code, _, err = command(fake, tmp_path, "factorize", "org/unknown", "out", HF_HUB_OFFLINE="1")
    assert code == 1 and "HF_HUB_OFFLINE" in err and "not in the cache" in err and not fake.asked, err


def test_export_by_id(fake: FakeHub, tmp_path: Path) -> None:
    """The file is named after the model, not after the cache's folder."""
    code, _, err = command(
        fake, tmp_path, "export", "hf:org/model@v2", "o.gguf", "--quant", "q8_0", "--dense", "-q"
    )
    assert code == 0, err
    from mobe_gguf.formats.gguf import read_gguf

    keys = read_gguf(tmp_path / "o.gguf").keys
    assert keys["general.name"].lower() == "model" and COMMIT not in str(keys)
    assert any("/revision/v2" in path for path in fake.asked)


def test_gguf_files_by_name(fake: FakeHub, tmp_path: Path) -> None:
    code, _, err = command(fake, tmp_path, "factorize", "org/files-gguf/m.gguf", "out", "--steps", 2, "-q")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "factors.json").read_text())["architecture"] == "qwen3moe"
    assert not any("x.gguf" in path for path in fake.asked)
    command(fake, tmp_path, "factorize", "org/files-gguf/q8/m-00001-of-00002.gguf", "out2", "--dry-run")
    asked = {path.rsplit("/", 1)[-1] for path in fake.asked if "/resolve/" in path}
    assert asked == {"m.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"}, "all files of a split model"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/unknown", "no such model on the hub"),
        ("org/gated", "the model is gated"),
        ("org/model@v9", "org/model: the hub has no such model at revision v9"),
        (
            "org/files-gguf",
            "no config.json; if its models are GGUF files, name one: org/files-gguf/NAME.gguf",
        ),
        ("org/files-gguf/y.gguf", "has no file y.gguf"),
    ],
)
def test_what_the_hub_does_not_have(model: str, message: str, fake: FakeHub, tmp_path: Path) -> None:
    code, _, err = command(fake, tmp_path, "factorize", model, "out")
    assert code == 1 and message in err, err


def test_no_network(tmp_path: Path) -> None:
    code, _, err = command(None, tmp_path, "factorize", "org/model", "out")
    assert code == 1 and "the hub cannot be reached" in err, err


def test_paths_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that could be one is asked of the hub."""
    monkeypatch.setattr(hub, "_download", lambda *args: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "m").mkdir(parents=True)
    for text in ("models/m", "model", "/models/m", "../other/m", "a/b/c", "model.gguf"):
        assert hub.resolve(Path(text)) == Path(text)
    with pytest.raises(MobeError, match="models/n: no such file or directory.*hf:models/n"):
        hub.resolve(Path("models/n"))


def test_without_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MobeError, match=r"pip install 'mobe-gguf\[hub\]'"):
        hub.resolve(Path("org/model"))


@pytest.mark.parametrize("name", ["hf:foo", "hf:", "hf:a/b/c", "hf:-x/y"])
def test_ids_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: expected hf:ORG/NAME"):
        hub.resolve(Path(name))
