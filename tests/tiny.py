"""Tiny random Hugging Face checkpoints, one builder for every family: nothing downloaded, a fraction of a second each.

    path = make_model("deepseek_v3", tmp_path / "model", seed=1, moe_intermediate_size=40)

The weights are random at a scale that keeps activations near one, so that logits differ visibly when a weight is
wrong (the initialization of transformers, std 0.02, would leave them nearly uniform at these sizes).
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

#: Trained into the tokenizer; any English will do.
TEXT = (
    "In the beginning the wind moved over the face of the water, and the keeper of the light said to his "
    "daughter: count the ships that pass before evening, 12 or 13 of them, and don't forget the small ones. "
    "She counted nineteen; she'd never counted so many. What she wrote that night we're still reading.\n\n"
)

#: Qwen2's pre-tokenizer (tokenizer.json of Qwen2 and Qwen3).
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SIZES = dict(
    vocab_size=384,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    num_experts_per_tok=2,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    tie_word_embeddings=False,
)
_MLA = dict(
    num_key_value_heads=4,
    n_routed_experts=8,
    n_shared_experts=1,
    first_k_dense_replace=1,
    moe_intermediate_size=48,
    kv_lora_rank=32,
    q_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)

#: Family -> (prefix of the transformers classes, what its config adds to ``_SIZES``).
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        dict(num_experts=8, moe_intermediate_size=48, head_dim=16, norm_topk_prob=True),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(num_experts=8, moe_intermediate_size=48, shared_expert_intermediate_size=80),
    ),
    "deepseek_v2": ("DeepseekV2", _MLA | dict(n_group=1, topk_group=1, topk_method="greedy")),
    "deepseek_v3": (
        "DeepseekV3",
        _MLA | dict(n_group=2, topk_group=1, num_mtp_layers=0, scoring_func="sigmoid"),
    ),
    "olmoe": ("Olmoe", dict(num_experts=8, intermediate_size=48, num_key_value_heads=4)),
    "mixtral": ("Mixtral", dict(num_local_experts=8, intermediate_size=48)),
}

_SIGMOID = dict(
    num_key_value_heads=4,
    n_routed_experts=8,
    n_shared_experts=1,
    first_k_dense_replace=1,
    moe_intermediate_size=48,
)

_GRANITE = dict(
    num_local_experts=8,
    intermediate_size=48,
    embedding_multiplier=3.0,
    logits_scaling=2.0,
    residual_multiplier=0.5,
    attention_multiplier=0.125,
)

#: Families that have tests of their own, ``tests/parity/test_more_families.py``.
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": (
        "Glm4Moe",
        _SIGMOID | dict(num_key_value_heads=2, head_dim=16, n_group=1, topk_group=1, num_nextn_predict_layers=0),
    ),
    "glm4_moe_lite": ("Glm4MoeLite", _MLA | dict(n_group=1, topk_group=1)),
    "dots1": ("Dots1", _SIGMOID | dict(head_dim=16, n_group=1, topk_group=1, norm_topk_prob=True)),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        dict(
            moe_num_experts=8, moe_k=2, moe_intermediate_size=48, moe_num_shared_experts=1, moe_layer_start_index=1,
            moe_layer_interval=1, moe_layer_end_index=-1,
        ),
    ),
    "minimax_m2": ("MiniMaxM2", dict(num_local_experts=8, intermediate_size=48, head_dim=16, rotary_dim=8)),
    "exaone_moe": (
        "ExaoneMoe",
        dict(
            num_experts=8, moe_intermediate_size=48, num_shared_experts=1, first_k_dense_replace=1, head_dim=16,
            n_group=1, topk_group=1, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        dict(
            num_experts=8, moe_intermediate_size=48, num_dense_layers=1, layer_types=["conv", "full_attention", "conv"],
            tie_word_embeddings=True,
        ),
    ),
    "deepseek_v32": ("DeepseekV32", _MLA | dict(n_group=2, topk_group=1)),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1", dict(num_experts=8, moe_topk=2, moe_intermediate_size=48, intermediate_size=48, head_dim=16)
    ),
    "qwen3_next": (
        "Qwen3Next",
        dict(
            num_experts=8, moe_intermediate_size=48, shared_expert_intermediate_size=80, head_dim=16, num_hidden_layers=4,
            linear_conv_kernel_dim=4, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
    ),
    "afmoe": (
        "Afmoe",
        dict(
            num_experts=8, moe_intermediate_size=48, num_dense_layers=1, num_shared_experts=1, head_dim=16, num_hidden_layers=4,
            mup_enabled=True,
        ),
    ),
    "gpt_oss": (
        "GptOss",
        dict(
            num_local_experts=8, intermediate_size=48, head_dim=16, sliding_window=16, num_experts_per_tok=2,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=150000.0, factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=True,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "granitemoe": ("GraniteMoe", _GRANITE),
    "granitemoeshared": ("GraniteMoeShared", _GRANITE | dict(shared_intermediate_size=80)),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        _GRANITE
        | dict(
            shared_intermediate_size=80, layer_types=["mamba", "attention", "mamba"], mamba_n_heads=8, mamba_d_head=16,
            mamba_d_state=16, mamba_n_groups=1, position_embedding_type="nope",
        ),
    ),
    "llama4_text": (
        "Llama4",
        dict(
            num_local_experts=8, num_experts_per_tok=1, intermediate_size=48, intermediate_size_mlp=96, head_dim=16,
            num_hidden_layers=4, interleave_moe_layer_step=2, attention_chunk_size=8192,
        ),
    ),
    "nemotron_h": (
        "NemotronH",
        dict(
            layers_block_type=["linear_attention", "moe", "full_attention", "moe"], head_dim=16, mamba_num_heads=8,
            mamba_head_dim=16, ssm_state_size=16, n_groups=2, n_routed_experts=8, moe_intermediate_size=48,
            moe_shared_expert_intermediate_size=80, n_group=1, topk_group=1, num_hidden_layers=4, time_step_min=1e-30,
        ),
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5Moe",
        dict(
            num_experts=8, moe_intermediate_size=48, shared_expert_intermediate_size=80, head_dim=32, num_hidden_layers=4,
            linear_conv_kernel_dim=4, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
    ),
}  # fmt: skip

#: Families that also see: the family of their text model, and the sizes of the rest.
_SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, num_position_embeddings=64),
    ),
    "llama4": (
        "llama4_text",
        dict(
            hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vision_output_dim=48,
            projector_input_dim=48, projector_output_dim=48, image_size=28, patch_size=14,
        ),
    ),
}  # fmt: skip

#: Tokens that the converter looks for in the vocabularies of some families.
_SPECIAL = ("[gMASK]", "<|user|>", "<|observation|>")

#: Every family that :func:`make_model` builds and the tests go through; then all.
FAMILIES = (*_CLASSES, "bailing_moe")
ALL_FAMILIES = (*FAMILIES, *_MORE)


def make_model(
    family: str,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    fused: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random model of ``family`` and a byte-level BPE tokenizer to ``path``; returns it.

    ``overrides`` are config keys in the spelling of transformers (``moe_intermediate_size=40``).  Experts are one
    tensor each, as published models have them; ``fused`` writes transformers 5's own ``gate_up_proj`` instead.
    Same arguments, same bytes.
    """
    path = Path(path)
    if family == "bailing_moe":
        assert not fused, "transformers does not know this family, so it has no fused layout"
        _make_bailing(path, seed, dtype, overrides)
    else:
        model = build(family, seed=seed, **overrides).to(dtype)
        model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=not fused)
    _tokenizer().save_pretrained(path)
    if family == "deepseek_v32":  # its vocabulary's own setting, which the converter asks for
        said = path / "tokenizer_config.json"
        said.write_text(json.dumps(json.loads(said.read_text()) | {"add_bos_token": True}))
    return path


def config_class(family: str) -> Any:
    """transformers' config of the text model."""
    import transformers

    kind = "TextConfig" if family.endswith("_text") else "Config"
    return getattr(transformers, f"{(_CLASSES | _MORE)[family][0]}{kind}")


def build(family: str, *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """The transformers model of :func:`make_model`, float32 and in memory only."""
    import transformers

    text, seeing = _SEEING.get(family, (family, None))
    prefix, extra = (_CLASSES | _MORE)[text]
    config, kind = config_class(text)(**(_SIZES | extra | overrides)), "ForCausalLM"
    if seeing is not None:
        parts = dict(text_config=config.to_dict(), vision_config=seeing)
        config, kind = getattr(transformers, f"{prefix}Config")(**parts), "ForConditionalGeneration"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}{kind}")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            if not name.endswith((".A_log", ".dt_bias")):  # decay of a state: as it is initialized
                _fill(name, tensor, generator)
    return model


def _fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random values at a scale that keeps the signal's size from layer to layer."""
    tensor.normal_(generator=generator)
    if tensor.dim() == 1:
        tensor.mul_(0.1)
        if "norm" in name:
            tensor.add_(1.0)
    elif "embed" not in name:
        tensor.mul_(tensor.shape[-1] ** -0.5)


def _make_bailing(path: Path, seed: int, dtype: torch.dtype, overrides: dict[str, Any]) -> None:
    """Ling (BailingMoeForCausalLM) is remote code: config and tensors by name, as its repository has them.

    Names and shapes are those that llama.cpp's ``conversion/bailingmoe.py`` reads: one fused
    ``query_key_value``, ``attention.dense``, a shared expert.
    """
    from safetensors.torch import save_file

    config = _SIZES | dict(
        architectures=["BailingMoeForCausalLM"],
        model_type="bailing_moe",
        num_experts=8,
        num_shared_experts=1,
        first_k_dense_replace=0,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        norm_head=False,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        use_bias=False,
        use_qkv_bias=False,
        torch_dtype=str(dtype).removeprefix("torch."),
    )
    config |= overrides
    d, heads, kv_heads = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = config.get("head_dim") or d // heads
    shapes = {"model.word_embeddings.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    shapes["lm_head.weight"] = (config["vocab_size"], d)

    def mlp(prefix: str, width: int) -> None:
        for projection, shape in (
            ("gate_proj", (width, d)),
            ("up_proj", (width, d)),
            ("down_proj", (d, width)),
        ):
            shapes[f"{prefix}.{projection}.weight"] = shape

    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes[f"{block}.input_layernorm.weight"] = (d,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (d,)
        shapes[f"{block}.attention.query_key_value.weight"] = ((heads + 2 * kv_heads) * head_dim, d)
        shapes[f"{block}.attention.dense.weight"] = (d, heads * head_dim)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{block}.mlp", config["intermediate_size"])
            continue
        shapes[f"{block}.mlp.gate.weight"] = (config["num_experts"], d)
        for e in range(config["num_experts"]):
            mlp(f"{block}.mlp.experts.{e}", config["moe_intermediate_size"])
        if config["num_shared_experts"]:
            mlp(f"{block}.mlp.shared_experts", config["moe_intermediate_size"] * config["num_shared_experts"])

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        tensors[name] = torch.empty(shape)
        _fill(name, tensors[name], generator)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {n: t.to(dtype) for n, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"}
    )


@functools.cache
def _tokenizer() -> Any:
    """A byte-level BPE of 384 tokens, split as Qwen2's is."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZES["vocab_size"],
        special_tokens=["<|endoftext|>", *_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
