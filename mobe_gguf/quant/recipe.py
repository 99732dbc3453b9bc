"""Which type each tensor gets: pure functions, a table and the exceptions to it.

``--quant X`` gives a tensor the same type as ``llama-quantize`` under the name X, so the name means what a llama.cpp user
expects.  The rules are ported from ``tensor_allows_quantization``, ``tensor_type_fallback`` and ``tensor_requires_imatrix``
in the pinned tree's ``src/llama-quant.cpp``; ``mixture`` has the mixtures.  ``tests/quant/test_recipe.py`` compares this
port with the tool itself.

Consequences: ``q4_k`` means ``q4_k_m``, as it does there (``--pure`` gives one type throughout).  The bases count as
``ffn_gate``/``ffn_up`` matrices.  The mix is never quantized, because its name does not end in ``weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.tensors import is_basis, is_down, is_transform
from mobe_gguf.quant.allocate import Target
from mobe_gguf.quant.mixture import ATTENTION_V_LIKE, Mixture, ModelFacts, Spec, category_of, in_order

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

#: Mixtures of this project, which llama-quantize does not know: the type of most tensors, and those of the experts.  For files
#: rounded by second moments; their measured KL divergence is in docs/quality.md.
MIXES = {
    "two-bit": ("iq4_xs", ((r"ffn_(gate|up|gate_up)_exps\.", "iq2_xxs"), (r"ffn_down_exps\.", "iq2_s"))),
    "one-bit": ("iq4_xs", ((r"ffn_(gate|up|gate_up)_exps\.", "q1_0"), (r"ffn_down_exps\.", "iq2_xxs"))),
}

#: Types without a fast product of routed experts somewhere in the pinned tree (docs/parts.md).
SLOW = {
    "tq1_0": "no product of experts on CUDA, which leaves them to the CPU",
    "tq2_0": "no product of experts on CUDA, which leaves them to the CPU",
}

#: ``tensor_requires_imatrix``: types that are useless without an importance matrix.  Embeddings and output may have them
#: even without one, because llama-imatrix collects nothing for these.  The encoders of ENCODER_NEEDS refuse even then.
NEED_IMATRIX = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
ENCODER_NEEDS = ("iq1_s", "iq2_xxs", "iq2_xs")

#: ``tensor_type_fallback``: type with long blocks -> type with blocks of 32, for rows not divisible by the long blocks.
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

#: ``tensor_allows_quantization``: tensors with these parts in their names are not quantized.  Architectures without routed
#: experts have more of them, but do not occur here.
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
class Choice:
    """The type that a tensor gets; ``wanted`` differs where the row length forced another type."""

    type: str
    wanted: str


@dataclass(frozen=True)
class Recipe:
    """What the user asked for.

    ``quant``: key of QUANTS; that of MIXES becomes its two parts.  ``overrides``: (regular expression, type) pairs as in
    llama-quantize's ``--tensor-type``; the first that matches a part of the tensor's name counts.  ``basis``, ``transform``, ``down``: types of all B, all A and all
    down projections of experts (of their A's, where down is factorized).  ``output``, ``embedding``: types of
    ``output.weight`` and ``token_embd.weight``.  ``pure``: one type for everything that is quantized.

    ``imatrix``: files of llama-imatrix, see ``export/imatrix.py``; some rules differ when there is one.  ``moments``: a file
    of `mobe-gguf moments`, see ``export/rounding.py``; it serves as an importance matrix, too.

    ``target``: the size of the file.  It decides the types of the experts' matrices and bases that no other option names.
    ``rest``: key of QUANTS for the tensors that are not factors, when factors of a GGUF file are exported; None leaves them
    as they are in that file.
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
    target: Target | None = None
    moments: str | None = None
    rest: str | None = None

    def __post_init__(self) -> None:
        if self.quant in MIXES:
            quant, experts = MIXES[self.quant]
            object.__setattr__(self, "quant", quant)
            object.__setattr__(self, "overrides", (*self.overrides, *experts))

    @property
    def base(self) -> str:
        return QUANTS[self.quant][0]

    @property
    def file_type(self) -> str:
        """Name in gguf's LlamaFileType."""
        return QUANTS[self.quant][1]


def parse_quant(text: str, *, mixes: bool = True) -> str:
    """A value of ``--quant`` in upper or lower case -> key of QUANTS or, with ``mixes``, MIXES; UsageError lists the known values."""
    name = text.lower()
    name = ALIASES.get(name, name)
    known = [*QUANTS, *ALIASES, *(MIXES if mixes else ())]
    if name in known:
        return name
    raise UsageError(f"--quant {text}: unknown type. Known: {', '.join(known)}.")


def parse_type(option: str, text: str) -> str:
    """A ggml type's name in upper or lower case -> key of BLOCK; UsageError names ``option`` and lists the known types."""
    name = text.lower()
    if name in BLOCK:
        return name
    hint = " That is a mixture of types, a value of --quant." if name in {*QUANTS, *ALIASES, *MIXES} else ""
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


def plan(specs: Iterable[Spec], recipe: Recipe, facts: ModelFacts) -> dict[str, Choice]:
    """The type of every tensor, by name.

    UsageError if an override's pattern matches no tensor that may be quantized, or if a type has no fallback for rows
    that its blocks do not divide.
    """
    specs = in_order(specs)
    state = Mixture(
        recipe.quant,
        recipe.base,
        BLOCK[recipe.base],
        facts,
        recipe.output,
        imatrix=bool(recipe.imatrix or recipe.moments),
    )
    state.n_attention_v = sum(category_of(s.name) in ATTENTION_V_LIKE for s in specs)
    state.tied = all(s.name != "output.weight" for s in specs)
    unused = {pattern for pattern, _ in recipe.overrides}
    bases = {s.name for s in specs if is_basis(s.name)}
    choices = {}
    for spec in specs:
        if not allows_quantization(spec):
            choices[spec.name] = Choice("f32", "f32")
            continue
        wanted = _asked_for(spec, recipe, unused, spec.name.replace("_exps.", "_basis.") in bases)
        if wanted is None:
            mixed = recipe.base not in FLOATS and not recipe.pure
            wanted = state.type_of(spec) if mixed else recipe.base
        if wanted not in FALLBACK and 32 < BLOCK[wanted] and spec.row % BLOCK[wanted]:
            raise UsageError(
                f"tensor {spec.name}: rows of {spec.row} are no whole blocks of {BLOCK[wanted]} ({wanted}), and llama.cpp "
                f"defines no type to take instead. Choose one: --tensor-type '{re.escape(spec.name)}=q4_0'"
            )
        choices[spec.name] = Choice(fitting_type(wanted, spec.row), wanted)
    if unused:
        raise _without_effect(sorted(unused)[0], recipe, [s.name for s in specs if allows_quantization(s)])
    return choices


def _without_effect(pattern: str, recipe: Recipe, names: list[str]) -> UsageError:
    """A message about an override whose pattern set the type of no tensor in ``names``."""
    name = next((name for name in names if re.search(pattern, name)), None)
    if name is None:
        return UsageError(
            f"--tensor-type {pattern}=...: no tensor that can be quantized has a name like that. "
            "Names look like blk.0.ffn_gate_exps.weight, blk.0.ffn_gate_basis.weight, blk.0.attn_q.weight."
        )
    earlier, type_name = next(pair for pair in recipe.overrides if re.search(pair[0], name))
    return UsageError(
        f"--tensor-type {pattern}=...: every tensor that it fits has its type by an earlier one, {name} for instance by "
        f"{earlier}={type_name}. The first that fits counts: put this one before it, or leave it out."
    )


def _asked_for(spec: Spec, recipe: Recipe, unused: set[str], has_basis: bool) -> str | None:
    """The type that an option names for this tensor.  As in llama-quantize, the options for the embeddings and the output
    take precedence over ``--tensor-type``.  ``has_basis``: whether the tensor has a basis beside it."""
    found = next((pair for pair in recipe.overrides if re.search(pair[0], spec.name)), None)
    if found is not None:
        unused.discard(found[0])
    category = category_of(spec.name)
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
    if is_down(spec.name):
        return recipe.down or (recipe.transform if has_basis else None)
    return None


def is_fixed(spec: Spec, recipe: Recipe, has_basis: bool) -> bool:
    """Whether an option names the type of this tensor.  ``has_basis``: whether the tensor has a basis beside it."""
    return _asked_for(spec, recipe, set(), has_basis) is not None


def is_named(spec: Spec, recipe: Recipe) -> bool:
    """Whether an option names this tensor, which is not a factor, so that it does not keep its type."""
    category = category_of(spec.name)
    return (
        any(re.search(pattern, spec.name) for pattern, _ in recipe.overrides)
        or (category == "embd" and recipe.embedding is not None)
        or (category == "output" and recipe.output is not None)
        or (is_down(spec.name) and recipe.down is not None)
    )


def requires_imatrix(name: str, type_name: str, quant: str) -> bool:
    """``tensor_requires_imatrix``, plus the encoder's own requirements."""
    if type_name in ENCODER_NEEDS:
        return True
    if name in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"):
        return False
    return type_name in NEED_IMATRIX or (type_name == "q2_k" and quant == "q2_k_s")


def allows_quantization(spec: Spec) -> bool:
    """``tensor_allows_quantization``: true for matrices and stacks of matrices whose name ends in ``weight``, with a few
    exceptions."""
    return spec.n_dims >= 2 and spec.name.endswith("weight") and not any(part in spec.name for part in KEEP)


def fitting_type(type_name: str, row: int) -> str:
    """``tensor_type_fallback``: ``type_name``, or its replacement for rows that its blocks do not divide."""
    if row % BLOCK[type_name] == 0:
        return type_name
    smaller = FALLBACK.get(type_name, type_name)
    return smaller if row % BLOCK[smaller] == 0 else "f16"
