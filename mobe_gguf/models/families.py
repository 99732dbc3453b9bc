"""The model families: their keys in config.json and their tensor names.

Each has one :class:`Family` declaration; no other module depends on a model type.  To add a family, add a declaration to
:data:`FAMILIES` and a tiny model of it to ``tests/tiny.py``.

Sources: the ``configuration_*.py`` and ``modeling_*.py`` of transformers 4.57 and 5, and the remote code of
the DeepSeek, Kimi-K2 and Ling (Bailing) repositories.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.models.family import (
    Config,
    Family,
    after_dense_layers,
    after_leading_dense,
    between,
    by_kind,
    by_layer_list,
    by_sparse_step,
    by_step_or_list,
)

__all__ = [
    "BY_NAME",
    "EMBEDDINGS",
    "FAMILIES",
    "OTHERS",
    "Config",
    "Family",
    "family_of",
    "known_model_types",
    "layer_in",
]

_GRANITE = MappingProxyType({"gate_up": "input_linear.weight", "down": "output_linear.weight"})
_W123 = MappingProxyType({"gate": "w1", "up": "w3", "down": "w2"})

FAMILIES = (
    Family("qwen3_moe", ("qwen3_moe",), "Qwen3MoeForCausalLM", is_moe=by_sparse_step),
    Family("qwen2_moe", ("qwen2_moe",), "Qwen2MoeForCausalLM", is_moe=by_sparse_step),
    Family(
        "deepseek_v2",
        ("deepseek_v2",),
        "DeepseekV2ForCausalLM",
        n_expert_keys=("n_routed_experts",),
        is_moe=after_leading_dense,
    ),
    Family(
        "deepseek_v3",
        ("deepseek_v3", "kimi_k2"),
        "DeepseekV3ForCausalLM",
        remote=("kimi_k2",),
        n_expert_keys=("n_routed_experts",),
        is_moe=after_leading_dense,
    ),
    Family(
        "bailing_moe",
        ("bailing_moe",),
        "BailingMoeForCausalLM",
        remote=("bailing_moe",),
        is_moe=after_leading_dense,
        embedding="model.word_embeddings.weight",
    ),
    Family("olmoe", ("olmoe",), "OlmoeForCausalLM", n_ff_exp_keys=("intermediate_size",)),
    Family(
        "mixtral",
        ("mixtral",),
        "MixtralForCausalLM",
        n_expert_keys=("num_local_experts", "num_experts"),
        n_ff_exp_keys=("intermediate_size",),
        block="model.layers.{layer}.block_sparse_moe",
        projections=_W123,
    ),
    Family(
        "glm4_moe",
        ("glm4_moe",),
        "Glm4MoeForCausalLM",
        n_expert_keys=("n_routed_experts",),
        is_moe=after_leading_dense,
    ),
    Family(
        "glm4_moe_lite",
        ("glm4_moe_lite",),
        "Glm4MoeLiteForCausalLM",
        n_expert_keys=("n_routed_experts",),
        is_moe=by_layer_list,
    ),
    Family(
        "dots1",
        ("dots1",),
        "Dots1ForCausalLM",
        n_expert_keys=("n_routed_experts",),
        is_moe=after_leading_dense,
    ),
    Family(
        "ernie4_5_moe",
        ("ernie4_5_moe",),
        "Ernie4_5_MoeForCausalLM",
        n_expert_keys=("moe_num_experts",),
        n_expert_used_keys=("moe_k",),
        is_moe=between,
        renamed=MappingProxyType({"gate.moe_statics.": "moe_statics."}),
        tied_default=True,
    ),
    Family(
        "minimax_m2",
        ("minimax_m2",),
        "MiniMaxM2ForCausalLM",
        n_expert_keys=("num_local_experts", "num_experts"),
        n_ff_exp_keys=("intermediate_size",),
        block="model.layers.{layer}.block_sparse_moe",
        projections=_W123,
    ),
    Family("exaone_moe", ("exaone_moe",), "ExaoneMoeForCausalLM", is_moe=by_layer_list),
    Family(
        "lfm2_moe",
        ("lfm2_moe",),
        "Lfm2MoeForCausalLM",
        is_moe=after_dense_layers,
        block="model.layers.{layer}.feed_forward",
        fused_block="model.layers.{layer}.feed_forward",
        projections=_W123,
        final_norm="model.embedding_norm.weight",
        tied_keys=("tie_embedding", "tie_word_embeddings"),
        tied_default=True,
    ),
    Family(
        "deepseek_v32",
        ("deepseek_v32",),
        "DeepseekV32ForCausalLM",
        n_expert_keys=("n_routed_experts",),
        is_moe=by_layer_list,
    ),
    Family(
        "hunyuan_v1_moe",
        ("hunyuan_v1_moe",),
        "HunYuanMoEV1ForCausalLM",
        n_expert_used_keys=("moe_topk",),
        n_ff_exp_keys=("moe_intermediate_size", "intermediate_size"),
        router_name="gate.wg.weight",
    ),
    Family("qwen3_next", ("qwen3_next",), "Qwen3NextForCausalLM", is_moe=by_sparse_step),
    Family(
        "afmoe",
        ("afmoe",),
        "AfmoeForCausalLM",
        is_moe=after_dense_layers,
        router_name="router.gate.weight",
    ),
    Family(
        "gpt_oss",
        ("gpt_oss",),
        "GptOssForCausalLM",
        n_expert_keys=("num_local_experts", "num_experts"),
        n_ff_exp_keys=("intermediate_size",),
        router_name="router.weight",
        transposed=True,
        interleaved=True,
        stacked_here=True,
    ),
    *(
        Family(
            name,
            (name,),
            architecture,
            n_expert_keys=("num_local_experts",),
            n_ff_exp_keys=("intermediate_size",),
            is_moe=by_step_or_list,
            block=prefix + "layers.{layer}.feed_forward",
            fused_block=prefix + "layers.{layer}.feed_forward",
            transposed=True,
            stacked_here=True,
            router_name="router.weight",
            embedding=prefix + "embed_tokens.weight",
            final_norm=prefix + "norm.weight",
            output=prefix.removesuffix("model.") + "lm_head.weight",
            text_key=text,
        )
        for name, architecture, prefix, text in (
            ("llama4", "Llama4ForConditionalGeneration", "language_model.model.", "text_config"),
            ("llama4_text", "Llama4ForCausalLM", "model.", None),
        )
    ),
    Family(
        "nemotron_h",
        ("nemotron_h",),
        "NemotronHForCausalLM",
        n_expert_keys=("n_routed_experts",),
        n_embd_keys=("moe_latent_size", "hidden_size"),
        n_layer_keys=("layers_block_type", "hybrid_override_pattern", "num_hidden_layers"),
        is_moe=by_kind("layers_block_type", "hybrid_override_pattern", moe="moe"),
        block="backbone.layers.{layer}.mixer",
        fused_block="model.layers.{layer}.mixer",
        projections=MappingProxyType({"up": "up_proj", "down": "down_proj"}),
        fused=(("up",), ("down",)),
        embedding="backbone.embeddings.weight",
        final_norm="backbone.norm_f.weight",
        other_prefix=("model.", "backbone."),
        stacked_here=True,
    ),
    *(
        Family(
            name,
            (name,),
            architecture,
            n_expert_keys=("num_local_experts", "num_experts"),
            n_ff_exp_keys=("intermediate_size",),
            block="model.layers.{layer}.block_sparse_moe",
            fused_block="model.layers.{layer}.block_sparse_moe",
            fused_names=_GRANITE,
            renamed=MappingProxyType({"router.weight": "router.layer.weight"}),
            router_name="router.layer.weight",
            stacked_here=True,
        )
        for name, architecture in (
            ("granitemoe", "GraniteMoeForCausalLM"),
            ("granitemoeshared", "GraniteMoeSharedForCausalLM"),
            ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
        )
    ),
    Family(
        "qwen3_5_moe",
        ("qwen3_5_moe",),
        "Qwen3_5MoeForConditionalGeneration",
        block="model.language_model.layers.{layer}.mlp",
        fused_block="model.language_model.layers.{layer}.mlp",
        embedding="model.language_model.embed_tokens.weight",
        final_norm="model.language_model.norm.weight",
        text_key="text_config",
        tiled_heads=True,
    ),
    Family("qwen3_5_moe_text", ("qwen3_5_moe_text",), "Qwen3_5MoeForCausalLM", tiled_heads=True),
)

#: Families by name.
BY_NAME: Mapping[str, Family] = MappingProxyType({family.name: family for family in FAMILIES})


def layer_in(name: str) -> int:
    """The layer of the text model to which a tensor belongs; -1 if none."""
    if "vision" in name or "visual" in name:
        return -1
    parts = name.split(".")
    found = (int(b) for a, b in zip(parts, parts[1:], strict=False) if a == "layers" and b.isdecimal())
    return next(found, -1)


def known_model_types() -> tuple[str, ...]:
    """Every ``model_type`` that :func:`family_of` accepts."""
    return tuple(t for family in FAMILIES for t in family.model_types)


def family_of(config: Config) -> Family:
    """The family of config.json's ``model_type``; MobeError lists the known types if there is none."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise MobeError(
        f"config.json: model_type {model_type!r} is not a MoE family that mobe-gguf reads as a Hugging Face directory. "
        f"Known: {', '.join(known_model_types())}. {other_way(model_type)}"
    )


#: Other MoE families: ``model_type`` -> its class, under which llama.cpp's converter may know it, and what is special about it.
OTHERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "bailing_moe_v2": ("BailingMoeV2ForCausalLM", "remote code"),
        "flex_olmo": ("FlexOlmoForCausalLM", ""),
        "jetmoe": ("JetMoeForCausalLM", ""),
        "phimoe": (
            "PhiMoEForCausalLM",
            "llama.cpp weighs the two experts by their softmax, the model by SparseMixer",
        ),
    }
)

#: Families for which the converter has no class.
UNCONVERTED = frozenset(("flex_olmo", "jetmoe"))
#: Families for which llama.cpp's graph computes another model.
OTHERWISE = frozenset(("phimoe",))


def other_way(model_type: Any) -> str:
    """What a user with a model of another family can do instead."""
    if not isinstance(model_type, str):
        model_type = None  # a list, which cannot be a key
    if model_type in UNCONVERTED:
        return "llama.cpp does not know this family either"
    if model_type in OTHERWISE:
        return f"{OTHERS[model_type][1]}: a GGUF file of it gives other answers than the model, so nothing is made of it here"
    return (
        "Convert it to GGUF by llama.cpp's converter, then work on the GGUF file:\n"
        "  mobe-gguf convert MODEL model.gguf\n"
        "  mobe-gguf factorize model.gguf factors/"
    )


#: Matrices other than the routed experts that write to the residual stream: end of a Hugging Face name -> GGUF name.
WRITERS = {
    "self_attn.o_proj.weight": "attn_output",
    "attention.dense.weight": "attn_output",
    "mlp.down_proj.weight": "ffn_down",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp",
}
EMBEDDINGS = ("model.embed_tokens.weight", "model.word_embeddings.weight", "token_embd.weight")
