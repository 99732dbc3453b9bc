"""What gathering takes at its peak: a fifth of the model or twice its largest layer, whichever is more."""

from __future__ import annotations

import json
from pathlib import Path

import peak
import pytest
import tiny
import torch

from mobe_gguf.formats.safetensors import Entry, write_safetensors
from mobe_gguf.models.checkpoint import Checkpoint

SIZES = dict(
    hidden_size=512, moe_intermediate_size=512, num_experts=24, num_experts_per_tok=4, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, intermediate_size=512,
)  # fmt: skip

SCRIPT = """
import sys
from pathlib import Path
import peak
from mobe_gguf.calibrate.moments import collect
model, small, text, out, memory, keep = sys.argv[1:]
collect(Path(small), Path(text), Path(out + ".small"), ctx=64, chunks=8, quiet=True)  # what torch takes once
with peak.watched() as taken:
    collect(Path(model), Path(text), Path(out), ctx=64, chunks=16, memory=int(memory), keep=float(keep), quiet=True)
print(taken[0])
"""


@pytest.fixture(scope="module")
def large(model, tmp_path_factory) -> Path:
    """A checkpoint of 236 MB, written quickly: all matrices are pieces of the same random numbers."""
    path = tmp_path_factory.mktemp("large") / "model"
    shapes = tiny.build("qwen3_moe", **SIZES | {"num_hidden_layers": 1})
    shapes.to(torch.bfloat16).save_pretrained(path)
    tiny._tokenizer().save_pretrained(path)
    source = Checkpoint(path)
    entries = []
    for name in source.names:
        tensor = source.get(name).clone()
        layers = range(SIZES["num_hidden_layers"]) if ".layers.0." in name else [0]
        entries += [Entry.of(name.replace(".layers.0.", f".layers.{i}."), tensor) for i in layers]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": SIZES["num_hidden_layers"]}))
    next(path.glob("*.safetensors")).unlink()
    write_safetensors(path / "model.safetensors", entries, {"format": "pt"})
    return path


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_peak(share, large, model, text, tmp_path):
    """With a quarter of what the goal allows, too: one expert at a time."""
    size = (large / "model.safetensors").stat().st_size
    layer = size / SIZES["num_hidden_layers"]
    limit = int(share * max(size / 5, 2 * layer))
    taken = int(peak.run(SCRIPT, large, model("qwen3_moe"), text, tmp_path / "m", limit, 0.9))
    assert taken < limit + 15e6, (size, limit)
