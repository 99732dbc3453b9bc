"""The mixtures of types that ``llama-quantize`` calls Q4_K_M, IQ3_XS and so on.

A port of ``llama_tensor_get_type_impl`` in the pinned tree's ``src/llama-quant.cpp``, in its order.  Small or sensitive
tensors get more bits.  ``tests/quant`` compares it with the tool itself, for every name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mobe_gguf.formats.gguf import number_of

#: Values of ``--quant`` around two bits, which share rules.
AROUND_TWO_BITS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")

#: Type of the token embeddings where it differs from that of most tensors.
EMBEDDING = {
    "iq1_s": "q2_k",
    "iq1_m": "q2_k",
    "iq2_xxs": "q2_k",
    "iq2_xs": "q2_k",
    "iq2_s": "iq3_s",
    "iq2_m": "iq3_s",
    "iq3_xxs": "iq3_s",
    "tq1_0": "q4_k",
    "tq2_0": "q4_k",
    "q2_0": "q4_k",
}

#: In models with 8 experts the attention's output is relatively small.  It gets five bits for these values of ``--quant``.
FIVE_BITS_OUT_OF_EIGHT = (
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q4_k_s",
    "q4_k_m",
    "iq3_xxs",
    "iq3_xs",
    "iq3_s",
    "iq3_m",
    "iq4_nl",
    "iq4_xs",
)


@dataclass(frozen=True)
class Spec:
    """A tensor to be written; ``shape`` in torch's order, so the last number is the row length (ggml's ne0)."""

    name: str
    shape: tuple[int, ...]

    @property
    def row(self) -> int:
        return self.shape[-1]

    @property
    def n_dims(self) -> int:
        """As ggml counts them: axes of length 1 in front do not count."""
        n = len(self.shape)
        return n - next((i for i, s in enumerate(self.shape) if s != 1), n - 1)


@dataclass(frozen=True)
class ModelFacts:
    """The facts about the model that the rules need, from its GGUF keys; ``n_layer`` is ``block_count``."""

    n_layer: int
    n_expert: int
    n_gqa: int

    @classmethod
    def of(cls, arch: str, keys: Mapping[str, object]) -> ModelFacts:
        """From GGUF keys and values.  Missing values get llama.cpp's defaults.  Of a list with one value for each layer the
        first counts (as in its ``n_gqa()``).  MobeError if a value is not a number."""

        def number(name: str, default: int) -> int:
            return number_of(keys, f"{arch}.{name}", default)

        n_head = number("attention.head_count", 1)
        n_head_kv = number("attention.head_count_kv", n_head)
        return cls(
            number("block_count", 1), number("expert_count", 0), n_head // n_head_kv if n_head_kv else 0
        )


def layer_of(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def in_order(specs: Iterable[Spec]) -> list[Spec]:
    """Tensors in the order of llama_model_loader (``weight_name_comparer``), which matters because some rules count."""
    return sorted(specs, key=lambda spec: (layer_of(spec.name), spec.name))


#: ``tensor_get_category``: the first entry that the name contains decides.
CATEGORIES = {
    "attn_qkv.weight": "qkv",
    "attn_kv_b.weight": "kv_b",
    "attn_v.weight": "v",
    "attn_k.weight": "k",
    "attn_q.weight": "q",
    "attn_output.weight": "attn_out",
    "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate",
    "ffn_down": "ffn_down",
}
ATTENTION_V_LIKE = ("v", "qkv", "kv_b")


def category_of(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embd"
    return next((category for part, category in CATEGORIES.items() if part in name), "other")


@dataclass
class Mixture:
    """``llama_tensor_get_type_impl`` with its counters.

    Left out: the rules for dense models of 70B (80 layers) and Falcon, and for two architectures that no family here has
    (GLM5-Next, BailingMoE3).

    ``quant``: value of ``--quant``.  ``base``: the type of most tensors, in blocks of ``block`` values.  ``output``: type
    of the output matrix, if the user chose one.  Ask for tensors in the order of :func:`in_order`.
    """

    quant: str
    base: str
    block: int
    facts: ModelFacts
    output: str | None = None
    imatrix: bool = False
    n_attention_v: int = 0
    tied: bool = True
    seen_attention_v: int = field(default=0, init=False)
    seen_down: int = field(default=0, init=False)

    def type_of(self, spec: Spec) -> str:
        category, layer = category_of(spec.name), layer_of(spec.name)
        if category == "output" or (self.tied and category == "embd"):
            return self._output(spec)
        if self.quant == "mxfp4_moe":
            return "mxfp4" if len(spec.shape) > 2 and spec.shape[-3] > 1 else "q8_0"
        if category == "embd":
            return EMBEDDING.get(self.quant, self.base)
        if self.quant in AROUND_TWO_BITS:
            return self._around_two_bits(category)
        if category in ATTENTION_V_LIKE:
            return self._attention_v(self._next_attention_v())
        if category == "k" and self.facts.n_expert == 8:
            return "q8_0"
        if category in ("k", "q"):
            return {"iq3_xs": "iq3_xxs", "iq3_xxs": "iq2_s"}.get(self.quant, self.base)
        if category == "ffn_down":
            return self._down(layer)
        if category == "attn_out":
            return self._attention_out()
        n = self.facts.n_layer
        if category in ("ffn_gate", "ffn_up") and self.quant == "iq3_xs" and n // 8 <= layer < 7 * n // 8:
            return "iq3_xxs"
        return self.base

    def _next_attention_v(self) -> int:
        self.seen_attention_v += 1
        return self.seen_attention_v - 1

    def _output(self, spec: Spec) -> str:
        if self.output is not None:  # tied embeddings; output.weight itself was handled before
            return self.output
        if self.quant == "mxfp4_moe" or spec.row % self.block:
            return "q8_0"
        if self.quant == "iq3_xxs" or self.quant in AROUND_TWO_BITS:
            return "q5_k"
        return self.base if self.base == "q8_0" else "q6_k"

    def _around_two_bits(self, category: str) -> str:
        more = "iq3_s" if self.quant in ("iq2_s", "iq2_m") else "q2_k"
        if category in ATTENTION_V_LIKE:
            self._next_attention_v()
            return "q4_k" if self.facts.n_gqa >= 4 or self.facts.n_expert >= 4 else more
        if category == "k" and self.facts.n_expert == 8:
            return "q4_k"
        if category == "ffn_down":  # by count, not by layer: shared experts count too
            self.seen_down += 1
            return more if self.seen_down <= self.facts.n_layer // 8 else self.base
        if category == "attn_out":
            if self.facts.n_expert == 8:
                return "q5_k"
            by_quant = {"iq1_s": "iq2_xxs", "iq1_m": "iq2_xxs", "iq2_s": "iq3_s", "iq2_m": "iq3_s"}
            return by_quant.get(self.quant, self.base)
        return self.base

    def _attention_v(self, i: int) -> str:
        n, gqa4 = self.n_attention_v, self.facts.n_gqa >= 4
        by_quant = {
            "q2_k": "q4_k" if gqa4 else "q3_k",
            "q2_k_s": "q4_k" if gqa4 else self.base,
            "iq3_xxs": "q4_k" if gqa4 else "iq3_xxs" if self.imatrix else "iq3_s",
            "iq3_xs": "q4_k" if gqa4 else self.base,
            "iq3_s": "q4_k" if gqa4 else self.base,
            "iq3_m": "q4_k",
            "q3_k_m": "q5_k" if i < 2 else "q4_k",
            "q3_k_l": "q5_k",
            "iq4_nl": "q5_k" if gqa4 else self.base,
            "iq4_xs": "q5_k" if gqa4 else self.base,
            "q4_k_s": "q5_k" if i < 4 else self.base,
            "q4_k_m": "q6_k" if _more_bits(i, n) else self.base,
            "q5_k_m": "q6_k" if _more_bits(i, n) else self.base,
        }
        return "q8_0" if self.facts.n_expert == 8 else by_quant.get(self.quant, self.base)

    def _down(self, i: int) -> str:
        n, imatrix = self.facts.n_layer, self.imatrix
        first = i < n // 8
        eight_more = self.facts.n_expert == 8 and _more_bits(i, n)
        by_quant = {
            "q2_k": "q3_k",
            "q2_k_s": "q4_k" if first else self.base,
            "iq3_xxs": self.base if imatrix else "q4_k" if first else "q3_k",
            "q3_k_m": "q5_k" if i < n // 16 else "q4_k",
            "iq3_m": "q4_k" if first or eight_more else self.base,
            "q3_k_l": "q5_k",
            "q4_k_m": "q6_k" if _more_bits(i, n) else self.base,
            "iq4_nl": "q5_k" if first and not imatrix else self.base,
            "iq4_xs": "q5_k" if first and not imatrix else self.base,
            "q5_k_m": "q6_k" if _more_bits(i, n) else self.base,
            "q4_k_s": "q5_k" if first else self.base,
            "q4_0": "q4_1" if first and imatrix else self.base,
            "q5_0": "q5_1" if first and imatrix else self.base,
        }
        return by_quant.get(self.quant, self.base)

    def _attention_out(self) -> str:
        if self.facts.n_expert == 8:
            return "q5_k" if self.quant in FIVE_BITS_OUT_OF_EIGHT else self.base
        by_quant = {"q2_k": "q3_k", "iq3_xxs": "iq3_s", "q3_k_m": "q4_k", "q3_k_l": "q5_k", "iq3_m": "q4_k"}
        return by_quant.get(self.quant, self.base)


def _more_bits(i: int, n: int) -> bool:
    """``use_more_bits``: true for the first and last eighth, and every third layer between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
