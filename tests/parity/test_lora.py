"""LoRA adapters of experts: one pair of factors for each expert of the model, or refused by name."""

from __future__ import annotations

import ctypes
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from parity.gguf_files import EXPERTS, FF_EXP, D, GgufFile, factorize, qwen3moe, uniform
from parity.llama import open_model

WEIGHT, RANK = "blk.0.ffn_up_exps.weight", 2
TOKENS = [5, 6, 7, 8, 9]


def adapter(path: Path, experts: int, columns: int = D, rows: int = FF_EXP) -> Path:
    """A LoRA of ``experts`` experts' up matrices, ``rows`` x ``columns``."""
    file = GgufFile("qwen3moe")
    file.keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(RANK)}
    file.tensors[f"{WEIGHT}.lora_a"] = uniform(1, experts, RANK, columns)
    file.tensors[f"{WEIGHT}.lora_b"] = uniform(2, experts, rows, RANK)
    return file.write(path)


def load(model: Path, lora: Path) -> tuple[bool, str]:
    """Whether ``lora`` is taken, and what llama.cpp logs as errors meanwhile.  Nothing is computed with it."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text.decode(errors="replace"))

    with closing(open_model(model)) as opened:
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        try:
            taken = llama_cpp.llama_adapter_lora_init(opened.model, str(lora).encode())
        finally:
            llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
        return bool(taken), "".join(errors)


def test_lora_of_the_experts_is_added(tmp_path: Path) -> None:
    import llama_cpp

    model, lora = qwen3moe().write(tmp_path / "model.gguf"), adapter(tmp_path / "lora.gguf", EXPERTS)
    assert load(model, lora) == (True, "")
    with closing(open_model(model)) as opened:
        opened.eval(TOKENS)
        before = opened.scores[: len(TOKENS)].copy()
        taken = llama_cpp.llama_adapter_lora_init(opened.model, str(lora).encode())
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(taken)
        assert llama_cpp.llama_set_adapters_lora(opened.ctx, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        opened.reset()
        opened.eval(TOKENS)
        assert np.abs(opened.scores[: len(TOKENS)] - before).max() > 1e-3


def test_lora_of_other_experts_is_refused(tmp_path: Path) -> None:
    """Of more experts than the model has; of fewer, what is no adapter's would be read."""
    model = qwen3moe().write(tmp_path / "model.gguf")
    taken, said = load(model, adapter(tmp_path / "lora.gguf", EXPERTS + 1))
    assert not taken
    assert f"tensor '{WEIGHT}' is of {EXPERTS} experts, its LoRA of {EXPERTS + 1} and {EXPERTS + 1}" in said


@pytest.mark.parametrize("rank", [32, D])
def test_lora_of_experts_that_are_factorized_is_refused(rank: int, tmp_path: Path) -> None:
    """Even where the shape of A is that of the matrix it was: what A multiplies is not what the LoRA was made for."""
    model = factorize(qwen3moe(), rank=rank, n_basis=4).write(tmp_path / "model.gguf")
    taken, said = load(model, adapter(tmp_path / "lora.gguf", EXPERTS))
    assert not taken and f"tensor '{WEIGHT}' is factorized" in said
