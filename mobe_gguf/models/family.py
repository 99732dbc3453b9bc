"""What describes a model family: its keys in config.json, its layers with experts, its tensor names.  ``families`` has them all."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.models.layout import GATE_UP
from mobe_gguf.models.mxfp4 import BLOCKS

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


def by_kind(*keys: str, moe: str) -> Callable[[Config, int], bool]:
    """Nemotron-H: the first of ``keys`` that is there, a list or a text with a letter for each layer, calls MoE layers
    ``moe``, or by its first letter in upper case (of "moe" E)."""

    def is_moe(config: Config, layer: int) -> bool:
        key = next((k for k in keys if config.get(k) is not None), keys[0])
        kinds = config.get(key)
        if not isinstance(kinds, list | str) or layer >= len(kinds):
            raise MobeError(f"config.json: '{key}' must say of each layer what it is, got {kinds!r}")
        return kinds[layer] in (moe, moe[-1].upper())

    return is_moe


def by_step_or_list(config: Config, layer: int) -> bool:
    """Llama-4: ``moe_layers`` lists them; without it every ``interleave_moe_layer_step``-th layer is MoE."""
    listed = config.get("moe_layers")
    if listed is None:
        return (layer + 1) % _count(config, "interleave_moe_layer_step", 1) == 0
    if not isinstance(listed, list) or not all(type(index) is int for index in listed):
        raise MobeError(f"config.json: 'moe_layers' must be a list of layers, got {listed!r}")
    return layer in listed


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

    ``projections``: ``gate``, ``up``, ``down`` -> the tensor's own name; experts without gate have no entry for it.
    ``fused``: where one tensor holds all experts, which projections share it, in order.  ``fused_names``: other names of
    these tensors in ``fused_block`` than transformers' own.  ``transposed``: their matrices are ``[columns, rows]``.
    ``interleaved``: rows of gate and up alternate.  ``block``: the MoE block where each expert has its own tensor;
    ``fused_block``: the block where one tensor holds all.  ``renamed``: other tensors of the block whose names differ between
    the two, ``{name beside fused experts: name beside single ones}``.

    ``stacked_here``: the converter's class does not know this family's experts in all forms, so export stacks them.
    ``tiled_heads``: of linear attention; the converter writes the heads of values that share a head of keys apart.
    ``other_prefix``: what all tensors' names begin with instead in some directories, and what is replaced by it.
    ``text_key``: where config.json has the text model's values, if it is that of a model that also sees.
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
    fused_names: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    interleaved: bool = False
    stacked_here: bool = False
    tiled_heads: bool = False
    other_prefix: tuple[str, str] | None = None
    text_key: str | None = None
    router_name: str = "gate.weight"
    fused_block: str = "model.layers.{layer}.mlp"
    renamed: Mapping[str, str] = field(default_factory=dict)
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    output: str = "lm_head.weight"
    tied_keys: tuple[str, ...] = ("tie_word_embeddings",)
    tied_default: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The projections of an expert, in the order of ``ALL_PROJECTIONS``."""
        return tuple(p for p in ALL_PROJECTIONS if p in self.projections)

    def text(self, config: Config) -> dict[str, Any]:
        """The text model's values in config.json, whether they are at the top or below ``text_key``."""
        inner = config.get(self.text_key) if self.text_key is not None else None
        if not isinstance(inner, Mapping | None):
            raise MobeError(f"config.json: '{self.text_key}' must be an object, got {inner!r}")
        return {**config, **(inner or {}), "model_type": config.get("model_type")}

    def declared(self, config: Config) -> str:
        """The model type whose class in transformers declares the types of config.json's values; "" if there is none."""
        own = str(config.get("model_type"))
        return (
            own if own not in self.remote else next((t for t in self.model_types if t not in self.remote), "")
        )

    def renamed_by(self, names: Container[str]) -> Family:
        """The family with its tensors' names as they are in ``names``: with :attr:`other_prefix`, or as it is."""
        if self.other_prefix is None or self.embedding in names:
            return self
        other, own = self.other_prefix
        blocks = {k: getattr(self, k).replace(own, other, 1) for k in ("block", "embedding", "final_norm")}
        return replace(self, **blocks) if blocks["embedding"] in names else self

    def converter_name(self, name: str) -> str:
        """The name by which llama.cpp's converter knows a tensor with :attr:`other_prefix`."""
        if self.other_prefix is not None and name.startswith(self.other_prefix[0]):
            return self.other_prefix[1] + name.removeprefix(self.other_prefix[0])
        return name

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
        """d: length of an expert's input, the hidden size except where experts work in a narrower space."""
        return _number(config, self.n_embd_keys, self.name)

    def hidden_size(self, config: Config) -> int:
        """Length of a token's state."""
        return _number(config, ("hidden_size",), self.name)

    def n_layer(self, config: Config) -> int:
        """Number of layers, including dense ones, without multi-token-prediction layers; where a key has something for each
        layer, as many as there are."""
        for key in self.n_layer_keys:
            if key != "num_hidden_layers" and isinstance(value := config.get(key), list | str) and value:
                return len(value)
        return _number(config, self.n_layer_keys, self.name)

    def moe_layers(self, config: Config) -> tuple[int, ...]:
        """The layers that have routed experts according to config.json."""
        return tuple(i for i in range(self.n_layer(config)) if self.is_moe(config, i))

    # names of tensors

    def layer_name(self, layer: int) -> str:
        """Prefix of a layer's tensors, without a final dot."""
        return self.block.partition("{layer}")[0] + str(layer)

    def block_name(self, layer: int) -> str:
        """Prefix of the MoE block, without a final dot."""
        return self.block.format(layer=layer)

    def router(self, layer: int, fused: bool = False) -> str:
        """The matrix ``[n, d]`` that chooses a token's experts; ``fused``: beside :meth:`fused_weights`."""
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
        return (
            f"{self.block_name(layer)}.experts.{expert}.{self.projections.get(projection, projection)}.weight"
        )

    def fused_weights(self, layer: int, projection: str) -> tuple[str, ...]:
        """Names of the tensor that holds all experts, transformers' own first, MXFP4's last: gate and up together ``[n, 2p, d]``
        (gate first), down ``[n, d, p]``.  It is in ``fused_block``, whatever the block's name in the classic layout."""
        joined = "_".join(next((found for found in self.fused if projection in found), (projection,)))
        block = self.fused_block.format(layer=layer)
        own = [self.fused_names[joined]] if joined in self.fused_names else []
        names = (f"experts.{joined}_proj", *own, f"experts.{joined}_proj{BLOCKS}")
        return tuple(f"{block}.{name}" for name in names)

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
