"""What becomes of each key of config.json, family by family: see ``config_values``."""

from __future__ import annotations

from collections.abc import Mapping

from mobe_gguf.models.config_rules import (
    NO_BIAS,
    SILU,
    Only,
    Values,
    all_layers_attend,
    all_layers_moe,
    equal_heads,
    heads_fill_width,
    leading_dense,
    mla_epsilon,
    names,
    olmoe_epsilon,
    query_rank,
    rotary,
    rotary_head,
    scaling_factor,
    sliding,
    sliding_if_used,
    some_shared,
    v2_groups,
    v2_norm,
    v3_groups,
)

_QWEN = "moe_intermediate_size num_experts num_local_experts head_dim sliding_window use_sliding_window max_window_layers " \
    "layer_types decoder_sparse_step mlp_only_layers intermediate_size"  # fmt: skip
_MLA = "moe_intermediate_size n_routed_experts num_experts num_local_experts intermediate_size kv_lora_rank q_lora_rank " \
    "qk_rope_head_dim qk_nope_head_dim qk_head_dim v_head_dim head_dim n_group topk_group first_k_dense_replace moe_layer_freq " \
    "n_shared_experts routed_scaling_factor layer_types"  # fmt: skip

_DEEPSEEK_V3 = Values(
    carried=names(_MLA + " norm_topk_prob"),
    only={
        "hidden_act": SILU,
        "attention_bias": NO_BIAS,
        "rope_interleave": Only((True, None), "rotates neighbouring dimensions", True),
        "scoring_func": Only(("sigmoid",), "is told 'sigmoid', as transformers' class computes", "sigmoid"),
        "topk_method": Only((None, "noaux_tc"), "chooses experts by 'noaux_tc'"),
    },
    judges=(
        leading_dense, all_layers_attend, mla_epsilon, query_rank, rotary_head, equal_heads, scaling_factor, v3_groups,
        some_shared("n_shared_experts"), rotary("linear", "yarn", latent=True),
    ),
    implied={"scoring_func": "sigmoid"},
)  # fmt: skip

VALUES: Mapping[str, Values] = {
    "qwen3_moe": Values(
        carried=names(_QWEN),
        only={
            "hidden_act": SILU,
            "attention_bias": NO_BIAS,
            "norm_topk_prob": Only((True,), "normalizes the routing weights", False),
        },
        judges=(all_layers_moe, sliding_if_used, all_layers_attend, rotary("linear", "yarn")),
    ),
    "qwen2_moe": Values(
        carried=names(_QWEN + " shared_expert_intermediate_size qkv_bias"),
        only={
            "hidden_act": SILU,
            "norm_topk_prob": Only((False, None), "does not normalize the routing weights", False),
        },
        judges=(
            all_layers_moe, sliding_if_used, all_layers_attend, heads_fill_width,
            some_shared("shared_expert_intermediate_size"), rotary("linear", "yarn"),
        ),
    ),
    "deepseek_v2": Values(
        carried=names(_MLA + " topk_method norm_topk_prob"),
        only={
            "hidden_act": SILU,
            "attention_bias": NO_BIAS,
            "mlp_bias": NO_BIAS,
            "scoring_func": Only(("softmax",), "is told 'softmax', as transformers' class computes", "softmax"),
        },
        judges=(
            leading_dense, all_layers_attend, mla_epsilon, query_rank, rotary_head, equal_heads, scaling_factor, v2_groups, v2_norm,
            some_shared("n_shared_experts"), rotary("linear", "yarn", latent=True),
        ),
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "olmoe": Values(
        carried=names("intermediate_size num_experts num_local_experts head_dim layer_types"),
        only={
            "hidden_act": SILU,
            "attention_bias": NO_BIAS,
            "clip_qkv": Only((None,), "does not clip queries, keys and values"),
            "norm_topk_prob": Only((False, None), "does not normalize the routing weights", False),
        },
        judges=(olmoe_epsilon, heads_fill_width, equal_heads, all_layers_attend, rotary("linear", "yarn")),
    ),
    "mixtral": Values(
        carried=names("intermediate_size num_local_experts num_experts head_dim sliding_window layer_types"),
        only={"hidden_act": SILU},
        judges=(sliding, all_layers_attend, rotary("linear", "yarn", "llama3")),
    ),
    "bailing_moe": Values(
        carried=names(
            "intermediate_size moe_intermediate_size num_experts num_shared_experts head_dim norm_topk_prob norm_head "
            "first_k_dense_replace moe_layer_freq sliding_window use_sliding_window max_window_layers layer_types"
        ),
        only={
            "hidden_act": SILU,
            "use_bias": NO_BIAS,
            "use_qkv_bias": NO_BIAS,
            "first_k_dense_replace": Only((0, None), "has experts in every layer", 0),
            "moe_layer_freq": Only((0, 1, None), "has experts in every layer", 1),
            "norm_softmax": Only((False, None), "takes the softmax over all experts", False),
            "multi_gate": Only((False, None), "has one router a layer", False),
        },
        judges=(sliding_if_used, all_layers_attend, some_shared("num_shared_experts"), rotary()),
    ),
}  # fmt: skip
