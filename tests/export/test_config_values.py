"""What config.json says is what the file computes, or the model is refused with the key and its value.

The net under ``models/config_values.py``: every key of a family's config class is changed on a small model.  What changes
transformers' logits must change the file's alike, or ``export`` must refuse it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from parity.llama import logits, nmse
from parity.reference import transformers_logits
from safetensors.torch import load_file, save_file

from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError
from mobe_gguf.export import Recipe, export
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models import config_values

#: Normalized squared error of the logits: a file of the same model has 2e-13, the smallest change below 1e-4.
LIMIT = 1e-10

#: Linear attention in another order of sums; one epsilon where the class has two (see ``mla_epsilon``).
LIMITS = {"qwen3_next": 1e-8, "qwen3_5_moe_text": 1e-8, "glm4_moe_lite": 1e-9}

#: Of what is not refused, though it is not what the model computes: a note says so.
CLOSE = 1e-3

#: More than any window below.
N_TOKENS = 40

TOKENS = np.random.default_rng(0).integers(tiny._SIZES["vocab_size"], size=N_TOKENS).tolist()

#: Of every model here, so that transformers can run it and it is small.
BASE = {"num_hidden_layers": 2, "max_position_embeddings": 512}
CLASSES = tiny._CLASSES | tiny._MORE


def base_of(family: str) -> dict[str, Any]:
    """Layers of the families that came later are lists in their config: they keep them."""
    return (BASE if family in tiny._CLASSES else {"max_position_embeddings": 512}) | OWN.get(family, {})


OWN = {"mixtral": {"head_dim": 16}}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 128}

#: In place of a value: config.json does not say the key, and the class takes its default.
MISSING = "(missing)"

#: Texts of other classes, and kinds of layers that some class knows.
WORDS = {
    "hidden_act": ("gelu", "relu"),
    "mlp_hidden_act": ("silu", "gelu"),
    "mamba_hidden_act": ("gelu",),
    "topk_method": ("noaux_tc",),
    "position_embedding_type": ("rope", "nope"),
    "score_func": ("softmax",),
}
KINDS = (
    "sliding_attention",
    "full_attention",
    "chunked_attention",
    "linear_attention",
    "mamba",
    "moe",
    "mlp",
)

#: Changes of several keys, or of values that their type does not suggest.
CHANGES: tuple[dict[str, Any], ...] = (
    {"use_sliding_window": True, "sliding_window": 8},
    {"n_group": 4, "topk_group": 2},
    {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "num_experts_per_tok": 4},
    {"scoring_func": "sigmoid"},
    {"scoring_func": "softmax"},
    {"q_lora_rank": None},
    {"head_dim": 32},
    {"interleave_moe_layer_step": 1, "moe_layers": None},
    {"num_local_experts": 128, "use_qk_norm": False},
    {"no_rope_layers": [], "no_rope_layer_interval": 2},
    {"moe_latent_size": 32},
    {"position_embedding_type": "rope"} | rope("linear", factor=4.0),
    {"position_embedding_type": "rope"} | rope("yarn", **YARN),
    {"mamba_n_heads": 4, "mamba_d_head": 32},
    rope("default", partial_rotary_factor=0.5),
    rope("linear", factor=4.0),
    rope("dynamic", factor=4.0),
    rope("yarn", **YARN),
    rope("yarn", **YARN, attention_factor=1.5),
    rope("yarn", **YARN, beta_fast=16, beta_slow=2),
    rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.7),
    rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.7),
    rope("yarn", **YARN, truncate=False),
    rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    rope(
        "longrope", factor=4.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=16
    ),
)  # fmt: skip

#: Keys that are no business of a model's logits, or cannot be changed on their own.
LEFT = frozenset(
    "vocab_size hidden_size num_hidden_layers pad_token_id bos_token_id eos_token_id rope_parameters dtype id2label label2id".split()
)


def config_class(family: str) -> Any:
    return tiny.config_class(family)


def other(key: str, value: Any, default: Any) -> Iterator[Any]:
    """Values of ``key`` that are not ``value``, of the type that it has."""
    if key in WORDS:
        yield from (word for word in WORDS[key] if word != value)
    elif key in ("mlp_only_layers", "layer_types"):
        yield [0] if key == "mlp_only_layers" else ["sliding_attention", "full_attention"]
    elif isinstance(value, bool) or isinstance(default, bool):
        yield not value
    elif isinstance(value, int) or isinstance(default, int):
        yield 2 * value if value else 1
    elif isinstance(value, float):
        yield 2 * value if value else 0.5
    elif value is None:
        yield from (0.5, 8)


def further(key: str, value: Any) -> Iterator[Any]:
    """More of them, and none at all."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        yield value // 2
    elif key == "time_step_limit":
        yield from ([0.0, 0.1], [0.05, float("inf")])
    elif isinstance(value, list) and value:
        yield from (value[::-1], [value[0]] * len(value), [value[-1]] * len(value), value[:-1])
        if all(isinstance(entry, str) for entry in value):
            yield from ([kind, *value[1:]] for kind in KINDS if kind != value[0])
    if (
        value is not None and key != "time_step_min"
    ):  # a default that the model's own code does not use: a note says so
        yield MISSING


def changes(family: str, most: bool) -> Iterator[dict[str, Any]]:
    made = config_class(family)(**(tiny._SIZES | CLASSES[family][1] | base_of(family)))
    defaults = config_class(family)().to_dict()
    values = {k: v for k, v in made.to_dict().items() if k not in LEFT and k not in config_values.INERT}
    if most:
        yield from ({key: changed} for key, value in values.items() for changed in further(key, value))
        yield from ({key: MISSING} for key in ("hidden_size", "num_hidden_layers", "rope_parameters"))
        return
    for key, value in values.items():
        yield from ({key: changed} for changed in other(key, value, defaults.get(key)))
    known = config_values.VALUES[family].known
    yield from (change for change in CHANGES if known.issuperset(change))


def model_with(family: str, change: dict[str, Any], folder: Path) -> Path:
    """The small model with ``change`` in its config.json; the weights are of a model with the values that are there."""
    values = {key: value for key, value in change.items() if value is not MISSING}
    model = tiny.make_model(family, folder, seed=1, **(base_of(family) | values))
    if MISSING in change.values():
        config = json.loads((model / "config.json").read_text())
        config = {key: value for key, value in config.items() if change.get(key) is not MISSING}
        (model / "config.json").write_text(json.dumps(config))
    return model


def truth(model: Path) -> np.ndarray | None:
    """transformers' logits; None where its own classes cannot run such a config."""
    try:
        return transformers_logits(model, TOKENS)
    except Exception:
        return None


def other_values(model: Path, config: dict[str, Any]) -> np.ndarray:
    """transformers' logits with another config.json, which is put back."""
    file = model / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(config))
    try:
        return transformers_logits(model, TOKENS)
    finally:
        file.write_text(before)


def outcome(family: str, change: dict[str, Any], base: np.ndarray, folder: Path) -> str:
    """``refused``, ``same`` (logits do not change), ``alike``, ``impossible`` (no such model), or what is wrong."""
    try:
        model = model_with(family, change, folder / "m")
    except Exception:
        return "impossible"
    expected = truth(model)
    if expected is None:
        return "impossible"
    said = json.loads((model / "config.json").read_text())
    alike = config_values.judge(family, said).alike
    if alike:  # what the file says of itself: transformers computes that with other values
        if nmse(expected, other_values(model, said | alike)) > CLOSE:
            return "not close"
        expected = other_values(model, said | alike)
    try:
        export(model, folder / "m.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    except MobeError as e:
        return "refused" if "config.json" in str(e) else str(e)
    got = logits(folder / "m.gguf", TOKENS, [N_TOKENS])[N_TOKENS]
    if (error := nmse(expected, got)) > LIMITS.get(family, LIMIT):
        return f"the file's logits are off by {error:.1e}"
    return "same" if nmse(base, expected) < LIMIT else "alike"


#: Of families that came later every so many changes are made, and all with MOBE_GGUF_ALL=1, which takes some minutes for each.
EVERY = 1 if os.environ.get("MOBE_GGUF_ALL") else 8


def changes_made(family: str) -> Iterator[dict[str, Any]]:
    number = list(CLASSES).index(family)
    made, more = list(changes(family, False)), list(changes(family, True))
    yield from made if family in tiny._CLASSES else made[number % EVERY :: EVERY]
    yield from more[number % EVERY :: EVERY]


#: Outcomes at least to be seen, so that the net does not pass because nothing could be run.
LEAST = {"alike": 8, "refused": 4}


@pytest.mark.parametrize("family", CLASSES)
def test_every_value(family: str, tmp_path: Path) -> None:
    base = truth(tiny.make_model(family, tmp_path / "base", seed=1, **base_of(family)))
    found: dict[str, str] = {}
    for number, change in enumerate(changes_made(family)):
        found[str(change)] = outcome(family, change, base, tmp_path / str(number))
    wrong = {c: o for c, o in found.items() if o not in ("refused", "same", "alike", "impossible")}
    assert not wrong, wrong
    seen = list(found.values())
    assert family in tiny._MORE or all(seen.count(kind) >= n for kind, n in LEAST.items()), found


@pytest.mark.parametrize("family", CLASSES)
def test_tables_are_complete(family: str) -> None:
    """A key that a later transformers adds to the class is noticed here, and so is a default that changed."""
    config = config_class(family)()
    fields = [key for key in config.to_dict() if key not in LEFT]
    assert not config_values.unlisted(family, fields)
    for key, only in config_values.VALUES[family].only.items():
        if key in config.to_dict():
            assert getattr(config, key) == only.default, key


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "'norm_topk_prob' is True, and the runtime normalizes"),
        ("mixtral", {"sliding_window": 16}, "'sliding_window' is 16, and the runtime attends to all tokens"),
        ("mixtral", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu', and the runtime computes silu"),
        ("olmoe", {"clip_qkv": 0.5}, "'clip_qkv' is 0.5, and the runtime does not clip"),
        ("bailing_moe", {"use_bias": True}, "'use_bias' is True, and the runtime has no such biases"),
        ("qwen3_moe", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
        ("qwen3_moe", {"max_position_embeddings": -1}, "'max_position_embeddings' is -1, and the runtime needs a positive"),
        ("qwen3_moe", {"max_position_embeddings": 2**40}, "'max_position_embeddings' is 1099511627776"),
        ("granitemoeshared", {"shared_intermediate_size": 0}, "'shared_intermediate_size' is 0, and the runtime adds"),
    ],
)  # fmt: skip
def test_refused_by_name(
    family: str, change: dict[str, Any], said: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    """In ``export``, ``export --dense`` and ``factorize --dry-run``; ``moments`` runs the model itself and refuses nothing."""
    source = str(model(family, **change))
    for command in (
        ["factorize", source, str(tmp_path / "out"), "--dry-run"],
        ["factorize", source, str(tmp_path / "out"), "--steps", "1"],
        ["export", source, str(tmp_path / "out.gguf"), "--dense", "--quant", "f32"],
        ["export", source, str(tmp_path / "out.gguf"), "--dense", "--quant", "f32", "--dry-run"],
    ):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 1 and said in done.stderr.replace("\n", " "), (command, done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_rope_scaling_counts_before_rope_parameters(
    family: str, own_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As in transformers: who reads a model's page adds ``rope_scaling`` to a config.json that has ``rope_parameters``."""
    source = own_model(family, num_hidden_layers=2)
    file = source / "config.json"
    config = json.loads(file.read_text())
    assert config["rope_parameters"]["rope_type"] == "default"
    scaling = {"rope_type": "yarn", "attention_factor": 1.5, **YARN}
    file.write_text(json.dumps(config | {"rope_scaling": scaling}))
    export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    got = logits(tmp_path / "out.gguf", TOKENS, [N_TOKENS])[N_TOKENS]
    assert nmse(transformers_logits(source, TOKENS), got) < LIMIT
    for other, said in (({"rope_scaling": {"rope_type": "longrope"}}, "'rope_type' is 'longrope'"),
                        ({"rope_parameters": {"full_attention": scaling}}, "none for full_attention alone")):  # fmt: skip
        file.write_text(json.dumps(config | other))
        with pytest.raises(MobeError, match=said):
            export(source, tmp_path / "not.gguf", Recipe("f32"), allow_dense=True, quiet=True)


@pytest.mark.parametrize(
    ("family", "key"), [("nemotron_h", "layers_block_type"), ("granitemoehybrid", "layer_types")]
)
def test_a_hybrid_needs_both_kinds_of_layers(
    family: str, key: str, own_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The runtime stops with an assertion where no layer has a state, or none attends."""
    source = own_model(family)
    file = source / "config.json"
    config = json.loads(file.read_text())
    for absent, other in (("linear_attention", "full_attention"), ("full_attention", "linear_attention")):
        kinds = [other if kind == absent else kind for kind in config[key]]
        file.write_text(json.dumps(config | {key: kinds}))
        with pytest.raises(MobeError, match=f"'{key}' is .*needs a layer"):
            export(source, tmp_path / "not.gguf", Recipe("f32"), allow_dense=True, quiet=True)


def test_a_default_of_rotary_scaling_is_noted(own_model: Callable[..., Path], tmp_path: Path) -> None:
    """gpt-oss's class scales if config.json says nothing."""
    source = own_model("gpt_oss")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps(config))
    report = export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert any("'truncate' is False" in note for note in report.notes)


def test_missing_key_is_the_default(own_model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers takes False where Qwen3-MoE's config.json does not say ``norm_topk_prob``."""
    source = own_model("qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    del config["norm_topk_prob"]
    (source / "config.json").write_text(json.dumps(config))
    export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert read_gguf(tmp_path / "out.gguf").keys["qwen3moe.norm_topk_prob"] is False


#: More experts than groups: otherwise the best experts are in the groups of the best ones.
GROUPS = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "num_experts_per_tok": 4}


@pytest.mark.parametrize(
    ("family", "change", "key", "value"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3moe.norm_topk_prob", False),
        ("qwen2_moe", {"norm_topk_prob": True}, "qwen2moe.norm_topk_prob", True),
        ("olmoe", {"norm_topk_prob": True}, "olmoe.norm_topk_prob", True),
        ("deepseek_v2", GROUPS, "deepseek2.expert_group_top_count", 1),
    ],
)
def test_routing_by_a_key_of_ours(
    family: str, change: dict[str, Any], key: str, value: Any, model: Callable[..., Path], tmp_path: Path
) -> None:
    """The file says it and the runtime reads it; unpatched ones do not, of which a note warns.  Usual models have no such key."""
    source = model(family, **change)
    report = export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert read_gguf(tmp_path / "out.gguf").keys[key] == value
    name, said = next(iter(change.items() if len(change) == 1 else [("topk_method", GROUPS["topk_method"])]))
    assert any(f"'{name}' is" in note and str(said) in note and "unpatched" in note for note in report.notes)
    got = logits(tmp_path / "out.gguf", TOKENS, [N_TOKENS])[N_TOKENS]
    assert nmse(transformers_logits(source, TOKENS), got) < LIMIT

    usual = model(family, **{name: said for name, said in change.items() if name == "num_experts_per_tok"})
    report = export(usual, tmp_path / "usual.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert key not in read_gguf(tmp_path / "usual.gguf").keys
    assert not any("unpatched" in note for note in report.notes)
    assert nmse(logits(tmp_path / "usual.gguf", TOKENS, [N_TOKENS])[N_TOKENS], got) > 1e-4


def test_keys_of_other_families_do_not_count(model: Callable[..., Path], tmp_path: Path) -> None:
    """The converter would write groups for any family, and the runtime would route by them."""
    export(
        model("olmoe", n_group=4, topk_group=2, scoring_func="sigmoid"), tmp_path / "out.gguf", Recipe("f32"),
        allow_dense=True, quiet=True,
    )  # fmt: skip
    keys = read_gguf(tmp_path / "out.gguf").keys
    assert not [key for key in keys if "group" in key or "gating" in key]


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("equal", [True, False])
def test_tied_with_an_output(
    family: str, equal: bool, own_model: Callable[..., Path], tmp_path: Path
) -> None:
    """``tie_word_embeddings`` beside a ``lm_head.weight`` of its own: what transformers does."""
    source = own_model(family, tie_word_embeddings=True, num_hidden_layers=2)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(3)
    head = embedding.clone() if equal else torch.randn(embedding.shape, generator=generator)
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    expected = transformers_logits(source, TOKENS)
    export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert nmse(expected, logits(tmp_path / "out.gguf", TOKENS, [N_TOKENS])[N_TOKENS]) < LIMIT


def test_notes(model: Callable[..., Path], tmp_path: Path) -> None:
    """What differs by less than any rounding is said, not refused."""
    source = model("deepseek_v3", rms_norm_eps=1e-5)
    report = export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert any("rms_norm_eps" in note and "1e-06" not in note for note in report.notes), report.notes
