"""``mobe-gguf inspect`` on files and directories."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models.editing import edit_config, edit_tensors
from parity.gguf_files import GgufFile, factorize, qwen3moe
from rich.console import Console

from mobe_gguf.cli import main
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.evaluate.inspect import describe
from mobe_gguf.export import Recipe, export
from mobe_gguf.export.report import size_table
from mobe_gguf.formats.contents import ListedTensor, original_params

Maker = Callable[..., Path]


def run(*args: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["inspect", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_biases_of_experts_are_counted_once() -> None:
    """gpt-oss: 97.9 % of the original was said of a plain file, each bias being taken for a basis."""
    entries = [
        ListedTensor("blk.0.ffn_down_exps.weight", "q8_0", (4, 64, 32), 1),
        ListedTensor("blk.0.ffn_down_exps.bias", "f32", (4, 64), 1),
        ListedTensor("blk.0.ffn_up_exps.bias", "f32", (4, 32), 1),
    ]
    assert original_params(entries) == sum(e.n_params for e in entries) == 4 * (64 * 32 + 64 + 32)
    entries += [
        ListedTensor("blk.0.ffn_up_exps.weight", "q8_0", (4, 32, 8), 1),
        ListedTensor("blk.0.ffn_up_basis.weight", "q8_0", (2, 8, 64), 1),
    ]
    assert original_params(entries) == 4 * (64 * 32 + 64 + 32) + 4 * 32 * 64


@pytest.mark.parametrize(
    ("n_bytes", "unit", "said"), [(151_397_600_000, "GB", "151.40"), (5_000_000, "MB", "5.00")]
)
def test_sizes_are_in_a_unit_that_fits(n_bytes: int, unit: str, said: str) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(size_table([ListedTensor("blk.0.ffn_up_exps.weight", "q8_0", (4, 64, 32), n_bytes)]))
    lines = console.export_text().splitlines()
    assert lines[0].split()[4] == unit and all(said in line.split() for line in lines[1:] if line.strip())


def test_checkpoint_and_its_gguf_agree(mobe: Maker, tmp_path: Path) -> None:
    source = mobe("deepseek_v3", r=32, g=2, by_row=True, activation="silu")
    export(
        source,
        tmp_path / "out.gguf",
        Recipe("q8_0", basis="q5_0", overrides=(("blk.2.ffn_up_e", "f16"),)),
        quiet=True,
    )
    a, b = describe(source), describe(tmp_path / "out.gguf")
    assert (a.kind, b.kind) == ("mobe", "gguf")
    for d in (a, b):
        assert (d.n_layer, d.n_expert, d.n_expert_used, d.n_embd, d.n_ff_exp) == (3, 8, 2, 64, 48)
        assert (d.activation, d.group_count, d.problems) == ("silu", 2, [])
        assert [layer.index for layer in d.layers] == [1, 2]
        for layer in d.layers:
            for p in (layer.gate, layer.up):
                assert (p.m, p.r, p.by_row) == (4, 32, True)
    assert a.n_params == b.n_params and a.original_params == b.original_params
    assert (a.layers[0].gate.type, a.layers[0].gate.basis_type, a.bits_per_weight) == ("f32", "f32", 32)
    assert (b.layers[1].gate.type, b.layers[1].up.type, b.layers[1].up.basis_type) == ("q8_0", "f16", "q5_0")
    assert a.n_bytes == (source / "model.safetensors").stat().st_size


def test_original(model: Maker) -> None:
    d = describe(model("mixtral"))
    assert (d.kind, d.arch, d.activation, d.n_params) == ("huggingface", "mixtral", None, d.original_params)
    classes = {row["class"]: row["tensors"] for row in d.as_json()["classes"]}
    assert classes["experts"] == 3 * 8 * 2 and classes["down"] == 3 * 8 and classes["embeddings"] == 2
    assert classes["attention"] == 3 * 4 and "A" not in classes


def test_recorded_errors(mobe: Maker, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(mobe("olmoe", dtype=torch.bfloat16), source)
    config = json.loads((source / "config.json").read_text())
    config["mobe"] = {"version": 1, "errors": {"0": {"gate": 0.0312, "up": 0.5}, "1": {"gate": 0.1}}}
    (source / "config.json").write_text(json.dumps(config))
    layers = describe(source).layers
    assert [(x.gate.error, x.up.error) for x in layers] == [(0.0312, 0.5), (0.1, None), (None, None)]
    code, out, _ = run(source)
    assert code == 0 and "0.0312" in out and "0.5000" in out


def test_tables_fit_a_hundred_columns(mobe: Maker, tmp_path: Path) -> None:
    source = mobe("deepseek_v2", r=32)
    export(source, tmp_path / "out.gguf", Recipe("q4_k_m"), quiet=True)
    for path in (source, tmp_path / "out.gguf"):
        code, out, err = run(path)
        assert (code, err) == (0, "")
        head, *tables = out.split("\n\n")
        assert len(tables) == 2 and all(len(line) <= 100 for table in tables for line in table.splitlines())
        assert "1-2" in tables[0] and "gate, up" in tables[0]
        assert "n 8, k 2, d 64, p 48" in head and "of the original's" in head


def test_json(mobe: Maker) -> None:
    code, out, _ = run(mobe("qwen3_moe", layers=(1,), projections=("up",), r=16), "--json")
    d = json.loads(out)
    assert code == 0 and d["kind"] == "mobe" and d["parameters"] < d["original_params"]
    assert [(x["gate"]["m"], x["up"]["m"]) for x in d["layers"]] == [(None, None), (None, 4), (None, None)]


def test_nothing_to_inspect(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no", "no such file"), (tmp_path, "config.json")):
        code, out, err = run(path)
        assert (code, out) == (1, "") and words in err
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    code, _, err = run(tmp_path / "x.gguf")
    assert code == 1 and "x.gguf" in err


def _without(name: str) -> Callable[[GgufFile], Any]:
    return lambda file: file.tensors.pop(name)


def _with(name: str, *shape: int, dtype: Any = np.float32) -> Callable[[GgufFile], Any]:
    return lambda file: file.tensors.update({name: np.ones(shape, dtype)})


def test_down(mobe: Maker, tmp_path: Path) -> None:
    source = mobe("deepseek_v2", r=32, by_row=True, projections=("up", "down"))
    export(source, tmp_path / "out.gguf", Recipe("q4_0", transform="bf16", down="f16"), quiet=True)
    for d in (describe(source), describe(tmp_path / "out.gguf")):
        assert [layer.factorized for layer in d.layers] == [["up", "down"]] * 2 and not d.problems
        assert (d.layers[0].down.m, d.layers[0].down.r, d.layers[0].down.by_row) == (4, 32, True)
        assert d.original_params - d.n_params == 2 * (
            2 * (8 * 48 * 64 - 8 * 48 * 32 - 4 * 32 * 64) - 8 * 4 * (32 + 64)
        )
    types = d.layers[0].up, d.layers[0].down
    assert [(p.type, p.basis_type) for p in types] == [("bf16", "q4_0"), ("f16", "q4_0")] and d.version == 2
    code, out, err = run(tmp_path / "out.gguf")
    rows = [line.split() for line in out.split("\n\n")[1].splitlines()]
    assert (code, err) == (0, "") and ["1-2", "down", "4", "32", "by", "row", "f16", "q4_0", "-"] in rows
    assert ["1-2", "gate", "-", "-", "-", "bf16", "-", "-"] in rows and "layout version 2" in out


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (_without("blk.0.ffn_gate_basis.mix"), "blk.0.ffn_gate_basis.mix"),
        (_without("blk.1.ffn_up_basis.weight"), "blk.1.ffn_up_basis.mix"),
        (_without("blk.1.ffn_up_exps.weight"), "blk.1.ffn_up_exps.weight"),
        (_with("blk.0.ffn_up_basis.weight", 4, 32, 60), "blk.0.ffn_up_basis.weight"),
        (_with("blk.0.ffn_up_basis.weight", 4, 31, 64), "blk.0.ffn_up_exps.weight"),
        (_with("blk.0.ffn_up_basis.mix", 8, 3), "blk.0.ffn_up_basis.mix"),
        (_with("blk.0.ffn_up_basis.mix", 8, 4, dtype=np.float16), "blk.0.ffn_up_basis.mix"),
        (lambda file: file.keys.update({"qwen3moe.mobe.group_count": 3}), "group_count"),
        (lambda file: file.keys.update({"qwen3moe.mobe.version": 9}), "mobe.version"),
        (lambda file: file.keys.update({"qwen3moe.mobe.version": 1}), "is 1, bases of down need 2"),
        (_without("blk.1.ffn_down_basis.weight"), "blk.1.ffn_down_basis.mix"),
        (_with("blk.0.ffn_down_basis.weight", 4, 32, 64), "blk.0.ffn_down_basis.weight"),
        (_with("blk.0.ffn_down_basis.weight", 4, 64, 31), "blk.0.ffn_down_exps.weight"),
        (_with("blk.0.ffn_down_basis.mix", 8, 4, 32), "blk.0.ffn_down_basis.mix"),
        (lambda file: file.keys.pop("qwen3moe.mobe.version"), "mobe.version"),
    ],
)
def test_contradictions(damage: Callable[[GgufFile], Any], name: str, tmp_path: Path) -> None:
    """Shown all the same, with what is wrong on stderr and exit code 1."""
    file = factorize(qwen3moe(), projections=ALL_PROJECTIONS)
    damage(file)
    code, out, err = run(file.write(tmp_path / "bad.gguf"))
    assert code == 1 and name in err and "qwen3moe" in out


def test_a_file_without_experts(tmp_path: Path) -> None:
    file = GgufFile("llama", {"llama.block_count": 1}, {"token_embd.weight": np.ones((4, 32), np.float32)})
    code, out, err = run(file.write(tmp_path / "dense.gguf"))
    assert (code, err) == (0, "") and "0 of them MoE" in out


def test_tensors_that_are_missing(model: Maker, mobe: Maker, tmp_path: Path) -> None:
    for number, source in enumerate((model("mixtral"), mobe("mixtral"))):
        path = Path(shutil.copytree(source, tmp_path / str(number)))
        gone = ("model.embed_tokens.weight", "model.layers.1.block_sparse_moe.gate.weight")
        edit_tensors(path, lambda tensors, gone=gone: [tensors.pop(name) for name in gone])
        code, out, err = run(path)
        assert code == 1 and "mixtral: 3 layers" in out
        assert err == "".join(f"{path}: tensor {name} is missing\n" for name in gone)


def test_what_only_the_export_would_find(model: Maker, tmp_path: Path) -> None:
    path = Path(shutil.copytree(model("olmoe"), tmp_path / "model"))
    edit_config(path, architectures=5)
    code, _, err = run(path)
    assert code == 1 and err.startswith(f"{path}: config.json: 'architectures' must be a list")
