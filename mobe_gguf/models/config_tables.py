"""How each key of config.json is handled, by family: see ``config_values``."""

from __future__ import annotations

from collections.abc import Mapping

from mobe_gguf.models.config_rope import rotary
from mobe_gguf.models.config_rules import (
    all_layers_attend,
    all_layers_moe,
    by_layer,
    equal_heads,
    ernie_layers,
    ernie_shared,
    every_fourth_attends_to_all,
    every_second_has_a_window,
    granite_layers,
    granite_scales,
    heads_fill_width,
    hunyuan_rope,
    hunyuan_width,
    leading_dense,
    least_time_step,
    linear_heads,
    linear_or_full,
    llama4_attention,
    llama4_layers,
    mla_epsilon,
    nemotron_layers,
    no_time_limits,
    normalized_if_said,
    olmoe_epsilon,
    query_rank,
    rotary_head,
    rotary_width,
    scaling_factor,
    sigmoid_groups,
    sliding,
    sliding_if_used,
    some_shared,
    sparse_behind,
    twice_as_wide,
    v2_groups,
    v2_norm,
    v3_groups,
)
from mobe_gguf.models.judgement import NO_BIAS, SILU, Only, Values, names

_QWEN = "moe_intermediate_size num_experts num_local_experts head_dim sliding_window use_sliding_window max_window_layers " \
    "layer_types decoder_sparse_step mlp_only_layers intermediate_size"  # fmt: skip
_MLA = "moe_intermediate_size n_routed_experts num_experts num_local_experts intermediate_size kv_lora_rank q_lora_rank " \
    "qk_rope_head_dim qk_nope_head_dim qk_head_dim v_head_dim head_dim n_group topk_group first_k_dense_replace moe_layer_freq " \
    "n_shared_experts routed_scaling_factor layer_types"  # fmt: skip

_SIGMOID = Only(("sigmoid",), "is told 'sigmoid', as transformers' class computes", "sigmoid")

_DEEPSEEK_V3 = Values(
    carried=names(_MLA + " norm_topk_prob"),
    only={
        "hidden_act": SILU,
        "attention_bias": NO_BIAS,
        "rope_interleave": Only((True,), "rotates neighbouring dimensions", True),
        "scoring_func": _SIGMOID,
        "topk_method": Only((None, "noaux_tc"), "chooses experts by 'noaux_tc'"),
    },
    judges=(
        leading_dense, all_layers_attend, mla_epsilon, query_rank, rotary_head, equal_heads, scaling_factor, v3_groups,
        some_shared("n_shared_experts"), rotary("linear", "yarn", latent=True),
    ),
    implied={"scoring_func": "sigmoid"},
)  # fmt: skip

_GRANITE = "intermediate_size num_local_experts num_experts head_dim attention_bias embedding_multiplier logits_scaling " \
    "residual_multiplier attention_multiplier"  # fmt: skip
_GRANITE_JUDGES = (heads_fill_width, granite_scales, rotary("linear", "yarn"))

_LLAMA4 = Values(
    carried=names(
        "intermediate_size intermediate_size_mlp num_local_experts moe_layers interleave_moe_layer_step head_dim layer_types "
        "no_rope_layers no_rope_layer_interval attention_chunk_size use_qk_norm attn_temperature_tuning"
    ),
    only={
        "hidden_act": SILU,
        "attention_bias": NO_BIAS,
        "attn_scale": Only((0.1,), "has a constant for it, 0.1", 0.1),
        "floor_scale": Only((8192, 8192.0), "has a constant for it, 8192", 8192),
    },
    judges=(llama4_layers, llama4_attention, rotary("linear", "yarn", "llama3")),
)

_GPT_OSS_ROPE = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

_QWEN3_5 = Values(
    carried=names(
        "moe_intermediate_size shared_expert_intermediate_size num_experts num_local_experts head_dim linear_conv_kernel_dim "
        "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads layer_types full_attention_interval "
        "partial_rotary_factor mtp_num_hidden_layers num_hidden_layers_mtp"
    ),
    only={"hidden_act": SILU, "attention_bias": NO_BIAS},
    judges=(
        linear_heads, linear_or_full, some_shared("shared_expert_intermediate_size"), rotary("linear", "yarn", partial_too=True),
    ),
)  # fmt: skip

VALUES: Mapping[str, Values] = {
    "qwen3_moe": Values(
        carried=names(_QWEN + " norm_topk_prob"),
        only={"hidden_act": SILU, "attention_bias": NO_BIAS},
        judges=(
            normalized_if_said(stock=True), all_layers_moe, sliding_if_used, all_layers_attend, rotary("linear", "yarn"),
        ),
    ),
    "qwen2_moe": Values(
        carried=names(_QWEN + " shared_expert_intermediate_size qkv_bias norm_topk_prob"),
        only={"hidden_act": SILU},
        judges=(
            normalized_if_said(stock=False), all_layers_moe, sliding_if_used, all_layers_attend, heads_fill_width,
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
        carried=names("intermediate_size num_experts num_local_experts head_dim layer_types norm_topk_prob"),
        only={
            "hidden_act": SILU,
            "attention_bias": NO_BIAS,
            "clip_qkv": Only((None,), "does not clip queries, keys and values"),
        },
        judges=(
            normalized_if_said(stock=False), olmoe_epsilon, heads_fill_width, equal_heads, all_layers_attend,
            rotary("linear", "yarn"),
        ),
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
    "glm4_moe": Values(
        carried=names(
            "moe_intermediate_size n_routed_experts intermediate_size head_dim n_group topk_group first_k_dense_replace "
            "n_shared_experts routed_scaling_factor norm_topk_prob use_qk_norm attention_bias partial_rotary_factor"
        ),
        only={"hidden_act": SILU},
        judges=(
            leading_dense, scaling_factor, v3_groups, some_shared("n_shared_experts"), rotary("linear", "yarn", partial_too=True),
        ),
    ),
    "glm4_moe_lite": Values(
        carried=names(_MLA + " norm_topk_prob mlp_layer_types"),
        only=_DEEPSEEK_V3.only,
        judges=(
            sparse_behind, all_layers_attend, mla_epsilon, query_rank, rotary_head, equal_heads, scaling_factor, v3_groups,
            some_shared("n_shared_experts"), rotary("linear", "yarn", latent=True),
        ),
        implied={"scoring_func": "sigmoid"},
    ),
    "dots1": Values(
        carried=names(
            "moe_intermediate_size n_routed_experts intermediate_size head_dim n_group topk_group first_k_dense_replace "
            "n_shared_experts routed_scaling_factor norm_topk_prob sliding_window max_window_layers layer_types"
        ),
        only={"hidden_act": SILU, "attention_bias": NO_BIAS, "scoring_func": _SIGMOID},
        judges=(
            leading_dense, all_layers_attend, equal_heads, scaling_factor, v3_groups, some_shared("n_shared_experts"),
            rotary("linear", "yarn"),
        ),
        implied={"scoring_func": "sigmoid"},
    ),
    "ernie4_5_moe": Values(
        carried=names(
            "intermediate_size moe_intermediate_size moe_k moe_num_experts moe_num_shared_experts moe_layer_start_index "
            "moe_layer_end_index head_dim"
        ),
        only={
            "hidden_act": SILU,
            "use_bias": NO_BIAS,
            "moe_layer_interval": Only((1, None), "has experts in every layer from the first on", 1),
            "moe_norm_min": Only((1e-12,), "has no other least sum of routing weights", 1e-12),
        },
        judges=(ernie_layers, ernie_shared, some_shared("moe_num_shared_experts"), rotary("linear", "yarn")),
    ),
    "minimax_m2": Values(
        carried=names("intermediate_size num_local_experts num_experts head_dim rotary_dim partial_rotary_factor"),
        only={"hidden_act": SILU, "scoring_func": _SIGMOID},
        judges=(rotary_width, rotary("linear", "yarn", partial_too=True)),
        implied={"scoring_func": "sigmoid"},
    ),
    "exaone_moe": Values(
        carried=names(
            "intermediate_size moe_intermediate_size num_experts num_shared_experts head_dim first_k_dense_replace "
            "mlp_layer_types layer_types sliding_window sliding_window_pattern routed_scaling_factor norm_topk_prob n_group topk_group"
        ),
        only={"hidden_act": SILU, "scoring_func": _SIGMOID},
        judges=(sparse_behind, scaling_factor, some_shared("num_shared_experts"), rotary()),
        implied={"scoring_func": "sigmoid"},
    ),
    "lfm2_moe": Values(
        carried=names(
            "intermediate_size moe_intermediate_size num_experts num_dense_layers norm_eps conv_L_cache layer_types head_dim "
            "tie_embedding"
        ),
        only={
            "use_expert_bias": Only((True,), "adds a bias to choose experts by", True),
            "conv_bias": Only((False,), "has no such biases", False),
            "norm_topk_prob": Only((True,), "normalizes the routing weights", True),
            "routed_scaling_factor": Only((1.0, 1), "has no such factor", 1.0),
            "tie_word_embeddings": Only((True,), "takes the embeddings for the output", True),
        },
        judges=(heads_fill_width, rotary("linear", "yarn")),
    ),
    "deepseek_v32": Values(
        carried=names(_MLA + " norm_topk_prob mlp_layer_types index_topk index_head_dim index_n_heads"),
        only={k: v for k, v in _DEEPSEEK_V3.only.items() if k != "rope_interleave"} | {"mlp_bias": NO_BIAS},
        judges=(
            sparse_behind, mla_epsilon, rotary_head, equal_heads, scaling_factor, v3_groups, some_shared("n_shared_experts"),
            rotary("linear", "yarn", latent=True, divided=True),
        ),
        implied={"scoring_func": "sigmoid"},
    ),
    "hunyuan_v1_moe": Values(
        carried=names(
            "intermediate_size moe_intermediate_size num_experts num_local_experts moe_topk num_shared_expert head_dim eod_token_id "
            "sep_token_id"
        ),
        only={"hidden_act": SILU, "attention_bias": NO_BIAS, "norm_topk_prob": Only((True, None), "normalizes", True)},
        judges=(hunyuan_width, by_layer("moe_topk", 1), by_layer("num_shared_expert", 1), hunyuan_rope, rotary("linear", "yarn")),
    ),
    "qwen3_next": Values(
        carried=names(
            "intermediate_size moe_intermediate_size shared_expert_intermediate_size num_experts num_local_experts head_dim "
            "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads layer_types "
            "decoder_sparse_step mlp_only_layers full_attention_interval partial_rotary_factor"
        ),
        only={
            "hidden_act": SILU,
            "attention_bias": NO_BIAS,
            "norm_topk_prob": Only((True,), "normalizes the routing weights", True),
        },
        judges=(
            all_layers_moe, linear_heads, linear_or_full, some_shared("shared_expert_intermediate_size"),
            rotary("linear", "yarn", partial_too=True),
        ),
    ),
    "afmoe": Values(
        carried=names(
            "intermediate_size moe_intermediate_size num_experts num_shared_experts num_dense_layers head_dim layer_types sliding_window "
            "route_scale route_norm"
        ),
        only={
            "hidden_act": SILU,
            "attention_bias": NO_BIAS,
            "mup_enabled": Only((True,), "scales the embeddings", False),
            "global_attn_every_n_layers": Only((4,), "attends to all in every fourth layer", 4),
            "route_norm": Only((True,), "is told to normalize, as transformers does", True),
            "score_func": _SIGMOID,
            "n_group": Only((1, None), "has no groups of experts", 1),
        },
        judges=(every_fourth_attends_to_all, some_shared("num_shared_experts"), rotary("linear", "yarn")),
        implied={"route_norm": True},
    ),
    "gpt_oss": Values(
        carried=names("intermediate_size num_local_experts num_experts head_dim hidden_act layer_types sliding_window"),
        only={
            "attention_bias": Only((True,), "adds such biases", True),
            "swiglu_alpha": Only((1.702, None), "has a constant for it, 1.702", 1.702),
            "swiglu_limit": Only((7.0, 7, None), "has a constant for it, 7", 7.0),
        },
        judges=(every_second_has_a_window, rotary("linear", "yarn", ramp=True, default=_GPT_OSS_ROPE)),
    ),
    "granitemoe": Values(carried=names(_GRANITE), only={"hidden_act": SILU}, judges=_GRANITE_JUDGES),
    "granitemoeshared": Values(
        carried=names(_GRANITE + " shared_intermediate_size"),
        only={"hidden_act": SILU},
        judges=(*_GRANITE_JUDGES, some_shared("shared_intermediate_size")),
    ),
    "granitemoehybrid": Values(
        carried=names(
            _GRANITE + " shared_intermediate_size layer_types layers_block_type mamba_n_heads mamba_n_groups mamba_d_state mamba_d_head "
            "mamba_d_conv mamba_chunk_size mamba_expand position_embedding_type time_step_limit"
        ),
        only={
            "hidden_act": SILU,
            "mamba_proj_bias": NO_BIAS,
            "mamba_conv_bias": Only((True,), "adds a bias to the convolution", True),
        },
        judges=(*_GRANITE_JUDGES, granite_layers, twice_as_wide, no_time_limits),
    ),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "nemotron_h": Values(
        carried=names(
            "layers_block_type hybrid_override_pattern head_dim attention_bias mamba_num_heads mamba_head_dim ssm_state_size n_groups "
            "conv_kernel expand chunk_size layer_norm_epsilon n_routed_experts num_local_experts moe_intermediate_size n_shared_experts "
            "moe_shared_expert_intermediate_size moe_latent_size n_group topk_group norm_topk_prob routed_scaling_factor "
            "intermediate_size time_step_limit time_step_min time_step_max time_step_floor residual_in_fp32 rescale_prenorm_residual "
            "num_logits_to_keep use_mamba_kernels mamba_ssm_cache_dtype moe_shared_expert_overlap mtp_layers_block_type "
            "mtp_hybrid_override_pattern hidden_dropout"
        ),
        only={
            "mlp_hidden_act": Only(("relu2",), "computes relu^2", "relu2"),
            "mamba_hidden_act": SILU,
            "mlp_bias": NO_BIAS,
            "use_bias": NO_BIAS,
            "mamba_proj_bias": NO_BIAS,
            "use_conv_bias": Only((True,), "adds a bias to the convolution", True),
            "sliding_window": Only((None,), "attends to all tokens before"),
        },
        judges=(nemotron_layers, no_time_limits, least_time_step, scaling_factor, sigmoid_groups),
    ),
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
}  # fmt: skip
