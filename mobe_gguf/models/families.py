"""The model families: their keys in config.json and their tensor names.

Each has one :class:`Family` declaration; no other module depends on a model type.  To add a family, add a declaration to
:data:`FAMILIES` and a tiny model of it to ``tests/tiny.py``.

Sources: the ``configuration_*.py`` and ``modeling_*.py`` of transformers 4.57 and 5, and the remote code of
the DeepSeek, Kimi-K2 and Ling (Bailing) repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.models.layout import GATE_UP

Config = Mapping[str, Any]


def every_layer(config: Config, layer: int) -> bool:
    """Mixtral, OLMoE: all layers are MoE."""
    return True


def after_leading_dense(config: Config, layer: int) -> bool:
    """DeepSeek, Kimi-K2, Bailing: the first ``first_k_dense_replace`` layers are dense.  Of the others, one in
    ``moe_layer_freq`` is MoE (a number, or a list with 1 for each MoE layer)."""
    if layer < _count(config, "first_k_dense_replace", 0):
        return False
    freq = config.get("moe_layer_freq")
    if not isinstance(freq, list):
        return layer % _count(config, "moe_layer_freq", 1) == 0
    if layer >= len(freq) or not all(isinstance(entry, int) for entry in freq):
        raise MobeError(
            f"config.json: 'moe_layer_freq' must be a number or a list with 0 or 1 for each layer, got {freq!r}"
        )
    return bool(freq[layer])


def by_sparse_step(config: Config, layer: int) -> bool:
    """Qwen2-MoE, Qwen3-MoE: one layer in ``decoder_sparse_step`` is MoE, ``mlp_only_layers`` are not."""
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(index) is int for index in dense):
        raise MobeError(f"config.json: 'mlp_only_layers' must be a list of layers, got {dense!r}")
    return layer not in dense and (layer + 1) % _count(config, "decoder_sparse_step", 1) == 0


def by_layer_list(config: Config, layer: int) -> bool:
    """GLM-4.7-Flash, EXAONE, DeepSeek-V3.2: ``mlp_layer_types`` calls each layer "dense" or "sparse"; without it the first
    layers are dense."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return after_leading_dense(config, layer)
    if not isinstance(kinds, list) or layer >= len(kinds) or not all(k in ("dense", "sparse") for k in kinds):
        raise MobeError(
            f"config.json: 'mlp_layer_types' must say 'dense' or 'sparse' of each layer, got {kinds!r}"
        )
    return bool(kinds[layer] == "sparse")


def between(config: Config, layer: int) -> bool:
    """ERNIE-4.5: one layer in ``moe_layer_interval``, from ``moe_layer_start_index`` to ``moe_layer_end_index`` (-1: the
    last)."""
    start, step = _count(config, "moe_layer_start_index", 0), _count(config, "moe_layer_interval", 1)
    end = config.get("moe_layer_end_index", -1)
    if type(end) is not int:
        raise MobeError(f"config.json: 'moe_layer_end_index' must be an integer, got {end!r}")
    return layer >= start and (end < 0 or layer <= end) and (layer + 1) % step == 0


def after_dense_layers(config: Config, layer: int) -> bool:
    """LFM2, AfMoE: the first ``num_dense_layers`` are dense."""
    return layer >= _count(config, "num_dense_layers", 0)


def _count(config: Config, key: str, default: int) -> int:
    """A non-negative integer; ``default`` if it is missing, null or 0."""
    value = config.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise MobeError(f"config.json: '{key}' must be an integer that is not negative, got {value!r}")
    return value or default


_GATED_MLP = MappingProxyType({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})


@dataclass(frozen=True)
class Family:
    """How one family of MoE models is stored on disk.

    ``*_keys``: spellings of one config key, which differ between transformers 5 and earlier versions; the first one present
    counts.  ``is_moe(config, layer)``: whether a layer has routed experts.  ``architecture``: the class in transformers,
    which llama.cpp's converter uses as well.  ``remote``: the ``model_types`` without a class in transformers.

    ``projections``: ``gate``, ``up``, ``down`` -> the tensor's own name.  ``fused``: where one tensor holds all experts,
    which projections share it, in order.  ``block``: the MoE block where each expert has its own tensor; ``fused_block``:
    the block where one tensor holds all.  ``renamed``: other tensors of the block whose names differ between the two,
    ``{name beside fused experts: name beside single ones}``.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    remote: tuple[str, ...] = ()
    n_expert_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    n_expert_used_keys: tuple[str, ...] = ("num_experts_per_tok",)
    n_ff_exp_keys: tuple[str, ...] = ("moe_intermediate_size",)
    n_embd_keys: tuple[str, ...] = ("hidden_size",)
    n_layer_keys: tuple[str, ...] = ("num_hidden_layers",)
    is_moe: Callable[[Config, int], bool] = every_layer
    block: str = "model.layers.{layer}.mlp"
    projections: Mapping[str, str] = field(default_factory=lambda: _GATED_MLP)
    fused: tuple[tuple[str, ...], ...] = GATE_UP
    router_name: str = "gate.weight"
    fused_block: str = "model.layers.{layer}.mlp"
    renamed: Mapping[str, str] = field(default_factory=dict)
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    output: str = "lm_head.weight"
    tied_keys: tuple[str, ...] = ("tie_word_embeddings",)
    tied_default: bool = False

    def is_tied(self, config: Config) -> bool:
        """Whether the output matrix is tied to the embeddings."""
        return bool(next((config[key] for key in self.tied_keys if key in config), self.tied_default))

    # numbers from config.json

    def n_expert(self, config: Config) -> int:
        """n: routed experts in a MoE layer."""
        return _number(config, self.n_expert_keys, self.name)

    def n_expert_used(self, config: Config) -> int:
        """k: experts that a token uses."""
        return _number(config, self.n_expert_used_keys, self.name)

    def n_ff_exp(self, config: Config) -> int:
        """p: intermediate size of one routed expert."""
        return _number(config, self.n_ff_exp_keys, self.name)

    def n_embd(self, config: Config) -> int:
        """d: hidden size."""
        return _number(config, self.n_embd_keys, self.name)

    def n_layer(self, config: Config) -> int:
        """Number of layers, including dense ones, without multi-token-prediction layers."""
        return _number(config, self.n_layer_keys, self.name)

    def moe_layers(self, config: Config) -> tuple[int, ...]:
        """The layers that have routed experts according to config.json."""
        return tuple(i for i in range(self.n_layer(config)) if self.is_moe(config, i))

    # names of tensors

    def block_name(self, layer: int) -> str:
        """Prefix of the MoE block, without a final dot."""
        return self.block.format(layer=layer)

    def router(self, layer: int, fused: bool = False) -> str:
        """The matrix ``[n, d]`` that chooses a token's experts; ``fused``: beside :meth:`fused_weight`."""
        if not fused:
            return f"{self.block_name(layer)}.{self.router_name}"
        name = next((f for f, own in self.renamed.items() if own == self.router_name), self.router_name)
        return f"{self.fused_block.format(layer=layer)}.{name}"

    def own_name(self, name: str, layer: int) -> str:
        """Translate the name of a tensor in a layer's block from the fused layout to the one with single experts."""
        prefix = self.fused_block.format(layer=layer) + "."
        rest = name.removeprefix(prefix)
        if rest == name:
            return name
        rest = next((own + rest[len(f) :] for f, own in self.renamed.items() if rest.startswith(f)), rest)
        return f"{self.block_name(layer)}.{rest}"

    def expert_weight(self, layer: int, expert: int, projection: str) -> str:
        """One expert's matrix: W ``[p, d]`` in an original model, A ``[p, r]`` in a MoBE checkpoint (of down ``[d, p]`` and
        ``[r, p]``)."""
        return f"{self.block_name(layer)}.experts.{expert}.{self.projections[projection]}.weight"

    def fused_weight(self, layer: int, projection: str) -> str:
        """Name of the tensor that holds all experts, as ``save_pretrained(..., save_original_format=False)`` of transformers 5
        writes it: gate and up together ``[n, 2p, d]`` (gate first), down ``[n, d, p]``.  It is in ``fused_block``, whatever
        the block's name in the classic layout."""
        together = next(found for found in self.fused if projection in found)
        return f"{self.fused_block.format(layer=layer)}.experts.{'_'.join(together)}_proj"

    def basis(self, layer: int, projection: str, group: int | None = None) -> str:
        """B in a MoBE checkpoint: ``[m, r, d]``, or ``[m/g, r, d]`` of one group (of down ``[m, d, r]``)."""
        return f"{self.block_name(layer)}.B_{projection}" + ("" if group is None else f"_{group}")

    def mix(self, layer: int, projection: str, group: int | None = None) -> str:
        """alpha in a MoBE checkpoint: ``[n, m]`` (row by row ``[n, m, r]``, of down ``[n, m, d]``), or one group's share."""
        return f"{self.block_name(layer)}.W_{projection}" + ("" if group is None else f"_{group}")


def _number(config: Config, keys: tuple[str, ...], family: str) -> int:
    """The value of the first of ``keys`` in ``config``: a positive integer, or a list with the same one for each layer."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MobeError(f"config.json: '{key}' must be a positive integer, got {value!r}")
        return value
    names = " or ".join(f"'{key}'" for key in keys)
    raise MobeError(f"config.json: no {names}, which the family {family} needs. Is the file complete?")


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
)

#: Families by name.
BY_NAME: Mapping[str, Family] = MappingProxyType({family.name: family for family in FAMILIES})


def layer_in(name: str) -> int:
    """The layer to which a tensor belongs; -1 if none."""
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
        "gpt_oss": ("GptOssForCausalLM", "biases of experts, interleaved gate and up, MXFP4"),
        "granitemoe": ("GraniteMoeForCausalLM", "experts in linear layers of three dimensions"),
        "granitemoehybrid": ("GraniteMoeHybridForCausalLM", "experts in linear layers of three dimensions"),
        "granitemoeshared": ("GraniteMoeSharedForCausalLM", "experts in linear layers of three dimensions"),
        "jetmoe": ("JetMoeForCausalLM", ""),
        "llama4": ("Llama4ForConditionalGeneration", "transposed fused experts, multimodal"),
        "nemotron_h": ("NemotronHForCausalLM", "experts without gate"),
        "phimoe": (
            "PhiMoEForCausalLM",
            "llama.cpp weighs the two experts by their softmax, the model by SparseMixer",
        ),
        "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "linear attention, multimodal"),
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
