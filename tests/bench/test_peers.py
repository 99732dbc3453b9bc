"""bench/peers.py: which interpreter is taken for AutoRound, and what it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mobe_gguf.core.errors import MobeError

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delenv("AUTOROUND_PYTHON", raising=False)
    import peers

    return peers


def program(path: Path, code: int) -> Path:
    """One that answers every question alike: 0 is a Python that has AutoRound, 1 one that lacks it."""
    path.write_text(f"#!/bin/sh\nexit {code}\n")
    path.chmod(0o755)
    return path


def test_interpreter(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option, then the environment, then the Python that runs; each has to have AutoRound."""
    named, other = program(tmp_path / "named", 0), program(tmp_path / "other", 0)
    lacks = program(tmp_path / "lacks", 1)
    monkeypatch.setenv("AUTOROUND_PYTHON", str(other))
    assert peers.interpreter(str(named)) == named
    assert peers.interpreter("") == other
    monkeypatch.setenv("AUTOROUND_PYTHON", str(lacks))
    with pytest.raises(MobeError, match=r"lacks has no auto-round.*--peers PYTHON or AUTOROUND_PYTHON"):
        peers.interpreter("")
    with pytest.raises(MobeError, match="absent: no such program"):
        peers.interpreter(str(tmp_path / "absent"))
    monkeypatch.delenv("AUTOROUND_PYTHON")
    monkeypatch.setattr(sys, "executable", str(named))
    assert peers.interpreter("") == named


def test_option(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quality.py says that AutoRound is not there before it makes anything."""
    import quality

    monkeypatch.setattr(sys, "argv", ["quality.py", "--out", str(tmp_path / "out"), "--peers"])
    monkeypatch.setenv("AUTOROUND_PYTHON", str(program(tmp_path / "lacks", 1)))
    with pytest.raises(MobeError, match="no auto-round"):
        quality.main()
    assert not (tmp_path / "out").exists()


def test_command(peers: ModuleType, tmp_path: Path) -> None:
    tuning = peers.Tuning(steps=7, samples=3, length=64)
    line = peers.command(Path("py"), tmp_path, Path("text.json"), Path("o"), "q3_k_s", tuning)
    assert line[:3] == ["py", "-m", "auto_round"]
    given = dict(zip(line[3:-2:2], line[4:-2:2], strict=True))
    assert given["--scheme"] == given["--format"] == "gguf:q3_k_s" and given["--model"] == str(tmp_path)
    assert (given["--iters"], given["--nsamples"], given["--seqlen"]) == ("7", "3", "64")
    assert given["--ignore_layers"] == "mlp.gate"
    assert line[-1] == "--disable_trust_remote_code"


def test_pieces(peers: ModuleType) -> None:
    """All are of one length and longer than asked, and make up the text but for its end."""
    text = "".join(map(str, range(1000)))
    cut = peers.pieces(text, tokens=len(text) // 2, length=50)
    assert {len(piece) for piece in cut} == {115} and text.startswith("".join(cut))
    assert len(text) - 115 < len("".join(cut))
    assert peers.pieces("short", tokens=5, length=50) == []


def test_overlay(peers: ModuleType, tmp_path: Path) -> None:
    """A converter with one name of a pre-tokenizer for all, and everything else of the tree that it lies over."""
    package = tmp_path / "tree" / "conversion"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .base import TextModel\nkept = 1\n")
    (package / "base.py").write_text(
        "class TextModel:\n    def get_vocab_base_pre(self, tokenizer): raise ValueError\n"
    )
    peers.overlay(tmp_path / "root", tmp_path / "tree", "qwen2")
    code = "import conversion as c; print(c.kept, c.TextModel().get_vocab_base_pre(None))"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path / "root", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "qwen2"]
