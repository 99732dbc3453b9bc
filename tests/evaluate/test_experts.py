"""The experts that the runtime chooses are those that transformers chooses; how many tokens keep them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobe_gguf.core import resources
from mobe_gguf.core.errors import UsageError
from mobe_gguf.evaluate import EvalSettings, compare
from mobe_gguf.evaluate.experts import ExpertsKept
from mobe_gguf.runtime.choices import choices

MODEL = resources.path("models") / "tiny-moe"
CTX = 256


def test_choices_are_those_of_transformers(files: dict[str, Path], text: Path):
    """All layers, all tokens; rounding to float16 decides some ties."""
    found = choices(files["f16"], text, CTX, 2, 1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(MODEL)(text.read_text().removesuffix("\n"))["input_ids"]
    k = model.config.num_experts_per_tok
    with torch.inference_mode():
        logits = model(torch.tensor(ids[: 2 * CTX]).view(2, CTX), output_router_logits=True).router_logits
    assert sorted(found) == list(range(len(logits)))
    for layer, scores in enumerate(logits):
        expected = scores.topk(k).indices.sort().values.view(2, CTX, k).numpy()
        assert np.mean((found[layer] == expected).all(-1)) > 0.99
        assert found[layer].shape == expected.shape


def test_fewer_bits_keep_fewer(files: dict[str, Path], text: Path):
    rows = compare(
        files["f16"], [files["f16"], files["q8_0"], files["q2_k"]], text, EvalSettings(CTX, 4, experts=True), quiet=True
    )  # fmt: skip
    same, much, little = (row.kept for row in rows)
    assert set(same.values()) == {1.0}
    for layer, share in much.items():
        assert 0.9 < share <= 1 and 0.3 < little[layer] < share


def test_the_evaluated_half_counts(files: dict[str, Path], text: Path):
    one = ExpertsKept(files["f16"], text, CTX, 2, 1)
    before = one.shares(files["f16"])
    for found in one.reference.values():
        found[:, : CTX // 2] = -1
    assert one.shares(files["f16"]) == before
    for found in one.reference.values():
        found[:, CTX // 2] = -1
    assert all(share < 1 for share in one.shares(files["f16"]).values())


def test_no_routed_experts(files: dict[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mobe_gguf.evaluate.experts.choices", lambda *_: {})
    with pytest.raises(UsageError, match="has no routed experts"):
        ExpertsKept(files["f16"], text, CTX, 2, 1)
