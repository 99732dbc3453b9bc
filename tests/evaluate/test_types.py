"""Files in a type that the runtime has and PyPI's gguf has not: every command reads them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from mobe_gguf import runtime
from mobe_gguf.cli import main
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.runtime import ggml


@pytest.fixture(scope="module")
def q2_0(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q2_0") / "q2_0.gguf"
    command = [runtime.tool("llama-quantize"), files["f16"], path, "Q2_0", "2"]
    subprocess.run(command, check=True, capture_output=True)
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_its_head(q2_0: Path) -> None:
    info = read_gguf(q2_0).tensors["blk.0.ffn_gate_exps.weight"]
    assert info.type == "q2_0" and info.n_bytes == ggml.type_info("q2_0").tensor_bytes(info.shape)


def test_inspect_and_verify(q2_0: Path) -> None:
    found = json.loads(run("inspect", q2_0, "--json"))
    assert any("q2_0" in row["types"] for row in found["classes"])
    assert json.loads(run("verify", q2_0, "--json", "-q"))["whole"]


def test_eval(files: dict[str, Path], q2_0: Path, text: Path) -> None:
    command = (
        "eval",
        files["f16"],
        q2_0,
        "--ctx",
        64,
        "--chunks",
        4,
        "-t",
        1,
        "--text",
        text,
        "--json",
        "-q",
    )
    (row,) = json.loads(run(*command))["files"]
    assert row["kl_divergence"]["value"] > 0.1
