"""What the rules on config.json are made of: keys with only one accepted value, judges, and what they find.

A judge is a function that looks at several keys of config.json and adds to a :class:`Judgement`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Only:
    """A key for which the runtime supports only one value; ``computes`` describes what it computes.  ``default``: the config
    class's default for a missing key."""

    allowed: tuple[Any, ...]
    computes: str
    default: Any = None


@dataclass
class Judgement:
    """The result of the rules.  ``refused``: one line for each thing that the file would compute differently.  ``notes``: what
    a user should know.  ``hparams``: values that replace those of config.json for the converter.  ``keys``: GGUF keys to set,
    without the architecture's prefix.  ``alike``: values with which transformers computes what the file does, where it comes
    close without them."""

    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hparams: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, int | float] = field(default_factory=dict)
    alike: dict[str, Any] = field(default_factory=dict)

    def refuse(self, key: str, value: Any, computes: str) -> None:
        self.refused.append(f"'{key}' is {value!r}, and the runtime {computes}")


Judge = Callable[[Config, Judgement], None]

#: Keys that do not change logits: training, dropout, caches, output options, names, and those of the tokenizer, which has
#: its own file.
INERT = frozenset(
    "_name_or_path add_cross_attention architectures attention_dropout auto_map aux_loss_alpha bos_token_id chunk_size_feed_forward "
    "dtype embedding_dropout eos_token_id ep_size finetuning_task id2label initializer_range is_decoder is_encoder_decoder label2id "
    "model_type output_attentions output_dropout output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type "
    "return_dict router_aux_loss_coef router_jitter_noise seq_aux task_specific_params torch_dtype transformers_version use_cache "
    "quantization_config tokenizer_class num_nextn_predict_layers num_mtp_layers".split()
)

#: Keys that factorizing writes into config.json; only this package reads them.
OURS = frozenset(("num_B", "activation", "mobe"))

COMMON = frozenset(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads num_experts_per_tok rms_norm_eps "
    "max_position_embeddings rope_parameters rope_scaling rope_theta tie_word_embeddings is_causal".split()
)
SILU = Only(("silu", "swish"), "computes silu", "silu")
NO_BIAS = Only((False, None), "has no such biases", False)


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Values:
    """One family: keys that are carried, keys with one accepted value, and judges.  ``implied``: values that its class uses
    when config.json lacks them, and that the converter does not know."""

    carried: frozenset[str]
    only: Mapping[str, Only]
    judges: tuple[Judge, ...]
    implied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        """Keys that the family's class reads, and the inert ones.  The converter gets only these."""
        return self.carried | frozenset(self.only) | INERT | COMMON


def names(names: str) -> frozenset[str]:
    return frozenset(names.split())
