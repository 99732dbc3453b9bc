"""Changes of a tiny model on disk."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path, change):
    """Apply ``change(dict of tensors)`` to a single-file model."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def to_fp8(w, block):
    """``(w in e4m3, its scales)``, as DeepSeek-V3 is published: one scale a block of rows x columns."""
    scale = torch.nn.functional.max_pool2d(w.abs()[None], block, stride=block, ceil_mode=True)[0] / 448.0
    full = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: w.shape[0], : w.shape[1]]
    return (w / full).to(torch.float8_e4m3fn), scale
