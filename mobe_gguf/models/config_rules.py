"""The rules used in ``config_tables``: keys with only one accepted value, and judges, functions that look at several keys.

A judge reads config.json and adds to a :class:`Judgement`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from mobe_gguf.core.errors import MobeError

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
    without the architecture's prefix."""

    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hparams: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, int | float] = field(default_factory=dict)

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


def windows(config: Config, judgement: Judgement, used: bool) -> None:
    """Attention windows: the runtime's graphs for these families have full attention only."""
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    if used and window is not None and not (is_int(context) and is_int(window) and window >= context):
        judgement.refuse(
            "sliding_window",
            window,
            "attends to all tokens before; where the model was not trained with a window, set it to null",
        )


def sliding_if_used(config: Config, judgement: Judgement) -> None:
    """Qwen, Bailing: the window is used only if ``use_sliding_window`` is set."""
    windows(config, judgement, bool(config.get("use_sliding_window")))


def sliding(config: Config, judgement: Judgement) -> None:
    """Mixtral: a window is used if one is given."""
    windows(config, judgement, True)


def all_layers_attend(config: Config, judgement: Judgement) -> None:
    """``layer_types`` of any family: only full attention, or a window that is not used."""
    types = config.get("layer_types")
    other = [t for t in types if t != "full_attention"] if isinstance(types, list) else []
    if other and not (other == ["sliding_attention"] * len(other) and not config.get("sliding_window")):
        judgement.refuse("layer_types", types, "computes full attention in every layer")


def all_layers_moe(config: Config, judgement: Judgement) -> None:
    """Qwen: no layer may be dense, because the graph has no dense layers."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers")
    if step not in (1, 0, None):
        judgement.refuse("decoder_sparse_step", step, "has experts in every layer")
    if dense:
        judgement.refuse("mlp_only_layers", dense, "has experts in every layer")


def leading_dense(config: Config, judgement: Judgement) -> None:
    """DeepSeek: all dense layers must come first."""
    freq = config.get("moe_layer_freq")
    first, n_layer = config.get("first_k_dense_replace") or 0, config.get("num_hidden_layers") or 0
    if isinstance(freq, list):
        if freq[first:n_layer] != [1] * (n_layer - first) or any(freq[:first]):
            judgement.refuse("moe_layer_freq", freq, f"has experts in every layer from {first} on")
    elif freq not in (None, 0, 1):
        judgement.refuse("moe_layer_freq", freq, f"has experts in every layer from {first} on")


def heads_fill_width(config: Config, judgement: Judgement) -> None:
    """Qwen2-MoE, OLMoE: the graph requires a head size of hidden_size / num_attention_heads."""
    head, heads, width = (config.get(k) for k in ("head_dim", "num_attention_heads", "hidden_size"))
    if head is not None and is_int(heads) and head * heads != width:
        judgement.refuse("head_dim", head, f"takes heads of {width} / {heads}, of hidden_size")


def equal_heads(config: Config, judgement: Judgement) -> None:
    """As many key heads as query heads: OLMoE norms both over the same width, DeepSeek has keys for each head."""
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        judgement.refuse("num_key_value_heads", kv_heads, f"takes as many as num_attention_heads, {heads}")


def some_shared(key: str) -> Judge:
    """The graph always adds a shared expert, so there must be one."""

    def judge(config: Config, judgement: Judgement) -> None:
        value = config.get(key)
        if not is_int(value) or value < 1:
            judgement.refuse(key, value, "adds a shared expert in every layer")

    return judge


def olmoe_epsilon(config: Config, judgement: Judgement) -> None:
    """The converter writes an epsilon of 1e-5 and ignores config.json, so the true one is set here."""
    judgement.keys["attention.layer_norm_rms_epsilon"] = float(config.get("rms_norm_eps", 1e-5))


def mla_epsilon(config: Config, judgement: Judgement) -> None:
    """DeepSeek's norms of the compressed queries and keys use 1e-6, but the file has one epsilon for all norms."""
    epsilon = config.get("rms_norm_eps", 1e-6)
    if epsilon > 1e-4:
        judgement.refuse(
            "rms_norm_eps",
            epsilon,
            "takes it for the norms of compressed queries and keys, too, which have 1e-6",
        )
    elif epsilon != 1e-6:
        judgement.notes.append(
            f"config.json: 'rms_norm_eps' is {epsilon}; llama.cpp takes it for the norms of compressed queries and keys, too, "
            "where transformers takes 1e-6"
        )


def query_rank(config: Config, judgement: Judgement) -> None:
    """DeepSeek: the runtime guesses from the number of layers whether queries are compressed."""
    n_layer, vocab, rank = (config.get(k) for k in ("num_hidden_layers", "vocab_size", "q_lora_rank"))
    plain = n_layer in (26, 27) or (n_layer == 48 and vocab == 128256)
    if plain and rank:
        judgement.refuse("q_lora_rank", rank, f"reads none in models of {n_layer} layers")
    elif not plain and not rank:
        judgement.keys["attention.q_lora_rank"] = 0


def rotary_head(config: Config, judgement: Judgement) -> None:
    """DeepSeek: ``head_dim`` can only repeat ``qk_rope_head_dim``."""
    head, rotary = config.get("head_dim"), config.get("qk_rope_head_dim")
    if head is not None and rotary is not None and head != rotary:
        judgement.refuse("head_dim", head, f"rotates qk_rope_head_dim, {rotary}, dimensions")


def scaling_factor(config: Config, judgement: Judgement) -> None:
    """The runtime takes 0 as "no factor"."""
    if config.get("routed_scaling_factor", 1.0) == 0:
        judgement.refuse("routed_scaling_factor", 0, "takes 0 for 1")


#: Settings carried by keys that only the patched llama.cpp reads.
PATCHED = "only the runtime of mobe-gguf build reads that; an unpatched llama.cpp loads the file and gives other answers"


def normalized_if_said(stock: bool) -> Judge:
    """Whether routing weights are divided by their sum; in unpatched graphs this is the constant ``stock``."""

    def judge(config: Config, judgement: Judgement) -> None:
        value = bool(config.get("norm_topk_prob", False))
        if value != stock:
            judgement.keys["norm_topk_prob"] = value
            judgement.notes.append(
                f"config.json: 'norm_topk_prob' is {value}, which the file says by a key of that name; {PATCHED}"
            )

    return judge


def v2_groups(config: Config, judgement: Judgement) -> None:
    """DeepSeek-V2 chooses groups by their best expert, unpatched runtimes by their best two; "greedy" uses no groups."""
    method, groups = config.get("topk_method", "greedy"), config.get("n_group") or 1
    if config.get("num_hidden_layers") in (47, 48) and config.get("vocab_size") == 154880:
        judgement.hparams["scoring_func"] = "softmax"  # the runtime would assume another model, with sigmoid
    if method == "greedy" and groups != 1:
        judgement.hparams |= {"n_group": None, "topk_group": None}
    elif groups != 1 and method == "group_limited_greedy":
        v3_groups(config, judgement)
        if judgement.hparams.get("n_group", groups) is not None:
            judgement.keys["expert_group_top_count"] = 1
            judgement.notes.append(
                f"config.json: 'topk_method' is '{method}', which chooses groups of experts by their best one; the file says so by "
                f"the key expert_group_top_count; {PATCHED}"
            )
    if method not in ("greedy", "group_limited_greedy"):
        judgement.refuse("topk_method", method, "knows 'greedy' and 'group_limited_greedy'")


def v2_norm(config: Config, judgement: Judgement) -> None:
    """With ``norm_topk_prob``, transformers' class, DeepSeek's own code and the runtime compute three different results."""
    if config.get("norm_topk_prob"):
        judgement.refuse(
            "norm_topk_prob",
            config["norm_topk_prob"],
            "normalizes and then multiplies by routed_scaling_factor; transformers does not normalize, and DeepSeek's own code "
            "does not multiply",
        )


def v3_groups(config: Config, judgement: Judgement) -> None:
    """Groups of experts: none are written if all groups are used, because the runtime would stop with an assertion."""
    groups, used, n = (config.get(k) for k in ("n_group", "topk_group", "n_routed_experts"))
    if groups in (None, 1):
        return
    if groups == used:
        judgement.hparams |= {"n_group": None, "topk_group": None}
    elif not is_int(groups) or not is_int(n) or groups < 1 or n % groups or groups >= n:
        judgement.refuse("n_group", groups, f"needs groups of two or more that divide {n} experts")
    elif not is_int(used) or not 1 <= used < groups:
        judgement.refuse("topk_group", used, f"needs 1 to {groups}, as many groups as there are")


def rope_of(config: Config) -> dict[str, Any]:
    """The rotary parameters from either spelling: ``rope_parameters`` of transformers 5, or ``rope_theta`` and
    ``rope_scaling``."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        raise MobeError(f"config.json: 'rope_scaling' must be an object, got {said!r}")
    rope = dict(said)
    rope.setdefault("rope_type", rope.get("type") or "default")
    return rope


def _magnitude(factor: float, scale: float = 1.0) -> float:
    """``1 + 0.1 scale ln(factor)``, YaRN's correction of attention."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn_magnitude(rope: Mapping[str, Any], factor: float) -> float:
    """The factor by which transformers multiplies cosines and sines (``modeling_rope_utils.py``)."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _magnitude(factor, rope["mscale"]) / _magnitude(factor, rope["mscale_all_dim"])
    return _magnitude(factor)


def rotary(*kinds: str, latent: bool = False, partial_too: bool = False) -> Judge:
    """Rotary scaling: no scaling and the ``kinds`` can be carried.  ``latent``: DeepSeek's graph, which also scales all of
    attention.  ``partial_too``: the file says how many dimensions are rotated."""

    def judge(config: Config, judgement: Judgement) -> None:
        rope = rope_of(config)
        kind, partial = (
            rope["rope_type"],
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor")),
        )
        if partial not in (None, 1, 1.0) and not partial_too:
            judgement.refuse("partial_rotary_factor", partial, "rotates all dimensions")
        if kind == "dynamic":
            judgement.notes.append(
                "config.json: rope scaling 'dynamic' begins beyond max_position_embeddings, the file's context length; llama.cpp "
                "has none there"
            )
            return
        if kind not in ("default", *kinds):
            judgement.refuse("rope_type", kind, f"knows {', '.join(kinds) or 'no scaling'} in this family")
            return
        if rope.get("truncate") is False and kind == "yarn":
            judgement.refuse("truncate", False, "rounds the range of YaRN's ramp to whole dimensions")
        factor = rope.get("factor")
        if kind in ("linear", "yarn"):
            if not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 1:
                judgement.refuse("factor", factor, f"needs a number from 1 on for rope_type '{kind}'")
            elif factor > 1:
                _scale_attention(rope, float(factor), kind, latent, judgement)

    return judge


def _scale_attention(
    rope: Mapping[str, Any], factor: float, kind: str, latent: bool, judgement: Judgement
) -> None:
    """Set keys so that the runtime scales rotated dimensions and attention as transformers does.

    ``llama-context.cpp`` multiplies rotated dimensions by ``attn_factor (1 + 0.1 ln factor)``.  With a yarn_log_multiplier L
    (``src/models/deepseek2.cpp``) it multiplies them by ``attn_factor``, and all of attention by
    ``(attn_factor (1 + L ln factor))^2``.
    """
    rotated = _yarn_magnitude(rope, factor) if kind == "yarn" else 1.0
    whole = _magnitude(factor)
    if not latent:
        if kind == "yarn" and not math.isclose(rotated, whole, rel_tol=1e-7):
            judgement.keys["rope.scaling.attn_factor"] = rotated / whole
        return
    attention = _magnitude(factor, rope["mscale_all_dim"]) if rope.get("mscale_all_dim") else 1.0
    multiplier = (attention / (rotated if kind == "yarn" else whole) - 1) / math.log(factor)
    attn_factor = rotated
    if kind == "yarn" and abs(multiplier) < 1e-9:  # L of 0: the runtime's other branch
        multiplier, attn_factor = 0.0, rotated / whole
    judgement.keys["rope.scaling.yarn_log_multiplier"] = multiplier
    if not math.isclose(attn_factor, 1.0, rel_tol=1e-7):
        judgement.keys["rope.scaling.attn_factor"] = attn_factor


def sparse_behind(config: Config, judgement: Judgement) -> None:
    """``mlp_layer_types``: all dense layers must come first."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        leading_dense(config, judgement)
        return
    dense = kinds.count("dense") if isinstance(kinds, list) else 0
    if not isinstance(kinds, list) or kinds[:dense] != ["dense"] * dense:
        judgement.refuse("mlp_layer_types", kinds, "has dense layers before all others alone")
    judgement.hparams["first_k_dense_replace"] = dense


def ernie_layers(config: Config, judgement: Judgement) -> None:
    """In the runtime, MoE layers continue to the last layer."""
    end, n_layer = config.get("moe_layer_end_index"), config.get("num_hidden_layers")
    if end not in (None, -1) and not (is_int(end) and is_int(n_layer) and end >= n_layer - 1):
        judgement.refuse("moe_layer_end_index", end, "has experts to the last layer")


def ernie_shared(config: Config, judgement: Judgement) -> None:
    """The converter guesses the width of the shared experts, so the true width is passed on."""
    width, shared = (config.get(k) for k in ("moe_intermediate_size", "moe_num_shared_experts"))
    if is_int(width) and is_int(shared) and shared:
        judgement.keys["expert_shared_feed_forward_length"] = width * shared


def rotary_width(config: Config, judgement: Judgement) -> None:
    """MiniMax: the converter reads only ``rotary_dim``."""
    partial, head = rope_of(config).get("partial_rotary_factor"), config.get("head_dim")
    if config.get("rotary_dim") is None and is_int(head):
        judgement.hparams["rotary_dim"] = int(head * (1.0 if partial is None else partial))


def by_layer(key: str, default: int) -> Judge:
    """Hunyuan: the converter needs a list with one value for each layer; all values must be equal."""

    def judge(config: Config, judgement: Judgement) -> None:
        value = config.get(key) or default
        values = value if isinstance(value, list) else [value]
        if any(v != values[0] for v in values):
            judgement.refuse(key, value, "has the same in every layer")
        judgement.hparams[key] = [values[0]] * (config.get("num_hidden_layers") or 1)

    return judge


def hunyuan_rope(config: Config, judgement: Judgement) -> None:
    """Hunyuan's "dynamic" scaling has its own rotary base, which the converter computes only for the published values."""
    rope, heads = rope_of(config), config.get("num_attention_heads")
    head = (config.get("hidden_size") or 0) // heads if is_int(heads) and heads else 0
    if rope["rope_type"] == "dynamic" and (rope.get("alpha"), rope.get("rope_theta", 10000.0), head) != (
        1000,
        10000,
        128,
    ):
        judgement.refuse("alpha", rope.get("alpha"), "knows 1000, with rope_theta 10000 and heads of 128")


def hunyuan_width(config: Config, judgement: Judgement) -> None:
    """transformers uses ``intermediate_size`` for experts, the runtime ``moe_intermediate_size``."""
    width = config.get("moe_intermediate_size")
    widths = {*(width if isinstance(width, list) else [width]), config.get("intermediate_size")} - {None}
    if len(widths) != 1:
        judgement.refuse(
            "moe_intermediate_size", width, "needs experts of intermediate_size, as transformers has them"
        )
        return
    judgement.hparams["moe_intermediate_size"] = [*widths] * (config.get("num_hidden_layers") or 1)


def every_fourth_attends_to_all(config: Config, judgement: Judgement) -> None:
    """AfMoE: every fourth layer has full attention and no rotary embedding, all others a window."""
    kinds, n_layer = config.get("layer_types"), config.get("num_hidden_layers") or 0
    expected = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(n_layer)]
    if kinds is not None and kinds != expected:
        judgement.refuse("layer_types", kinds, "has a window in all layers but every fourth")


def linear_heads(config: Config, judgement: Judgement) -> None:
    """Linear attention: in the runtime, heads of keys and values have the same size."""
    key, value = (config.get(k) for k in ("linear_key_head_dim", "linear_value_head_dim"))
    if key != value:
        judgement.refuse("linear_value_head_dim", value, f"takes that of keys, {key}")


def linear_or_full(config: Config, judgement: Judgement) -> None:
    """``layer_types``: linear or full attention."""
    types = config.get("layer_types") or []
    if other := [t for t in types if t not in ("linear_attention", "full_attention")]:
        judgement.refuse("layer_types", other[0], "knows linear and full attention")


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
