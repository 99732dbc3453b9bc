"""Files of second moments: read by the names of the GGUF tensors that they weigh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.moments import KEY, KEY_WEIGHS, VERSION, Moments

N, D, K = 3, 8, 2


@pytest.fixture
def path(tmp_path) -> Path:
    tensors = {
        "blk.0.attn_q.root": torch.rand(1, D, D).half(),
        "blk.0.attn_q.scale": torch.tensor(2.5),
        "blk.0.attn_q.tokens": torch.tensor([77], dtype=torch.int32),
        "blk.0.ffn_gate_exps.root": torch.rand(N, D, K).half(),
        "blk.0.ffn_gate_exps.rest": torch.rand(N, D).half(),
    }
    weighs = {f"blk.0.attn_{x}.weight": "blk.0.attn_q" for x in "qkv"}
    weighs |= {f"blk.0.ffn_{x}_exps.weight": "blk.0.ffn_gate_exps" for x in ("gate", "up")}
    save_file(
        tensors,
        tmp_path / "m",
        {KEY: json.dumps({"version": VERSION, "text": "x"}), KEY_WEIGHS: json.dumps(weighs)},
    )
    return tmp_path / "m"


def test_by_name(path):
    moments = Moments(path)
    key = moments.find("blk.0.attn_k.weight")
    assert key.root.shape == (1, D, D) and key.rest is None and key.root.dtype == torch.float32
    assert moments.stem("blk.0.attn_k.weight") == moments.stem("blk.0.attn_v.weight") == "blk.0.attn_q"
    assert moments.scale("blk.0.attn_v.weight") == 2.5
    assert moments.tokens("blk.0.attn_v.weight").tolist() == [77]
    assert moments.find("blk.9.attn_k.weight") is None and moments.shape("output.weight") is None
    assert "blk.0.ffn_up_exps.weight" in moments and len(moments.names) == 5
    up = moments.weight(0, "up", N, D)
    assert up.root.shape == (N, D, K) and up.rest.shape == (N, D)
    assert moments.directions(0, "up") == K and moments.nbytes(0, "up") == 4 * N * D * (K + 1)


def test_files_of_version_1(tmp_path):
    tensors = {
        "layers.2.gate_up.root": torch.rand(N, D, K).half(),
        "layers.2.gate_up.rest": torch.rand(N, D).half(),
        "layers.2.down.root": torch.rand(N, 5, 5).half(),
    }
    save_file(tensors, tmp_path / "m", {KEY: json.dumps({"version": 1})})
    moments = Moments(tmp_path / "m")
    assert sorted(moments.names) == [f"blk.2.ffn_{x}_exps.weight" for x in ("down", "gate", "up")]
    assert torch.equal(
        moments.find("blk.2.ffn_up_exps.weight").root, tensors["layers.2.gate_up.root"].float()
    )
    assert moments.weight(2, "down", N, 5).rest is None
    assert moments.scale("blk.2.ffn_up_exps.weight") is None is moments.tokens("blk.2.ffn_up_exps.weight")


@pytest.mark.parametrize("what", ["not finite", "shapes", "absent", "version", "names"])
def test_damaged(path, what):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        metadata = dict(f.metadata())
    if what == "not finite":
        tensors["blk.0.attn_q.root"][0, 1, 1] = torch.inf
    elif what == "shapes":
        tensors["blk.0.attn_q.rest"] = torch.rand(2, D)
    elif what == "absent":
        del tensors["blk.0.attn_q.root"]
    elif what == "version":
        metadata[KEY] = json.dumps({"version": 3})
    else:
        metadata[KEY_WEIGHS] = "[1, 2]"
    save_file(tensors, path, metadata)
    with pytest.raises(MobeError, match="make (it again|the file again|one with)"):
        Moments(path).find("blk.0.attn_k.weight")
