"""llama.cpp's own programs, and a script of three lines, on a MoBE file as a user has it: quantized, default settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from export.handmade import make_mobe

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.formats.imatrix import ImatrixFile


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """The shipped model's vocabulary and attention with random experts: its text is noise, but text."""
    folder = tmp_path_factory.mktemp("tools")
    mobe = make_mobe(resources.path("models") / "tiny-moe", folder / "mobe", m=6)
    export(mobe, folder / "mobe.gguf", Recipe(parse_quant("q4_k")), quiet=True)
    return folder / "mobe.gguf"


def run(*command: str | os.PathLike[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """With no variable set that could help to find the runtime."""
    env = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, errors="replace", env=env, timeout=120
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def test_completion(gguf):
    prompt = "And God said"
    options = ("-n", "12", "-c", "64", "-t", "2", "--temp", "0", "-no-cnv", "--ignore-eos")
    out = run(runtime.tool("llama-completion"), "-m", gguf, "-p", prompt, *options).stdout
    assert out.strip().startswith(prompt) and len(out.strip()) > len(prompt) + 5, out


def test_cli(gguf):
    options = ("-n", "12", "-c", "256", "-t", "2", "--temp", "0", "--single-turn", "--ignore-eos")
    out = run(runtime.tool("llama-cli"), "-m", gguf, "-p", "And God said", *options).stdout
    assert "And God said" in out, out


def test_perplexity(gguf, tmp_path):
    """The prompt's path, with several sequences in a batch."""
    text = tmp_path / "text.txt"
    text.write_text(
        (resources.path("models") / "heldout.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8"
    )
    perplexity(gguf, text)


@pytest.mark.parametrize(("m", "quant"), [(6, "q4_k"), (1, "q4_0")])
def test_perplexity_without_activation(tmp_path, m, quant):
    """Where a batch asks for no output, the last layer's experts get no tokens: ggml's own operators have to bear that.

    One basis in q4_0 is a matrix that llama.cpp repacks.
    """
    mobe = make_mobe(resources.path("models") / "tiny-moe", tmp_path / "mobe", m=m, activation="none")
    export(mobe, tmp_path / "mobe.gguf", Recipe(parse_quant(quant)), quiet=True)
    text = tmp_path / "text.txt"
    text.write_text(
        (resources.path("models") / "heldout.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8"
    )
    perplexity(tmp_path / "mobe.gguf", text)


@pytest.mark.parametrize("m", [1, 3])
def test_imatrix_of_bases_that_are_repacked_otherwise(tmp_path, m):
    """The operator, which llama-imatrix watches, cannot read them then."""
    mobe = make_mobe(resources.path("models") / "tiny-moe", tmp_path / "mobe", m=m, activation="none")
    export(mobe, tmp_path / "mobe.gguf", Recipe(parse_quant("q4_0")), quiet=True)
    text = resources.path("models") / "calibration.txt"
    options = ("-c", "64", "--chunks", "2", "-t", "2", "-o", tmp_path / "imatrix.gguf")
    run(runtime.tool("llama-imatrix"), "-m", tmp_path / "mobe.gguf", "-f", text, *options)
    found = ImatrixFile(tmp_path / "imatrix.gguf")
    entry = found.entry("blk.0.ffn_gate_basis.weight")
    assert (
        entry is not None
        and entry.sums.shape == (m, 256)
        and found.entry("blk.3.ffn_up_basis.mix") is not None
    )


def perplexity(gguf: Path, text: Path) -> None:
    options = ("-c", "64", "-b", "128", "-ub", "32", "-t", "2")
    done = run(runtime.tool("llama-perplexity"), "-m", gguf, "-f", text, *options)
    # not its "Final estimate": the program may end, as an unpatched one does, before its log's last lines are written
    running = re.findall(r"\[\d+\]([0-9.]+),", done.stdout)
    assert len(running) >= 5 and all(float(value) > 1 for value in running), done.stdout


def test_scripting(gguf):
    script = f"from llama_cpp import Llama; print(Llama({str(gguf)!r}, verbose=False)('And God said'))"
    answer = run(sys.executable, "-c", script).stdout
    text = re.search(r"'text': (['\"])(.*?)\1", answer)
    assert text and text[2], answer
