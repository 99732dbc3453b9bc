"""A MoBE file that llama.cpp itself writes, from a model in memory or shard by shard, is the same model."""

from __future__ import annotations

import subprocess
from contextlib import closing

import numpy as np
import pytest

from mobe_gguf import runtime
from mobe_gguf.core.names import ALL_PROJECTIONS, key_version
from mobe_gguf.formats.gguf import read_gguf
from parity.gguf_files import factorize, qwen3moe
from parity.llama import logits, open_model

TOKENS = list(range(40, 60))


@pytest.mark.parametrize(
    "factors",
    [
        {"n_group": 2, "activation": "silu"},
        {"by_row": True},
        {"by_row": True, "projections": ALL_PROJECTIONS},
        {"projections": ("down",)},
        {"activation": "none", "projections": ALL_PROJECTIONS},
        # wider than the experts, of 48 rows
        {"activation": "none", "rank": 60, "n_basis": 2, "projections": ALL_PROJECTIONS},
        {"rank": 60, "n_group": 2, "projections": ALL_PROJECTIONS},
    ],
    ids=str,
)
def test_saved_model(factors, tmp_path):
    path, saved = factorize(qwen3moe(), **factors).write(tmp_path / "model.gguf"), tmp_path / "saved.gguf"
    with closing(open_model(path)) as model:
        from llama_cpp import llama_model_save_to_file

        llama_model_save_to_file(model.model, str(saved).encode())
    assert_same(path, saved)
    version = key_version("qwen3moe")
    assert read_gguf(saved).keys[version] == read_gguf(path).keys[version]


@pytest.mark.parametrize("factors", [{}, {"rank": 60}, {"rank": 60, "activation": "none"}], ids=str)
def test_split_file(factors, tmp_path):
    """Factors of one layer in different shards."""
    file = factorize(qwen3moe(), projections=ALL_PROJECTIONS, **factors)
    path = file.write(tmp_path / "model.gguf")
    split = [
        runtime.tool("llama-gguf-split"),
        "--split",
        "--split-max-tensors",
        "4",
        path,
        tmp_path / "shard",
    ]
    subprocess.run(split, check=True, capture_output=True)
    first, *others = sorted(tmp_path.glob("shard-*.gguf"))
    assert len(others) > 5
    assert_same(path, first)


def assert_same(path, other) -> None:
    expected, got = (logits(p, TOKENS, [len(TOKENS)])[len(TOKENS)] for p in (path, other))
    assert np.array_equal(expected, got)
