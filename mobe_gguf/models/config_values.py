"""What becomes of each value of config.json in a GGUF file: carried, or refused by name.

llama.cpp's converter drops keys that it does not know, and a graph of the runtime has constants where a model's class reads
config.json: a file written all the same computes something else and says nothing.  Here is, family by family, what the pinned
converter (``conversion/*.py``) writes and the pinned graph (``src/models/*.cpp``) reads of the config class (transformers 5.24's
``configuration_*.py``; the remote code of Kimi-K2 and Ling):

- ``CARRIED``: the file says it, or the shapes of its tensors do;
- :class:`Only`: the graph computes one thing, so only values that mean it are accepted;
- a judge: depends on several keys, or is carried by keys that the runtime reads and the converter does not write; a few of
  these only the patched runtime reads (``config_rules.PATCHED``).

``tests/export/test_config_values.py`` changes every key of every family on a small model: what changes transformers' logits
changes the file's alike, or is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.models.config_rules import INERT, OURS, Config, Judgement
from mobe_gguf.models.config_tables import VALUES

__all__ = ["INERT", "VALUES", "Judgement", "check_values", "for_converter", "judge", "unlisted"]

#: Keys of other families, or of forks, that change what a model computes, and the values that do not.  Where a family's class
#: does not know one, the model's own code may: another value is refused.
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


def judge(family: str, config: Config) -> Judgement:
    """What a file of this model would compute otherwise, and what is done so that it does not."""
    values, judgement = VALUES[family], Judgement()
    judgement.hparams |= values.implied
    for key, only in values.only.items():
        value = config.get(key, only.default)
        if not any(value is a or (type(value) is type(a) and value == a) for a in only.allowed):
            judgement.refuse(key, value if key in config else f"{value} (the default)", only.computes)
    for check in values.judges:
        check(config, judgement)
    for key, value in config.items():
        if key in MATTERS and key not in values.known and value not in (*MATTERS[key], []):
            judgement.refuse(key, value, f"knows no such key in the family {family}")
    return judgement


def check_values(family: str, config: Config, where: Any) -> Judgement:
    """:func:`judge`, with a MobeError that names every key and value that a file cannot carry; ``where``: the model."""
    judgement = judge(family, config)
    if judgement.refused:
        raise MobeError(
            f"{where}/config.json: {'; '.join(judgement.refused)}. A GGUF file of this model would give other answers than the "
            "model, so none is written"
        )
    return judgement


def for_converter(family: str, hparams: Mapping[str, Any], judgement: Judgement) -> dict[str, Any]:
    """``hparams`` without what the family's class does not read (the converter would write some of it), with what is implied."""
    known = VALUES[family].known
    return {k: v for k, v in hparams.items() if k in known} | judgement.hparams


def unlisted(family: str, keys: Iterator[str]) -> list[str]:
    """Those of a config class's ``keys`` that the tables do not know: for the test that notices a new one."""
    return sorted(set(keys) - VALUES[family].known - OURS)
