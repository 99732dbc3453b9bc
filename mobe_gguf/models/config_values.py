"""Checks every value of config.json before export: a GGUF file can carry it, or it is refused by name.

llama.cpp's converter drops keys that it does not know.  A graph of the runtime has constants where a model's class reads
config.json.  Without this check, a file could silently compute something else than the model.

For each family there is a table of the config class's keys (transformers 5.24's ``configuration_*.py``; the remote code of
Kimi-K2 and Ling).  It says what the pinned converter (``conversion/*.py``) writes and the pinned graph
(``src/models/*.cpp``) reads:

- ``CARRIED``: the file contains the value, or the shapes of its tensors imply it;
- :class:`Only`: the graph computes one thing, so only values that mean this are accepted;
- a judge: a rule over several keys, or one that carries a value by keys that the runtime reads and the converter does not
  write.  Only the patched runtime reads a few of these (``config_rules.PATCHED``).

``tests/export/test_config_values.py`` changes every key of every family on a small model.  A change that alters
transformers' logits must alter the file's in the same way, or be refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.models.config_tables import VALUES
from mobe_gguf.models.judgement import INERT, OURS, Config, Judgement, is_int

__all__ = ["INERT", "VALUES", "Judgement", "check_values", "for_converter", "judge", "unlisted"]

#: Keys of other families or forks that change what a model computes, with their neutral values.  A family's class may ignore
#: such a key while the model's own code reads it, so any other value is refused.
MATTERS: Mapping[str, tuple[Any, ...]] = {
    key: (None, False, 0, 0.0)
    for key in (
        "attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping", "logit_softcapping", "clip_qkv",
        "swiglu_limit", "query_pre_attn_scalar", "attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "add_qkv_bias",
        "attn_temperature_tuning", "no_rope_layers", "attention_chunk_size", "use_sliding_window", "mlp_only_layers",
        "zero_expert_num", "num_zero_experts", "index_topk", "use_gemma_rms_norm", "norm_after_top_k", "sandwich_norm",
    )
} | {
    key: (None, 1, 1.0)
    for key in (
        "logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "scale_emb",
        "embedding_scale", "lm_head_multiplier", "mup_width_multiplier", "decoder_sparse_step", "routed_scaling_factor",
    )
}  # fmt: skip

#: Sizes that every family has, and those that a class takes from others if they are null.
NULLABLE = frozenset(("num_key_value_heads", "head_dim"))
POSITIVE = NULLABLE | {"vocab_size", "max_position_embeddings", "num_attention_heads", "hidden_size"}

#: Keys whose -1 has a meaning.
SIGNED = frozenset(("moe_layer_end_index",))


def judge(family: str, config: Config) -> Judgement:
    """What a file of this model would compute differently, and the values that prevent it."""
    values, judgement = VALUES[family], Judgement()
    judgement.hparams |= values.implied
    for key, only in values.only.items():
        value = config.get(key, only.default)
        if not any(value is a or (type(value) is type(a) and value == a) for a in only.allowed):
            judgement.refuse(key, value if key in config else f"{value} (the default)", only.computes)
    for check in values.judges:
        check(config, judgement)
    for key, value in config.items():
        if key in values.known and is_int(value) and not -(2**31) <= value < 2**32:
            judgement.refuse(key, value, "has 32 bits for it")
        if key in POSITIVE and not (is_int(value) and value > 0) and not (value is None and key in NULLABLE):
            judgement.refuse(key, value, "needs a positive integer")
        elif key in values.known - INERT - SIGNED and isinstance(value, int | float) and value < 0:
            judgement.refuse(key, value, "needs a number that is not negative")
        if key in MATTERS and key not in values.known and value not in (*MATTERS[key], []):
            judgement.refuse(key, value, f"knows no such key in the family {family}")
    return judgement


def check_values(family: str, config: Config, where: Any) -> Judgement:
    """:func:`judge`; MobeError names every key and value that a file cannot carry.  ``where``: the model, for the message."""
    judgement = judge(family, config)
    if judgement.refused:
        raise MobeError(
            f"{where}/config.json: {'; '.join(judgement.refused)}. A GGUF file of this model would give other answers than the "
            "model, so none is written"
        )
    return judgement


def for_converter(family: str, hparams: Mapping[str, Any], judgement: Judgement) -> dict[str, Any]:
    """``hparams`` for the converter: implied values are added, and keys that the family's class does not read are dropped,
    because the converter would write some of them."""
    known = VALUES[family].known
    return {k: v for k, v in hparams.items() if k in known} | judgement.hparams


def unlisted(family: str, keys: Iterator[str]) -> list[str]:
    """Keys of a config class that are not in the tables; a test uses this to notice new ones."""
    return sorted(set(keys) - VALUES[family].known - OURS)
