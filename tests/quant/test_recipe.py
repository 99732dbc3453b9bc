"""The types of ``recipe``: against the real llama-quantize, and by themselves."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from export.handmade import make_mobe
from hypothesis import given
from hypothesis import strategies as st

from mobe_gguf import runtime
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.export import Recipe, export, parse_override, parse_quant, parse_type
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.quant.recipe import (
    ALIASES,
    BLOCK,
    ENCODER_NEEDS,
    MIXES,
    NEED_IMATRIX,
    QUANTS,
    ModelFacts,
    Spec,
    allows_quantization,
    fitting_type,
    plan,
    requires_imatrix,
)
from mobe_gguf.runtime import ggml

FACTS = ModelFacts(n_layer=8, n_expert=16, n_gqa=4)
SPECS = [
    Spec("token_embd.weight", (384, 256)),
    Spec("output.weight", (384, 256)),
    Spec("output_norm.weight", (256,)),
    *(
        Spec(f"blk.{i}.{name}", shape)
        for i in range(8)
        for name, shape in {
            "attn_v.weight": (64, 256),
            "attn_output.weight": (256, 256),
            "attn_norm.weight": (256,),
            "ffn_gate_inp.weight": (16, 256),
            "ffn_gate_exps.weight": (16, 768, 768),
            "ffn_gate_basis.weight": (4, 768, 256),
            "ffn_gate_basis.mix": (16, 4),
            "ffn_down_exps.weight": (16, 256, 768),
        }.items()
    ),
]

#: Models in which the rules differ: tied embeddings; 8 experts and rows of 288; MLA, no grouped queries.
MODELS = {
    "tied": ("qwen3_moe", dict(num_hidden_layers=17, moe_intermediate_size=256, num_experts=2,
                               num_key_value_heads=1, tie_word_embeddings=True)),
    "eight": ("mixtral", dict(num_hidden_layers=9, intermediate_size=288, num_key_value_heads=4)),
    "mla": ("deepseek_v3", dict(num_hidden_layers=9, moe_intermediate_size=256, n_routed_experts=2, n_group=1,
                                topk_group=1, kv_lora_rank=256)),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_types_are_those_of_llama_quantize(case: str, model: Callable[..., Path], tmp_path: Path) -> None:
    """Every value of --quant, with and without --pure."""
    family, sizes = MODELS[case]
    plain = tmp_path / "f32.gguf"
    report = export(
        model(family, hidden_size=256, **sizes), plain, Recipe("f32"), allow_dense=True, quiet=True
    )
    specs, file = [Spec(e.name, e.shape) for e in report.entries], read_gguf(plain)
    facts = ModelFacts.of(file.arch, file.keys)
    for quant in (*QUANTS, *ALIASES):
        for pure in (False, True):
            if quant == "q1_0" and any(s.row % BLOCK["q1_0"] for s in specs if allows_quantization(s)):
                continue  # llama-quantize ends in an exception, and plan() in an error: it has no type to take instead
            options = ["--dry-run", *["--pure"][:pure]]
            command = [runtime.tool("llama-quantize"), *options, plain, quant.upper()]
            said = subprocess.run(command, check=True, capture_output=True, text=True)
            lines = re.findall(
                r"\[ *\d+/ *\d+\] (\S+) .* type = +(\w+),.*?(?:\((\w+)\))?$", said.stdout + said.stderr, re.M
            )
            expected = {name: (new or old).lower() for name, old, new in lines}
            choices = plan(specs, Recipe(parse_quant(quant), pure=pure), facts)
            assert {name: c.type for name, c in choices.items()} == expected, (quant, pure)


def test_types_of_factors_of_down_are_those_of_llama_quantize(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    """A and B of down are both down matrices to it: they get the bits of these, and count as two of them."""
    sizes = dict(hidden_size=256, num_hidden_layers=9, moe_intermediate_size=256, num_experts=2)
    source = make_mobe(model("qwen3_moe", **sizes), tmp_path / "mobe", m=2, projections=ALL_PROJECTIONS)
    report = export(source, tmp_path / "f32.gguf", Recipe("f32"), quiet=True)
    specs, file = [Spec(e.name, e.shape) for e in report.entries], read_gguf(tmp_path / "f32.gguf")
    for quant in ("q4_k_m", "q3_k_m", "q4_k_s", "iq2_m", "iq3_xs", "mxfp4_moe"):
        command = [runtime.tool("llama-quantize"), "--dry-run", tmp_path / "f32.gguf", quant.upper()]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        found = re.findall(
            r"\[ *\d+/ *\d+\] (\S+) .* type = +(\w+),.*?(?:\((\w+)\))?$", said.stdout + said.stderr, re.M
        )
        choices = plan(specs, Recipe(quant), ModelFacts.of(file.arch, file.keys))
        assert {n: c.type for n, c in choices.items()} == {n: (b or a).lower() for n, a, b in found}, quant
        if quant == "q4_k_m":
            assert choices["blk.0.ffn_down_basis.weight"].type == "q6_k"


def test_options_for_factors_of_down() -> None:
    """--basis-type and --transform-type are for all factors; --down-type for what has the name of down."""

    def types(factorized: bool, **options: str) -> dict[str, str]:
        names = ["exps.weight", "basis.weight", "basis.mix"] if factorized else ["exps.weight"]
        specs = [*SPECS, *(Spec(f"blk.0.ffn_down_{name}", (4, 256, 768)) for name in names)]
        choices = plan(specs, Recipe("q4_k_m", **options), FACTS)
        return {name: choices[f"blk.0.ffn_down_{name}"].type for name in names}

    assert types(True) == {"exps.weight": "q6_k", "basis.weight": "q6_k", "basis.mix": "f32"}
    asked = types(True, basis="q3_k", transform="q5_k")
    assert (asked["exps.weight"], asked["basis.weight"]) == ("q5_k", "q3_k")
    asked = types(True, transform="q5_k", down="q8_0")
    assert (asked["exps.weight"], asked["basis.weight"]) == ("q8_0", "q6_k")
    assert types(False, transform="q5_k") == {"exps.weight": "q6_k"}


def test_bytes_are_those_of_llama_quantize(model: Callable[..., Path], tmp_path: Path) -> None:
    """Same source, same type, same encoder: the same tensors, and the same ``general.file_type``."""
    source = model(
        "qwen2_moe", hidden_size=256, moe_intermediate_size=256, num_hidden_layers=1, num_experts=2
    )
    plain, theirs, ours = (tmp_path / f"{name}.gguf" for name in ("f32", "theirs", "ours"))
    export(source, plain, Recipe("f32"), allow_dense=True, quiet=True)
    subprocess.run(
        [runtime.tool("llama-quantize"), plain, theirs, "Q4_K", "2"], check=True, capture_output=True
    )
    export(source, ours, Recipe(parse_quant("q4_k")), allow_dense=True, quiet=True)
    _same_bytes(ours, theirs)


def _same_bytes(ours: Path, theirs: Path) -> None:
    a, b = read_gguf(ours), read_gguf(theirs)
    assert a.keys["general.file_type"] == b.keys["general.file_type"]
    for name, info in a.tensors.items():
        data = np.fromfile(ours, np.uint8, info.n_bytes, offset=info.offset)
        want = np.fromfile(theirs, np.uint8, info.n_bytes, offset=b.tensors[name].offset)
        np.testing.assert_array_equal(data, want, err_msg=name)


def test_table_agrees_with_libggml() -> None:
    known = ggml.types()
    assert {name: known[name].block for name in BLOCK} == BLOCK
    assert all(known[name].encodes for name in BLOCK)
    assert {name for name in BLOCK if known[name].requires_imatrix} == set(ENCODER_NEEDS)
    assert set(ENCODER_NEEDS) < set(NEED_IMATRIX) < set(BLOCK)
    runtime.use_conversion()
    import gguf

    for base, file_type in QUANTS.values():
        assert base in BLOCK and file_type in gguf.LlamaFileType.__members__


def test_which_types_need_an_imatrix() -> None:
    """The rule of llama-quantize: embeddings and output go without, unless the encoder itself cannot."""
    assert requires_imatrix("blk.0.ffn_down_exps.weight", "iq2_s", "iq2_m")
    assert not requires_imatrix("token_embd.weight", "iq2_s", "iq2_m")
    assert requires_imatrix("token_embd.weight", "iq2_xs", "iq2_xs")
    assert requires_imatrix("blk.0.attn_q.weight", "q2_k", "q2_k_s")
    assert not requires_imatrix("blk.0.attn_q.weight", "q2_k", "q2_k")
    assert not requires_imatrix("blk.0.attn_q.weight", "iq3_s", "iq3_xs")


def test_q4_k() -> None:
    """q4_k is q4_k_m: more bits for v and down in the first and last layers and one in three between."""
    choices = plan(SPECS, Recipe(parse_quant("Q4_K")), FACTS)
    assert all(c.type == c.wanted for c in choices.values())
    types = {name: c.type for name, c in choices.items()}
    assert types["output.weight"] == "q6_k" and types["token_embd.weight"] == "q4_k"
    for i in range(8):
        more = "q6_k" if i in (0, 3, 6, 7) else "q4_k"
        assert types[f"blk.{i}.ffn_down_exps.weight"] == types[f"blk.{i}.attn_v.weight"] == more
        assert types[f"blk.{i}.ffn_gate_exps.weight"] == types[f"blk.{i}.ffn_gate_basis.weight"] == "q4_k"
        for kept in ("ffn_gate_basis.mix", "ffn_gate_inp.weight", "attn_norm.weight"):
            assert types[f"blk.{i}.{kept}"] == "f32"


def test_pure_and_options() -> None:
    types = {
        name: c.type
        for name, c in plan(
            SPECS,
            Recipe("q4_k_m", basis="q6_k", transform="q8_0", overrides=(("gate_basis", "f16"),), pure=True),
            FACTS,
        ).items()
    }
    assert (
        types["output.weight"]
        == types["blk.0.attn_v.weight"]
        == types["blk.7.ffn_down_exps.weight"]
        == "q4_k"
    )
    assert types["blk.0.ffn_gate_basis.weight"] == "f16" and types["blk.0.ffn_gate_exps.weight"] == "q8_0"


def test_options_of_llama_quantize() -> None:
    """Embeddings and output before --tensor-type, the rest after it."""
    recipe = Recipe(
        "q4_k_m", down="q5_k", output="q8_0", embedding="f16", overrides=(("output|blk.0", "q2_k"),)
    )
    types = {name: c.type for name, c in plan(SPECS, recipe, FACTS).items()}
    assert types["output.weight"] == "q8_0" and types["token_embd.weight"] == "f16"
    assert types["blk.0.ffn_down_exps.weight"] == types["blk.3.attn_output.weight"] == "q2_k"
    assert types["blk.3.ffn_down_exps.weight"] == "q5_k" and types["blk.3.ffn_gate_exps.weight"] == "q4_k"
    tied = [spec for spec in SPECS if spec.name != "output.weight"]
    choices = plan(tied, Recipe("q4_k_m", output="q8_0"), FACTS)
    assert choices["token_embd.weight"].type == "q8_0"


@given(st.sampled_from(sorted(BLOCK)), st.integers(1, 20_000))
def test_what_fits(type_name: str, row: int) -> None:
    got = fitting_type(type_name, row)
    assert row % BLOCK[got] == 0
    assert (got == type_name) == (row % BLOCK[type_name] == 0)
    assert got != "f16" or type_name == "f16" or row % (128 if type_name == "q1_0" else 32)


@pytest.mark.parametrize(
    ("wanted", "row", "got"),
    [
        ("q4_k", 1408, "q5_0"),
        ("q5_k", 704, "q5_1"),
        ("q6_k", 1408, "q8_0"),
        ("q3_k", 96, "q4_0"),
        ("q4_k", 48, "f16"),
    ],
)
def test_fallbacks(wanted: str, row: int, got: str) -> None:
    """DeepSeek-V2-Lite and Ling-Lite have experts of 1408, and so A's with rows of 1408."""
    assert fitting_type(wanted, row) == got


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parse_quant("q4_q"), ["q4_q", "q4_k_m", "q8_0", "iq4_xs"]),
        (lambda: parse_type("--basis-type", "q4_k_m"), ["--basis-type", "q4_k,", "mixture"]),
        (
            lambda: plan([Spec("output.weight", (9, 160))], Recipe("q4_0", output="q1_0"), FACTS),
            ["blocks of 128"],
        ),
        (lambda: parse_override("ffn_down"), ["REGEX=TYPE"]),
        (lambda: parse_override("=q4_k"), ["REGEX=TYPE"]),
        (lambda: parse_override("a(=q4_k"), ["regular expression"]),
        (lambda: parse_override("a=q9"), ["q9", "q8_0"]),
        (lambda: plan(SPECS, Recipe("q8_0", overrides=(("mix", "q4_0"),)), FACTS), ["mix", "no tensor"]),
        (
            lambda: plan(SPECS, Recipe("q8_0", overrides=(("gate_", "q4_0"), ("gate_exps", "q5_0"))), FACTS),
            ["gate_exps=...", "by gate_=q4_0", "before it"],
        ),
    ],
)
def test_wrong_usage(call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(UsageError) as e:
        call()
    assert all(word in e.value.message for word in words)


def test_case_does_not_matter() -> None:
    assert parse_quant("Q5_K_S") == "q5_k_s" and parse_quant("BF16") == "bf16"
    assert parse_override("blk\\.0=x=Q8_0") == ("blk\\.0=x", "q8_0")


def test_mixes_are_a_mixture_with_other_types_of_experts() -> None:
    """What the user names comes first; the rest is as in the mixture below it."""
    specs = [
        Spec(f"blk.0.{name}.weight", (4, 512, 512))
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps")
    ]
    specs += [Spec("blk.0.attn_q.weight", (512, 512)), Spec("blk.0.ffn_gate_shexp.weight", (512, 512))]
    facts = ModelFacts(1, 4, 1)
    for mix, (base, experts) in MIXES.items():
        recipe = Recipe(parse_quant(mix.upper()), overrides=(("ffn_up_exps", "q2_k"),), moments="m")
        assert recipe.quant == base and recipe.file_type == QUANTS[base][1]
        found = {name: choice.type for name, choice in plan(specs, recipe, facts).items()}
        assert found.pop("blk.0.ffn_up_exps.weight") == "q2_k"
        (_, first), (_, down) = experts
        assert found.pop("blk.0.ffn_gate_exps.weight") == found.pop("blk.0.ffn_gate_up_exps.weight") == first
        assert found.pop("blk.0.ffn_down_exps.weight") == down
        expected = plan(specs, Recipe(base, moments="m"), facts)
        assert found == {name: expected[name].type for name in found} and len(found) == 2
    with pytest.raises(UsageError, match="one-bit"):
        parse_quant("three-bit")
    with pytest.raises(UsageError, match="unknown type"):
        parse_quant("one-bit", mixes=False)
