"""Which type each tensor gets: pure functions, a table and the exceptions to it.

``--quant X`` gives a tensor the type that ``llama-quantize`` gives it under the same name X, so that a file
says of itself what a llama.cpp user expects of it: rules ported from ``tensor_allows_quantization``,
``llama_tensor_get_type_impl``, ``tensor_type_fallback`` and ``tensor_requires_imatrix`` of the pinned tree's
``src/llama-quant.cpp``.  ``tests/export/test_recipe.py`` holds this port against the tool itself.  Two consequences worth knowing: ``q4_k`` means ``q4_k_m`` there, so it does here (``--pure`` gives one type
throughout); and the bases count as ``ffn_gate``/``ffn_up`` matrices, the mix is never quantized, for
its name does not end in ``weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mobe_gguf.errors import UsageError

#: Types that a tensor can be given: ggml name -> values a block.
BLOCK = {
    "f32": 1,
    "f16": 1,
    "bf16": 1,
    "q8_0": 32,
    "q4_0": 32,
    "q4_1": 32,
    "q5_0": 32,
    "q5_1": 32,
    "iq4_nl": 32,
    "mxfp4": 32,
    "q2_0": 64,
    "q1_0": 128,
    "q2_k": 256,
    "q3_k": 256,
    "q4_k": 256,
    "q5_k": 256,
    "q6_k": 256,
    "iq1_s": 256,
    "iq1_m": 256,
    "iq2_xxs": 256,
    "iq2_xs": 256,
    "iq2_s": 256,
    "iq3_xxs": 256,
    "iq3_s": 256,
    "iq4_xs": 256,
    "tq1_0": 256,
    "tq2_0": 256,
}

FLOATS = ("f32", "f16", "bf16")

#: Values of ``--quant``: name -> (type of most tensors, LlamaFileType for ``general.file_type``).
QUANTS = {
    "f32": ("f32", "ALL_F32"),
    "f16": ("f16", "MOSTLY_F16"),
    "bf16": ("bf16", "MOSTLY_BF16"),
    "q8_0": ("q8_0", "MOSTLY_Q8_0"),
    "q6_k": ("q6_k", "MOSTLY_Q6_K"),
    "q5_k_m": ("q5_k", "MOSTLY_Q5_K_M"),
    "q5_k_s": ("q5_k", "MOSTLY_Q5_K_S"),
    "q5_1": ("q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("q5_0", "MOSTLY_Q5_0"),
    "q4_k_m": ("q4_k", "MOSTLY_Q4_K_M"),
    "q4_k_s": ("q4_k", "MOSTLY_Q4_K_S"),
    "iq4_nl": ("iq4_nl", "MOSTLY_IQ4_NL"),
    "iq4_xs": ("iq4_xs", "MOSTLY_IQ4_XS"),
    "q4_1": ("q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("q4_0", "MOSTLY_Q4_0"),
    "mxfp4_moe": ("mxfp4", "MOSTLY_MXFP4_MOE"),
    "iq3_m": ("iq3_s", "MOSTLY_IQ3_M"),
    "iq3_s": ("iq3_s", "MOSTLY_IQ3_S"),
    "iq3_xs": ("iq3_s", "MOSTLY_IQ3_XS"),
    "iq3_xxs": ("iq3_xxs", "MOSTLY_IQ3_XXS"),
    "q3_k_l": ("q3_k", "MOSTLY_Q3_K_L"),
    "q3_k_m": ("q3_k", "MOSTLY_Q3_K_M"),
    "q3_k_s": ("q3_k", "MOSTLY_Q3_K_S"),
    "q2_k": ("q2_k", "MOSTLY_Q2_K"),
    "q2_k_s": ("q2_k", "MOSTLY_Q2_K_S"),
    "iq2_m": ("iq2_s", "MOSTLY_IQ2_M"),
    "iq2_s": ("iq2_xs", "MOSTLY_IQ2_S"),
    "iq2_xs": ("iq2_xs", "MOSTLY_IQ2_XS"),
    "iq2_xxs": ("iq2_xxs", "MOSTLY_IQ2_XXS"),
    "iq1_m": ("iq1_m", "MOSTLY_IQ1_M"),
    "iq1_s": ("iq1_s", "MOSTLY_IQ1_S"),
    "tq2_0": ("tq2_0", "MOSTLY_TQ2_0"),
    "tq1_0": ("tq1_0", "MOSTLY_TQ1_0"),
    "q2_0": ("q2_0", "MOSTLY_Q2_0"),
    "q1_0": ("q1_0", "MOSTLY_Q1_0"),
}

#: llama-quantize's own short forms (tools/quantize/quantize.cpp, QUANT_OPTIONS).
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

#: ``tensor_requires_imatrix``: types that are garbage without an importance matrix.  Embeddings and output, of which
#: llama-imatrix collects nothing, may have them; the encoders of ENCODER_NEEDS refuse even then.
NEED_IMATRIX = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
ENCODER_NEEDS = ("iq1_s", "iq2_xxs", "iq2_xs")

#: Values of ``--quant`` around two bits, which share their rules.
AROUND_TWO_BITS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")

#: ``tensor_type_fallback``: type with long blocks -> type with blocks of 32 for rows that the long ones do not divide.
#: There is none for q1_0.
FALLBACK = {
    "iq1_s": "iq4_nl",
    "iq1_m": "iq4_nl",
    "iq2_xxs": "iq4_nl",
    "iq2_xs": "iq4_nl",
    "iq2_s": "iq4_nl",
    "iq3_xxs": "iq4_nl",
    "iq3_s": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "q2_0": "q4_0",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}

#: ``tensor_allows_quantization``: parts of names that stay as they are.  Architectures without routed experts
#: have more of these; they never come here.
KEEP = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "attn_rel_b.weight",
    "position_embd",
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
class Facts:
    """What the rules ask of the model, from its GGUF keys; ``n_layer`` is ``block_count``."""

    n_layer: int
    n_expert: int
    n_gqa: int

    @classmethod
    def of(cls, arch: str, keys: Mapping[str, object]) -> Facts:
        """From GGUF keys and values; what is missing counts as llama.cpp counts it."""

        def number(name: str, default: int) -> int:
            value = keys.get(f"{arch}.{name}", default)
            return int(value[0] if isinstance(value, (list, tuple)) else value)  # type: ignore[call-overload]

        n_head = number("attention.head_count", 1)
        n_head_kv = number("attention.head_count_kv", n_head)
        return cls(
            number("block_count", 1), number("expert_count", 0), n_head // n_head_kv if n_head_kv else 0
        )


@dataclass(frozen=True)
class Choice:
    """The type a tensor gets; ``wanted`` differs from it where the row length forced another."""

    type: str
    wanted: str


@dataclass(frozen=True)
class Recipe:
    """What the user asked for.

    ``quant``: key of QUANTS.  ``overrides``: (regular expression, type) pairs, the first that is found in a
    tensor's name counts, as llama-quantize's ``--tensor-type``.  ``basis``, ``transform``, ``down``: types of all B,
    all A and all down projections of experts.  ``output``, ``embedding``: types of ``output.weight`` and
    ``token_embd.weight``.  ``pure``: one type for everything that is quantized at all.  ``imatrix``: files of
    llama-imatrix, see ``export/imatrix.py``; some rules differ when there is one.
    """

    quant: str
    basis: str | None = None
    transform: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    down: str | None = None
    output: str | None = None
    embedding: str | None = None
    imatrix: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        return QUANTS[self.quant][0]

    @property
    def file_type(self) -> str:
        """Name in gguf's LlamaFileType."""
        return QUANTS[self.quant][1]


def parse_quant(text: str) -> str:
    """A value of ``--quant`` in any case -> key of QUANTS; UsageError lists the known ones."""
    name = text.lower()
    name = ALIASES.get(name, name)
    if name in QUANTS:
        return name
    raise UsageError(f"--quant {text}: unknown type. Known: {', '.join([*QUANTS, *ALIASES])}.")


def parse_type(option: str, text: str) -> str:
    """A ggml type's name in any case -> key of BLOCK; UsageError names ``option`` and lists the known ones."""
    name = text.lower()
    if name in BLOCK:
        return name
    hint = " That is a mixture of types, a value of --quant." if name in {*QUANTS, *ALIASES} else ""
    raise UsageError(f"{option} {text}: unknown type.{hint} Known: {', '.join(BLOCK)}.")


def parse_override(text: str) -> tuple[str, str]:
    """``REGEX=TYPE`` -> (regex, type)."""
    pattern, separator, type_name = text.rpartition("=")
    if not separator or not pattern:
        raise UsageError(f"--tensor-type {text}: expected REGEX=TYPE, for instance ffn_down_exps=q6_k")
    try:
        re.compile(pattern)
    except re.error as e:
        raise UsageError(f"--tensor-type {text}: {pattern!r} is not a regular expression: {e}") from e
    return pattern, parse_type("--tensor-type", type_name)


def plan(specs: Iterable[Spec], recipe: Recipe, facts: Facts) -> dict[str, Choice]:
    """The type of every tensor, by name.

    UsageError if an override's pattern is found in the name of no tensor that may be quantized, or a type has no
    fallback for rows that its blocks do not divide.
    """
    specs = sorted(specs, key=lambda s: (_layer(s.name), s.name))  # llama_model_loader's weight_name_comparer
    state = _State(recipe, facts)
    state.n_attention_v = sum(_category(s.name) in ATTENTION_V_LIKE for s in specs)
    state.tied = all(s.name != "output.weight" for s in specs)
    unused = {pattern for pattern, _ in recipe.overrides}
    choices = {}
    for spec in specs:
        if not allows_quantization(spec):
            choices[spec.name] = Choice("f32", "f32")
            continue
        wanted = _asked_for(spec, recipe, unused)
        if wanted is None:
            mixed = recipe.base not in FLOATS and not recipe.pure
            wanted = state.type_of(spec) if mixed else recipe.base
        if wanted not in FALLBACK and 32 < BLOCK[wanted] and spec.row % BLOCK[wanted]:
            raise UsageError(
                f"tensor {spec.name}: rows of {spec.row} are no whole blocks of {BLOCK[wanted]} ({wanted}), and llama.cpp "
                f"defines no type to take instead. Choose one: --tensor-type '{re.escape(spec.name)}=q4_0'"
            )
        choices[spec.name] = Choice(fit(wanted, spec.row), wanted)
    if unused:
        raise UsageError(
            f"--tensor-type {sorted(unused)[0]}=...: no tensor that can be quantized has a name like that. "
            "Names look like blk.0.ffn_gate_exps.weight, blk.0.ffn_gate_basis.weight, blk.0.attn_q.weight."
        )
    return choices


def _asked_for(spec: Spec, recipe: Recipe, unused: set[str]) -> str | None:
    """The type that an option names for this tensor.  As in llama-quantize, ``--tensor-type`` comes after the options
    for the embeddings and the output."""
    found = next((pair for pair in recipe.overrides if re.search(pair[0], spec.name)), None)
    if found is not None:
        unused.discard(found[0])
    category = _category(spec.name)
    if category == "embd" and recipe.embedding and not (found and spec.name.startswith("per_layer")):
        return recipe.embedding
    if category == "output" and recipe.output:
        return recipe.output
    if found is not None:
        return found[1]
    if is_basis(spec.name):
        return recipe.basis
    if is_transform(spec.name):
        return recipe.transform
    return recipe.down if is_down(spec.name) else None


def requires_imatrix(name: str, type_name: str, quant: str) -> bool:
    """``tensor_requires_imatrix``, and what the encoder itself requires."""
    if type_name in ENCODER_NEEDS:
        return True
    if name in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"):
        return False
    return type_name in NEED_IMATRIX or (type_name == "q2_k" and quant == "q2_k_s")


def allows_quantization(spec: Spec) -> bool:
    """``tensor_allows_quantization``: matrices and stacks of them whose name ends in ``weight``, but for a few."""
    return spec.n_dims >= 2 and spec.name.endswith("weight") and not any(part in spec.name for part in KEEP)


def fit(type_name: str, row: int) -> str:
    """``tensor_type_fallback``: ``type_name``, or what replaces it in rows that its blocks do not divide."""
    if row % BLOCK[type_name] == 0:
        return type_name
    smaller = FALLBACK.get(type_name, type_name)
    return smaller if row % BLOCK[smaller] == 0 else "f16"


def is_basis(name: str) -> bool:
    return re.fullmatch(r"blk\.\d+\.ffn_(gate|up)_basis\.weight", name) is not None


def is_transform(name: str) -> bool:
    """True for the name that A has where the layer is factorized, and the experts' where it is not."""
    return re.fullmatch(r"blk\.\d+\.ffn_(gate|up)_exps\.weight", name) is not None


def is_down(name: str) -> bool:
    return re.fullmatch(r"blk\.\d+\.ffn_down_exps\.weight", name) is not None


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


#: ``tensor_get_category``: the first part that is found in the name decides.
CATEGORIES = {
    "attn_qkv.weight": "qkv",
    "attn_kv_b.weight": "kv_b",
    "attn_v.weight": "v",
    "attn_k.weight": "k",
    "attn_q.weight": "q",
    "attn_output.weight": "attn_out",
    "ffn_up": "up",
    "ffn_gate": "gate",
    "ffn_down": "down",
}
ATTENTION_V_LIKE = ("v", "qkv", "kv_b")


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embd"
    return next((category for part, category in CATEGORIES.items() if part in name), "other")


#: Type of the token embeddings where it is not that of most tensors.
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


@dataclass
class _State:
    """``llama_tensor_get_type_impl`` with its counters.

    Left out: the 70B rule (a dense model of 80 layers) and Falcon, which have no experts, and two architectures of no
    family here (GLM5-Next, BailingMoE3).
    """

    recipe: Recipe
    facts: Facts
    n_attention_v: int = 0
    tied: bool = True
    seen_attention_v: int = field(default=0, init=False)
    seen_down: int = field(default=0, init=False)

    @property
    def quant(self) -> str:
        return self.recipe.quant

    @property
    def base(self) -> str:
        return self.recipe.base

    def type_of(self, spec: Spec) -> str:
        category, layer = _category(spec.name), _layer(spec.name)
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
        if category == "down":
            return self._down(layer)
        if category == "attn_out":
            return self._attention_out()
        n = self.facts.n_layer
        if category in ("gate", "up") and self.quant == "iq3_xs" and n // 8 <= layer < 7 * n // 8:
            return "iq3_xxs"
        return self.base

    def _next_attention_v(self) -> int:
        self.seen_attention_v += 1
        return self.seen_attention_v - 1

    def _output(self, spec: Spec) -> str:
        if self.recipe.output is not None:  # tied embeddings; output.weight itself was asked for before
            return self.recipe.output
        if self.quant == "mxfp4_moe" or spec.row % BLOCK[self.base]:
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
        if category == "down":  # counted, not by layer: shared experts count too
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
            "iq3_xxs": "q4_k" if gqa4 else "iq3_xxs" if self.recipe.imatrix else "iq3_s",
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
        n, imatrix = self.facts.n_layer, bool(self.recipe.imatrix)
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


#: With 8 experts the attention's output is small beside them, and gets five bits under these values of ``--quant``.
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


def _more_bits(i: int, n: int) -> bool:
    """``use_more_bits``: the first and last eighth, and one in three between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
