"""The rules used in ``config_tables``, except those on rotary embeddings: judges, see ``judgement``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mobe_gguf.models.config_rope import rope_of
from mobe_gguf.models.judgement import Config, Judge, Judgement, is_int


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


def every_second_has_a_window(config: Config, judgement: Judgement) -> None:
    """gpt-oss: the first of two layers has a window, the second full attention."""
    kinds, n_layer = config.get("layer_types"), config.get("num_hidden_layers") or 0
    if kinds is not None and kinds != [
        ("sliding_attention", "full_attention")[i % 2] for i in range(n_layer)
    ]:
        judgement.refuse("layer_types", kinds, "has a window in every second layer, from the first on")
    window = config.get("sliding_window", 128)
    if not is_int(window) or window < 1:
        judgement.refuse("sliding_window", window, "has a window in every second layer")
    judgement.hparams["sliding_window"] = window


def granite_scales(config: Config, judgement: Judgement) -> None:
    """Granite: the runtime takes a factor of 0 as "none", and needs the logits' divisor."""
    for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
        value = config.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
            judgement.refuse(key, value, "takes 0 for no factor")
        judgement.hparams[key] = value


def granite_layers(config: Config, judgement: Judgement) -> None:
    """Granite's hybrid: transformers has two spellings of ``layer_types``, the converter knows one.  The file says whether
    attention has rotary embeddings; the converter guesses it."""
    spelled = {"linear_attention": "mamba", "full_attention": "attention"}
    kinds = config.get("layer_types") or config.get("layers_block_type")
    kinds = [spelled.get(kind, kind) for kind in kinds] if isinstance(kinds, list) else kinds
    if not isinstance(kinds, list) or set(kinds) - {"mamba", "attention"}:
        judgement.refuse("layer_types", kinds, "knows 'mamba' and 'attention'")
    elif missing := {"mamba", "attention"}.difference(kinds):
        judgement.refuse("layer_types", kinds, f"needs a layer of {missing.pop()!r}")
    judgement.hparams["layer_types"] = kinds
    judgement.keys["rope.scaling.finetuned"] = config.get("position_embedding_type") == "rope"


def twice_as_wide(config: Config, judgement: Judgement) -> None:
    """Granite's Mamba-2 in the runtime: the state's inputs are twice as wide as the model."""
    width, heads, size = (config.get(key) for key in ("hidden_size", "mamba_n_heads", "mamba_d_head"))
    if is_int(width) and is_int(heads) and is_int(size) and heads * size != 2 * width:
        judgement.refuse("mamba_n_heads", heads, f"needs {2 * width} / mamba_d_head, twice hidden_size")
    if config.get("mamba_expand", 2) != 2:
        judgement.refuse("mamba_expand", config["mamba_expand"], "has 2")


def no_time_limits(config: Config, judgement: Judgement) -> None:
    """Mamba-2: the runtime does not limit time steps, and the converter pads the vocabulary."""
    limit = config.get("time_step_limit")
    if limit is not None and not (
        isinstance(limit, list | tuple) and len(limit) == 2 and limit[0] == 0 and _infinite(limit[1])
    ):
        judgement.refuse("time_step_limit", limit, "does not limit time steps")
    vocabulary = config.get("vocab_size")
    if is_int(vocabulary) and vocabulary % 8:
        judgement.refuse("vocab_size", vocabulary, "needs a multiple of 8")


def _infinite(value: Any) -> bool:
    """Infinity, as ``json`` reads it or as transformers 5 writes it."""
    return value == math.inf or (isinstance(value, Mapping) and value.get("__float__") == "Infinity")


def nemotron_layers(config: Config, judgement: Judgement) -> None:
    """Nemotron-H: layers are Mamba-2, attention or experts, the first two at least once; beside experts there is no dense
    MLP."""
    key = "layers_block_type" if config.get("layers_block_type") is not None else "hybrid_override_pattern"
    kinds = config.get(key) or []
    spelled = {
        "linear_attention": "M",
        "mamba": "M",
        "full_attention": "*",
        "attention": "*",
        "moe": "E",
        "mlp": "-",
    }
    letters = [spelled.get(kind, kind) for kind in kinds]
    if other := [kind for kind, letter in zip(kinds, letters, strict=True) if letter not in ("M", "*", "E")]:
        judgement.refuse(key, other[0], "knows Mamba-2, attention and experts beside each other")
    elif not {"*", "M"}.issubset(letters):
        judgement.refuse(key, kinds, "needs a layer with attention and one of Mamba-2")
    judgement.hparams |= {"layers_block_type": None, "hybrid_override_pattern": "".join(letters)}
    judgement.hparams["num_hidden_layers"] = len(letters)
    judgement.hparams |= {"rope_parameters": {}, "rope_scaling": None}  # it has no rotary embedding


def least_time_step(config: Config, judgement: Judgement) -> None:
    """Nemotron-H: transformers lets no time step be shorter than ``time_step_min``; the runtime, as the model's own CUDA code,
    does."""
    least = config.get("time_step_min", 0.001)
    if not isinstance(least, int | float) or least > 0.001:
        judgement.refuse("time_step_min", least, "lets time steps be shorter")
    elif least > TINY:
        judgement.notes.append(
            f"config.json: 'time_step_min' is {least}; transformers lets no time step be shorter, llama.cpp does"
        )
        judgement.alike["time_step_min"] = TINY


#: No time step is shorter; zero would have no logarithm, which transformers takes.
TINY = 1e-30


def sigmoid_groups(config: Config, judgement: Judgement) -> None:
    """Nemotron-H: as ``v3_groups``, but the converter always writes the number of groups."""
    v3_groups(config, judgement)
    if judgement.hparams.get("n_group", 1) is None:
        judgement.hparams |= {"n_group": 1, "topk_group": 1}


def llama4_layers(config: Config, judgement: Judgement) -> None:
    """Llama-4: every ``interleave_moe_layer_step``-th layer has experts; every fourth layer has full attention and no rotary
    embedding, all others attend to chunks."""
    n_layer, step = config.get("num_hidden_layers") or 0, config.get("interleave_moe_layer_step", 1)
    if not is_int(step) or step < 1:
        judgement.refuse("interleave_moe_layer_step", step, "needs a positive number")
        return
    judgement.hparams["interleave_moe_layer_step"] = step
    expected = {
        "moe_layers": list(range(step - 1, n_layer, step)),
        "layer_types": ["chunked_attention" if (i + 1) % 4 else "full_attention" for i in range(n_layer)],
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(n_layer)],
    }
    for key, value in expected.items():
        if (said := config.get(key)) not in (None, [], value):
            judgement.refuse(key, said, f"computes {value}")
    interval = config.get("no_rope_layer_interval", 4)
    if interval != 4 and not config.get("no_rope_layers"):
        judgement.refuse("no_rope_layer_interval", interval, "has 4")


def llama4_attention(config: Config, judgement: Judgement) -> None:
    """Llama-4: chunks of 8192 and a temperature from there on; queries and keys are normed except in models of 128 experts."""
    context, chunk = config.get("max_position_embeddings", 131072), config.get("attention_chunk_size", 8192)
    beyond = not is_int(context) or context > 8192
    if chunk != 8192 and (beyond or not is_int(chunk) or chunk < context):
        judgement.refuse("attention_chunk_size", chunk, "attends to chunks of 8192")
    if beyond and not config.get("attn_temperature_tuning", True):
        judgement.refuse("attn_temperature_tuning", False, "tunes the temperature")
    norms = config.get("num_local_experts", 16) != 128
    if config.get("use_qk_norm", True) is not norms:
        judgement.refuse(
            "use_qk_norm",
            not norms,
            f"norms queries and keys {'always' if norms else 'never'} with so many experts",
        )


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
