"""Without an activation: which files go by ggml's own products, and that these give what the operator gives."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.core.names import ALL_PROJECTIONS
from parity import gguf_files
from parity.gguf_files import EXPERTS, FF_EXP, HEADS, D, GgufFile, factorize, qwen3moe, uniform
from parity.llama import logits, nmse

#: Normalized squared error of the logits: the same products, added in another order.
LIMIT = 1e-10

TOKENS, STEPS = list(range(40, 73)), (33, 3, 1)


def llama4() -> GgufFile:
    """Weighs an expert's input, not its output; shared experts."""
    file = renamed(qwen3moe(), "llama4")
    file.keys["llama4.interleave_moe_layer_step"] = 1
    for layer in range(gguf_files.LAYERS):
        for name in ("attn_q_norm", "attn_k_norm"):
            del file.tensors[f"blk.{layer}.{name}.weight"]
        for i, (name, rows, columns) in enumerate(
            (("gate", FF_EXP, D), ("up", FF_EXP, D), ("down", D, FF_EXP))
        ):
            weight = uniform(4000 + 10 * layer + i, rows, columns, std=columns**-0.5)
            file.tensors[f"blk.{layer}.ffn_{name}_shexp.weight"] = weight
    return file


def gpt_oss() -> GgufFile:
    """Experts with biases."""
    file = renamed(qwen3moe(), "gpt-oss")
    file.keys["gpt-oss.attention.sliding_window"] = 128
    for layer in range(gguf_files.LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_q_norm", "attn_k_norm"):
            del file.tensors[f"{block}.{name}.weight"]
        file.tensors[f"{block}.post_attention_norm.weight"] = file.tensors.pop(f"{block}.ffn_norm.weight")
        shapes = {
            "attn_sinks.weight": (HEADS,),
            "attn_output.bias": (D,),
            "ffn_gate_inp.bias": (EXPERTS,),
            "ffn_gate_exps.bias": (EXPERTS, FF_EXP),
            "ffn_up_exps.bias": (EXPERTS, FF_EXP),
            "ffn_down_exps.bias": (EXPERTS, D),
        }
        for i, (name, shape) in enumerate(shapes.items()):
            file.tensors[f"{block}.{name}"] = uniform(5000 + 10 * layer + i, *shape, std=0.5)
    return file


def renamed(file: GgufFile, arch: str) -> GgufFile:
    old, file.arch = file.arch, arch
    file.keys = {re.sub(rf"^{old}\.", f"{arch}.", key): value for key, value in file.keys.items()}
    return file


def by_rows(file: GgufFile) -> GgufFile:
    """The same numbers as a mix row by row, which is the operator's; changes ``file`` and returns it."""
    for name in [name for name in file.tensors if name.endswith(".mix")]:
        rows = file.tensors[name.replace(".mix", ".weight")].shape[1]
        file.tensors[name] = np.repeat(file.tensors[name][:, :, None], rows, axis=2)
    return file


def a_basis_each(file: GgufFile, entry: float = 0.0) -> GgufFile:
    """Mixes by the identity, as the SVD of each expert is; ``entry``: what stands beside a one.  Changes ``file`` and returns it."""
    for name in [name for name in file.tensors if name.endswith(".mix")]:
        file.tensors[name] = np.eye(EXPERTS, dtype=np.float32)
        file.tensors[name][2, 3] = entry
    return file


def operators(path: Path, tmp_path: Path) -> dict[str, set[str]]:
    """Names of the ggml operators that read each factor, of all graphs that a text takes, by the scheduler's own list."""
    text = tmp_path / "text.txt"
    text.write_text((resources.path("models") / "heldout.txt").read_text(encoding="utf-8")[:600], "utf-8")
    options = ["-c", "32", "-b", "32", "-t", "1", "-v"]
    done = subprocess.run(
        [runtime.tool("llama-perplexity"), "-m", path, "-f", text, *options],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"GGML_SCHED_DEBUG": "2"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, set[str]] = {}
    operator = ""
    for line in (done.stdout + done.stderr).splitlines():
        if node := re.search(r"node #\s*\d+ \(\s*(\w+)\)", line):
            operator = node[1]
        # names are cut after 20 characters
        for factor in re.findall(r"blk\.\d\.(ffn_\w+_(?:exps|basis))", line[line.find("use=") :]):
            found.setdefault(factor, set()).add(operator)
    return found


@pytest.mark.parametrize(
    ("factors", "linear"),
    [
        ({"activation": "none"}, True),
        ({"activation": "none", "n_group": 2}, False),
        ({"activation": "none", "by_row": True}, False),
        ({"activation": "silu"}, False),
    ],
    ids=str,
)
def test_operators_in_use(factors, linear, tmp_path):
    path = factorize(qwen3moe(), projections=ALL_PROJECTIONS, **factors).write(tmp_path / "model.gguf")
    found = operators(path, tmp_path)
    for projection in ALL_PROJECTIONS:
        assert found[f"ffn_{projection}_exps"] == {"MUL_MAT_ID"}
        # the mix goes by the basis's name here
        assert found[f"ffn_{projection}_basis"] == ({"MUL_MAT", "CUSTOM"} if linear else {"MOBE_PROJ"})


@pytest.mark.parametrize("entry", [0.0, 1e-30])
def test_operators_of_a_basis_each(entry, tmp_path):
    """Of gate and up only the bases of the experts in use are read; one other number in the mix, and all are."""
    file = factorize(qwen3moe(), projections=ALL_PROJECTIONS, activation="none", n_basis=EXPERTS)
    found = operators(a_basis_each(file, entry).write(tmp_path / "model.gguf"), tmp_path)
    for projection in ALL_PROJECTIONS:
        own = entry == 0.0 and projection != "down"
        assert found[f"ffn_{projection}_basis"] == ({"MUL_MAT_ID"} if own else {"MUL_MAT", "CUSTOM"})


@pytest.mark.parametrize("make", [qwen3moe, llama4, gpt_oss], ids=lambda make: make.__name__)
def test_the_operator_gives_the_same_of_a_basis_each(make, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "LAYERS", 4)
    file = a_basis_each(
        factorize(make(), activation="none", n_basis=EXPERTS, projections=ALL_PROJECTIONS),
    )
    got = logits(file.write(tmp_path / "scalar.gguf"), TOKENS, STEPS)
    want = logits(by_rows(file).write(tmp_path / "rows.gguf"), TOKENS, STEPS)
    assert max(nmse(want[step], got[step]) for step in STEPS) < LIMIT


@pytest.mark.parametrize("make", [qwen3moe, llama4, gpt_oss], ids=lambda make: make.__name__)
@pytest.mark.parametrize("n_basis", [1, 4, 19])
def test_the_operator_gives_the_same(n_basis, make, tmp_path, monkeypatch):
    """19: of a prompt seven bases are summed at a time, and five are left."""
    monkeypatch.setattr(gguf_files, "LAYERS", 4)  # every fourth of llama4 is another attention
    file = factorize(make(), activation="none", n_basis=n_basis, projections=ALL_PROJECTIONS)
    got = logits(file.write(tmp_path / "scalar.gguf"), TOKENS, STEPS)
    want = logits(by_rows(file).write(tmp_path / "rows.gguf"), TOKENS, STEPS)
    assert max(nmse(want[step], got[step]) for step in STEPS) < LIMIT


def test_many_layers_of_many_bases(tmp_path, monkeypatch):
    """llama.cpp reckons with eight nodes for each tensor; the sums of 127 bases, 16 at a time, take more."""
    monkeypatch.setattr(gguf_files, "LAYERS", 16)
    file = factorize(qwen3moe(), activation="none", n_basis=127, projections=("down",))
    got = logits(file.write(tmp_path / "scalar.gguf"), TOKENS, STEPS)
    want = logits(by_rows(file).write(tmp_path / "rows.gguf"), TOKENS, STEPS)
    assert max(nmse(want[step], got[step]) for step in STEPS) < LIMIT
