"""tests/peers/run.py: other builds wait while it compiles, not while its tests run."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mobe_gguf.core.errors import MobeError

PEERS = Path(__file__).resolve().parents[1] / "peers"


def is_locked(cache: Path) -> bool:
    with open(cache / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))
    import run

    monkeypatch.setattr(run.source, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(run.build, "build", lambda *_, **__: None)
    monkeypatch.setattr(run.build.BuildRecipe, "variant", lambda _: "variant")
    monkeypatch.setattr(run, "targets_and_tests", lambda *_: (["test-a"], ["a"], []))
    (tmp_path / "variant").mkdir()
    (tmp_path / "variant" / "build.log").touch()
    return run


def test_locked_while_compiling(run, tmp_path, monkeypatch):
    locked = {}

    def compiled(*_):
        locked["compile"] = is_locked(tmp_path)

    def tested(*_, **__):
        locked["test"] = is_locked(tmp_path)
        return SimpleNamespace(returncode=8)

    monkeypatch.setattr(run.compiling, "compile_targets", compiled)
    monkeypatch.setattr(run, "ctest", tested)
    assert run.peers_of_llama_cpp(1, None) == 8
    assert locked == {"compile": True, "test": False}


def test_a_build_meanwhile(run, tmp_path, monkeypatch):
    def tested(*_, **__):
        os.utime(tmp_path / "variant" / "build.log", (0, 0))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run.compiling, "compile_targets", lambda *_: None)
    monkeypatch.setattr(run, "ctest", tested)
    with pytest.raises(MobeError, match="run make peers again"):
        run.peers_of_llama_cpp(1, None)
