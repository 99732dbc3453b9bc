"""``mobe-gguf eval`` as a user types it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mobe_gguf.cli import main
from mobe_gguf.evaluate import tool
from mobe_gguf.export import Recipe, export

from .conftest import MODEL

QUICK = ("--ctx", "64", "--chunks", "4", "-t", "1")


def run(*arguments: str | os.PathLike[str]) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)], catch_exceptions=False)


def test_table_and_plot(files: dict[str, Path], tmp_path: Path):
    result = run(files["f16"], files["q2_k"], files["mobe"], *QUICK, "--plot", tmp_path / "kl.png")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["f16", "plain"],
        ["q2_k", "plain"],
        ["mobe", "MoBE"],
    ]
    assert "(124 tokens of 4 chunks of 64)" in result.stdout
    assert "heldout.txt: the project's held-out text; for any model but its tiny one" in result.stderr
    assert "[8/12]" in result.stderr and "q2_k.gguf: KL divergence" in result.stderr
    assert (tmp_path / "kl.png").stat().st_size > 10_000


def test_json(files: dict[str, Path], text: Path):
    result = run(files["f16"], files["q8_0"], *QUICK, "--text", text, "--json", "-q")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert found["text"] == str(text) and found["chunks"] == 4 and found["ctx"] == 64
    (q8_0,) = found["files"]
    assert 0 < q8_0["kl_divergence"]["value"] < 0.01 and q8_0["bytes"] == files["q8_0"].stat().st_size


def test_card(files: dict[str, Path], text: Path, tmp_path: Path):
    file = tmp_path / "mobe.gguf"
    export(MODEL, file, Recipe("q8_0"), allow_dense=True, card=True, quiet=True)
    command = (files["f16"], files["q2_k"], file, *QUICK, "--text", text, "--card")
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    assert (
        f"{files['q2_k']}: has no card" in result.stderr and f"{file}: noted in {tmp_path}" in result.stderr
    )
    (line,) = [x for x in (tmp_path / "README.md").read_text().splitlines() if "KL divergence" in x]
    kl = json.loads(result.stdout)["files"][1]["kl_divergence"]["value"]
    assert line.startswith(f"- `mobe.gguf`: KL divergence {kl:.5f}"[:-2])
    assert "from f16.gguf, same likeliest token 9" in line and line.endswith("on 124 tokens of text.txt.")
    (tmp_path / "README.md").write_text("mine")
    result = run(*command)
    assert result.exit_code == 1 and "[" not in result.stderr and "--card: beside " in result.stderr


def test_a_late_failure_shows_what_was_done(files: dict[str, Path], text: Path, tmp_path: Path):
    broken = tmp_path / "broken.gguf"
    name = b"blk.1.attn_k.weight"
    broken.write_bytes(files["q2_k"].read_bytes().replace(name, name.replace(b"_k", b"_x")))
    result = run(files["f16"], files["q8_0"], broken, *QUICK, "--text", text, "-q")
    assert result.exit_code == 1
    assert "\nq8_0 " in result.stdout
    assert "broken.gguf" in result.stderr and "tensor 'blk.1.attn_k.weight' not found" in result.stderr


def test_wrong_usage(files: dict[str, Path], text: Path, tmp_path: Path):
    assert run(files["f16"]).exit_code == 2
    assert run(files["f16"], files["q8_0"], "--plot", tmp_path / "kl.jpeg").exit_code == 2
    result = run(files["f16"], files["q8_0"], "--text", text, "--ctx", "64", "--chunks", "100000")
    assert result.exit_code == 2 and "Give a longer --text" in result.stderr


def test_placement_is_llama_cpps(files: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch):
    commands = []
    real = tool.run

    def spy(name: str, *arguments: str, on_stdout=None) -> tool.Finished:
        commands.append(arguments)
        return real(name, *arguments, on_stdout=on_stdout)

    monkeypatch.setattr(tool, "run", spy)
    placed = ("-ngl", "0", "--cpu-moe", "--n-cpu-moe", "2")
    result = run(files["f16"], files["q8_0"], *QUICK, "--text", text, *placed, "-q")
    assert result.exit_code == 0, result.output
    assert len(commands) == 2 and all(" ".join(placed) in " ".join(command) for command in commands)


def test_layers_on_the_gpu(tmp_path: Path):
    """Known before anything is opened."""
    for value in ("foo", "-1", "1.5", ""):
        result = run(tmp_path / "a.gguf", tmp_path / "b.gguf", "-ngl", value)
        assert result.exit_code == 2
        assert f"--gpu-layers {value}: expected a number of layers, auto or all" in result.stderr
    for value in ("99", "auto", "all"):
        result = run(tmp_path / "a.gguf", tmp_path / "b.gguf", "-ngl", value)
        assert result.exit_code == 1 and "--gpu-layers" not in result.stderr


def test_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mobe_gguf.evaluate.compare", stop)
    result = run(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert result.exit_code == 130 and "stopped; 0 of 1 files were done" in result.stderr
