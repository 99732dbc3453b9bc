"""Block-scaled FP8, as DeepSeek-V3 is published: the same as its dequantized values give."""

from __future__ import annotations

import json

import pytest
import torch
from models.editing import edit_config, edit_tensors, to_fp8

from mobe_gguf.calibrate.moments import collect
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.checkpoint import Checkpoint


@pytest.mark.parametrize("memory", [None, 1])
def test_fp8(memory, own_model, text, tmp_path):
    path = own_model("deepseek_v3")
    edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})

    def quantize(tensors):
        for name in [n for n in tensors if "_proj" in n]:
            tensors[name], tensors[name + "_scale_inv"] = to_fp8(tensors[name], 32)

    edit_tensors(path, quantize)
    collect(path, text, tmp_path / "fp8", ctx=32, chunks=4, keep=1, memory=memory, quiet=True)
    source = Checkpoint(path)
    plain = {n: source.matrix(n) for n in source.names if n + "_scale_inv" in source}

    def dequantize(tensors):
        for name, w in plain.items():
            tensors[name] = w.clone()
            del tensors[name + "_scale_inv"]

    edit_tensors(path, dequantize)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    collect(path, text, tmp_path / "plain", ctx=32, chunks=4, keep=1, memory=memory, quiet=True)
    one, other = Moments(tmp_path / "fp8"), Moments(tmp_path / "plain")
    assert set(one.names) == set(other.names) and len(plain) > 50
    for name in one.names:
        a, b = one.find(name).root, other.find(name).root
        assert torch.allclose(a @ a.mT, b @ b.mT, atol=1e-2), name
