"""What transformers writes of a mixture, which depends on how the model object came about: both forms are read alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mobe_gguf.models.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 has one form alone"
)

SIZES = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
SIZES |= dict(intermediate_size=24, num_experts_per_tok=2, eos_token_id=1, pad_token_id=0, bos_token_id=1)
#: Attention of DeepSeek's, and its experts.
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
LATENT |= dict(moe_intermediate_size=24, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=0)
LATENT |= dict(n_group=1, topk_group=1)
#: Config class, what it has besides, and the key that its number of experts is saved under.
FAMILIES = {
    "Qwen3Moe": (dict(moe_intermediate_size=24, num_experts=4, head_dim=16), "num_local_experts"),
    "Qwen2Moe": (
        dict(moe_intermediate_size=24, num_experts=4, shared_expert_intermediate_size=16),
        "num_experts",
    ),
    "Olmoe": (dict(num_experts=4), "num_experts"),
    "Mixtral": (dict(num_local_experts=4), "num_local_experts"),
    "DeepseekV2": (LATENT, "n_routed_experts"),
    "DeepseekV3": (LATENT, "n_routed_experts"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_by_one_or_fused(family: str, tmp_path: Path) -> None:
    """A model that is built, or read one by one, is saved one by one; one that was read fused is saved fused."""
    more, key = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    auto = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config)
    model.save_pretrained(tmp_path / "each")
    said = json.loads((tmp_path / "each" / "config.json").read_text())
    assert (
        said[key] == 4
        and not ({"num_experts", "num_local_experts", "n_routed_experts"} - {key}) & said.keys()
    )
    config.save_pretrained(tmp_path / "given")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "given" / "model.safetensors", {"format": "pt"})
    auto.from_pretrained(tmp_path / "given").save_pretrained(tmp_path / "fused")
    each, fused = (load_file(tmp_path / form / "model.safetensors") for form in ("each", "fused"))
    assert any(".experts.0." in name for name in each) and not any("gate_up_proj" in name for name in each)
    assert any(name.endswith(".experts.gate_up_proj") for name in fused)
    assert not any(".experts.0." in name for name in fused)

    ours = [Checkpoint(tmp_path / form) for form in ("each", "fused")]
    for projection in ("gate", "up", "down"):
        stacks = [checkpoint.expert_stack(0, projection) for checkpoint in ours]
        assert stacks[0].shape[0] == 4 and torch.equal(*stacks)
