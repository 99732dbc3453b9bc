"""MoBE checkpoints in the layout that the method's authors publish, one for each of their four families.

From their code (github.com/inclusionAI/MoBE, ``get_mobe.py``): ``save_pretrained`` of a model class of their own, so
``architectures`` names that class; ``num_B`` and ``activation`` in config.json; bfloat16, shards with an index; no
code beside the weights, whatever ``auto_map`` says; r = p.  config.json is as transformers 4 writes it, and says of
the original what is no longer true: quantized to FP8, a multi-token-prediction layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import make_model

from export.handmade import make_mobe
from mobe_gguf.models.families import family_of

_FP8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])
_DEEPSEEK = dict(
    auto_map={
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    quantization_config=_FP8,
    moe_layer_freq=1,
    ep_size=1,
    seq_aux=True,
)

#: Family -> ``tiny``'s builder, what config.json has beside the model's own keys, what the factors are.
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3": ("qwen3_moe", dict(architectures=["Qwen3MoBEForCausalLM"]), dict(activation="silu")),
    "deepseek_v3": (
        "deepseek_v3",
        _DEEPSEEK | dict(architectures=["DeepseekV3MoBEForCausalLM"], num_nextn_predict_layers=1),
        dict(activation="tanh"),
    ),
    "kimi_k2": (
        "deepseek_v3",
        _DEEPSEEK
        | dict(model_type="kimi_k2", architectures=["KimiK2MoBEForCausalLM"], num_nextn_predict_layers=0),
        dict(activation="silu", g=2),
    ),
    "ling": (
        "bailing_moe",
        dict(
            architectures=["BailingMoBEForCausalLM"],
            auto_map={
                "AutoConfig": "configuration_bailing_moe.BailingMoeConfig",
                "AutoModelForCausalLM": "modeling_bailing_moe.BailingMoeForCausalLM",
            },
            norm_head=True,
            rope_scaling=None,
        ),
        dict(activation="silu"),
    ),
}


def make_published(name: str, folder: Path, **options: Any) -> tuple[Path, Path]:
    """``(original, mobe)`` of one of PUBLISHED below ``folder``; ``options`` as for ``make_mobe``."""
    family, said, factors = PUBLISHED[name]
    groups = dict(n_group=1, topk_group=1) if name == "kimi_k2" else {}
    original = make_model(family, folder / "original", seed=5, dtype=torch.bfloat16, **groups)
    config = _as_transformers_4(json.loads((original / "config.json").read_text()))
    (original / "config.json").write_text(json.dumps(config))
    mobe = make_mobe(original, folder / "mobe", dtype=torch.bfloat16, **(factors | options))
    config = json.loads((mobe / "config.json").read_text()) | said
    (mobe / "config.json").write_text(json.dumps(config, indent=2))
    shard(mobe, 3)
    return original, mobe


def make_wab(
    original: Path, folder: Path, *, m: int = 4, r: int | None = None, g: int = 1, activation: str = "silu"
) -> Path:
    """Random training output in ``folder``, after which the experts of ``original`` (float32, one file) are changed.

    Named and laid out as ``train.py`` and ``train_group.py`` do it.  The factors give the experts exactly, but for the
    rounding of sigma to float16: A is scaled such that the product has unit variance, and the experts are the product
    at a standard deviation of about 0.1.
    """
    folder.mkdir(parents=True)
    config = json.loads((original / "config.json").read_text())
    family = family_of(config)
    n, p, d = family.n_expert(config), family.n_ff_exp(config), family.n_embd(config)
    r, f = r or p, {"silu": torch.nn.functional.silu, "tanh": torch.tanh}[activation]
    tensors, random = load_file(original / "model.safetensors"), torch.Generator().manual_seed(11)
    for layer in family.moe_layers(config):
        for projection in ("gate", "up"):
            a = torch.randn(n, p, r, generator=random)
            b = torch.randn(g, m // g, r, d, generator=random)
            w = torch.randn(g, n // g, m // g, generator=random) * 2
            u = torch.einsum("gej,gjrd->gerd", torch.softmax(w, 2), b).reshape(n, r, d)
            a /= (a @ f(u)).std()
            for group in range(g):
                state = {"A_params": a.chunk(g)[group], "B_params": b[group], "w_params": w[group]}
                suffix = f"_group{group}" if g > 1 else ""
                name = f"model_layers_{layer}_mlp_{projection}_proj{suffix}_WAB.pth"
                torch.save({key: value.clone() for key, value in state.items()}, folder / name)
            for e, matrix in enumerate(0.1 * (a @ f(u))):
                tensors[family.expert_weight(layer, e, projection)] = matrix.contiguous()
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    return folder


def _as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", None) or config["num_experts"]
    return config | dict(transformers_version="4.52.4", use_cache=True)


def shard(path: Path, n: int) -> None:
    """Put the tensors of ``model.safetensors`` into ``n`` files with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(n):
        file = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::n]}, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::n], file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
