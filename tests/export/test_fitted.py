"""Factors that were fitted for a type are exported in it, and others are warned about."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from export.handmade import make_mobe
from mobe_gguf.cli import main
from mobe_gguf.core.errors import UsageError
from mobe_gguf.export import default_types


@pytest.fixture
def source(model: Callable[..., Path], tmp_path: Path) -> Path:
    return make_mobe(model("qwen3_moe"), tmp_path / "mobe", r=32, our_key=True)


def fitted(source: Path, basis: str | None, transform: str | None) -> Path:
    config = json.loads((source / "config.json").read_text())
    config["mobe"]["settings"] = dict(for_basis=basis, for_transform=transform)
    (source / "config.json").write_text(json.dumps(config))
    return source


def run(source: Path, *options: str) -> Any:
    out = source.with_name("out.gguf")
    return CliRunner().invoke(
        main, ["export", str(source), str(out), "--no-refit", "--dry-run", "--json", *options]
    )


def types(done: Any) -> dict[str, set[str]]:
    assert done.exit_code == 0, done.output
    return {row["class"]: set(row["types"]) for row in json.loads(done.stdout)["classes"]}


@pytest.mark.parametrize("options", [(), ("--quant", "q8_0")])
def test_what_is_no_name_of_a_type(options: tuple[str, ...], source: Path) -> None:
    done = run(fitted(source, ["q4_k"], "q4_k"), *options)  # type: ignore[arg-type]
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output
    assert 'mobe.settings.for_basis is ["q4_k"], expected the name of a ggml type' in done.stderr
    assert str(source) in done.stderr


def test_they_are_the_default(source: Path) -> None:
    assert default_types(fitted(source, "q4_k", "q4_k")) == ("q4_k_m", "q4_k", "q4_k")
    assert default_types(fitted(source, "iq3_s", "iq3_s")) == ("iq3_s", "iq3_s", "iq3_s")
    done = run(fitted(source, "q5_1", "q5_1"))
    found = types(done)
    assert found["A"] == found["B"] == {"q5_1"} and json.loads(done.stdout)["quant"] == "q5_1"
    assert "warning" not in done.stderr
    # one that is asked for is taken, and said to be another
    done = run(source, "--basis-type", "q8_0")
    assert types(done)["B"] == {"q8_0"} and types(done)["A"] == {"q5_1"}
    assert "warning: bases were fitted for q5_1 and are written as q8_0. Leave --quant out" in done.stderr
    assert json.loads(done.stdout)["notes"]


def test_others_are_warned_about(source: Path) -> None:
    fitted(source, "q4_k", "q4_k")  # rows of 64 and 32: q5_0
    done = run(source, "--quant", "q3_k")
    assert "warning: bases were fitted for q4_k and are written as q4_0; A's were" in done.stderr
    for same in ("q4_k", "q5_0", "f16"):
        assert "warning" not in run(source, "--quant", same).stderr, same


@pytest.mark.parametrize(
    ("basis", "transform", "words"),
    [
        (None, None, "does not say which type"),
        ("q4_k", None, "bases of q4_k and A's of no type, .*--quant q4_k --basis-type q4_k$"),
        ("q4_k", "q6_k", "--basis-type q4_k --transform-type q6_k$"),
        ("mxfp4", "mxfp4", "bases of mxfp4"),
        ("no such", "no such", "does not say which type"),
    ],
)
def test_without_one_type_quant_is_needed(
    source: Path, basis: str | None, transform: str | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        default_types(fitted(source, basis, transform))
    done = run(source)
    assert done.exit_code == 2 and "--quant is needed" in done.stderr
