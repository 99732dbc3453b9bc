"""gpt-oss as it is published: experts in MXFP4, two tensors for each fused one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobe_gguf.core.errors import MobeError
from mobe_gguf.models.checkpoint import Checkpoint

#: E2M1 by its fields: sign, two bits of exponent, one of mantissa.
CODES = [
    (-1) ** s * (m / 2 if e == 0 else (1 + m / 2) * 2 ** (e - 1))
    for s in (0, 1)
    for e in range(4)
    for m in (0, 1)
]


def packed(path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Give the model random experts in MXFP4; returns what they are, by plain tensors' names, matrices transposed."""
    tensors, truth = load_file(path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(5)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        n, columns, rows = tensors.pop(name).shape
        codes = torch.randint(16, (n, rows, columns // 32, 32), generator=generator)
        scales = torch.randint(120, 126, (n, rows, columns // 32), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
        values = torch.tensor(CODES)[codes] * 2.0 ** (scales[..., None] - 127)
        truth[name] = values.flatten(-2).mT
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "mxfp4"}
    }
    (path / "config.json").write_text(json.dumps(config))
    return path, truth


@pytest.fixture
def found(own_model: Callable[..., Path]) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    path, truth = packed(own_model("gpt_oss", hidden_size=64, intermediate_size=32))
    return Checkpoint(path), truth


def test_values(found: tuple[Checkpoint, dict[str, torch.Tensor]]) -> None:
    """Gate has the even columns of the transposed matrix, up the odd ones."""
    checkpoint, truth = found
    checkpoint.check_whole()
    both, down = (truth[f"model.layers.1.mlp.experts.{x}_proj"] for x in ("gate_up", "down"))
    for e in (0, 7):
        assert torch.equal(checkpoint.expert(1, "gate", e), both[e, :, ::2].T)
        assert torch.equal(checkpoint.expert(1, "up", e), both[e, :, 1::2].T)
        assert torch.equal(checkpoint.expert(1, "down", e), down[e].T)


def test_copies_are_single_experts_in_bf16(found: tuple[Checkpoint, dict[str, torch.Tensor]]) -> None:
    checkpoint, truth = found
    copies = {entry.name: entry for entry in checkpoint.copies([(1, "gate"), (1, "up")])}
    assert not [name for name in copies if name.endswith(("_blocks", "_scales"))]
    assert "model.layers.1.mlp.experts.0.up_proj.weight" not in copies
    entry = copies["model.layers.1.mlp.experts.3.down_proj.weight"]
    raw = bytearray().join(bytes(chunk) for chunk in entry.data())
    got = torch.frombuffer(raw, dtype=torch.bfloat16).view(entry.shape).float()
    assert torch.equal(got, truth["model.layers.1.mlp.experts.down_proj"][3].T)


def test_wrong_scales_are_named(own_model: Callable[..., Path]) -> None:
    path, _ = packed(own_model("gpt_oss", hidden_size=64, intermediate_size=32))
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MobeError, match=name):
        Checkpoint(path).check_whole()
