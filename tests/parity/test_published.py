"""The authors' published layout, family by family: the logits of the exported file against torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from export.published import PUBLISHED, make_published

from mobe_gguf.export import Recipe, export
from parity.bailing import bailing_logits
from parity.llama import logits, nmse
from parity.reference import multiply_out, transformers_logits

#: As in ``test_parity``.
LIMIT = 1e-10
TOKENS = np.random.default_rng(0).integers(384, size=33).tolist()


def truth(dense: Path) -> np.ndarray:
    """Logits of an ordinary checkpoint by torch."""
    config = json.loads((dense / "config.json").read_text())
    if config["model_type"] == "bailing_moe":
        return bailing_logits(dense, TOKENS)
    return transformers_logits(dense, TOKENS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(name, tmp_path):
    original, mobe = make_published(name, tmp_path)
    assert "mobe" not in json.loads((mobe / "config.json").read_text())
    if name == "ling":  # what config.json says of the head holds for the reference, too
        config = json.loads((original / "config.json").read_text()) | {"norm_head": True}
        (original / "config.json").write_text(json.dumps(config))
    dense = multiply_out(mobe, tmp_path / "dense", original)
    export(mobe, tmp_path / "mobe.gguf", Recipe("f32"), quiet=True)
    got = logits(tmp_path / "mobe.gguf", TOKENS, (33, 1))
    errors = {step: nmse(truth(dense), got[step]) for step in got}
    print(errors)
    assert max(errors.values()) < LIMIT, errors
