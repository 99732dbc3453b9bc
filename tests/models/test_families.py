"""Families: what config.json says, in both spellings."""

from __future__ import annotations

import json

import pytest
import tiny

from mobe_gguf.core.errors import MobeError
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.families import FAMILIES, family_of, known_model_types

LEADING_DENSE = {
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "dots1", "ernie4_5_moe", "exaone_moe", "lfm2_moe", "afmoe",
}  # fmt: skip


#: Families whose tiny model has four layers, and those of which every second one has experts.
FOUR = ("qwen3_next", "afmoe", "qwen3_5_moe_text", "llama4_text", "nemotron_h")
SECOND = ("llama4_text", "nemotron_h")


def test_every_family_has_a_tiny_model():
    assert {f.name for f in FAMILIES} == {*tiny.ALL_FAMILIES, *tiny._SEEING}


@pytest.mark.parametrize("name", tiny.ALL_FAMILIES)
def test_numbers_of_a_real_config(name, model):
    checkpoint = Checkpoint(model(name))
    assert checkpoint.family.name == name
    assert (checkpoint.n_expert, checkpoint.n_expert_used) == (8, 1 if name == "llama4_text" else 2)
    n_layer = 4 if name in FOUR else 3
    assert (checkpoint.n_embd, checkpoint.n_ff_exp, checkpoint.n_layer) == (64, 48, n_layer)
    expected = (1, 3) if name in SECOND else tuple(range(name in LEADING_DENSE, n_layer))
    assert checkpoint.moe_layers == expected
    assert not checkpoint.is_mobe


@pytest.mark.parametrize(
    "model_type, config, expected",
    [
        ("qwen3_moe", dict(decoder_sparse_step=2), (1, 3, 5)),
        ("qwen2_moe", dict(decoder_sparse_step=1, mlp_only_layers=[0, 5]), (1, 2, 3, 4)),
        ("qwen3_moe", dict(decoder_sparse_step=None, mlp_only_layers=None), (0, 1, 2, 3, 4, 5)),
        ("deepseek_v2", dict(first_k_dense_replace=1, moe_layer_freq=1), (1, 2, 3, 4, 5)),
        ("deepseek_v3", dict(first_k_dense_replace=3), (3, 4, 5)),
        ("kimi_k2", dict(first_k_dense_replace=1, moe_layer_freq=2), (2, 4)),
        ("deepseek_v2", dict(moe_layer_freq=[0, 1, 1, 0, 1, 1]), (1, 2, 4, 5)),
        ("bailing_moe", dict(first_k_dense_replace=0), (0, 1, 2, 3, 4, 5)),
        ("olmoe", {}, (0, 1, 2, 3, 4, 5)),
        ("glm4_moe_lite", dict(mlp_layer_types=["dense", "dense", *["sparse"] * 4]), (2, 3, 4, 5)),
        ("exaone_moe", dict(first_k_dense_replace=2), (2, 3, 4, 5)),
        ("ernie4_5_moe", dict(moe_layer_start_index=1, moe_layer_end_index=3, moe_layer_interval=2), (1, 3)),
        ("lfm2_moe", dict(num_dense_layers=4), (4, 5)),
        ("mixtral", {}, (0, 1, 2, 3, 4, 5)),
        ("llama4_text", dict(interleave_moe_layer_step=3), (2, 5)),
        ("llama4_text", dict(interleave_moe_layer_step=1, moe_layers=[1, 2]), (1, 2)),
        ("nemotron_h", dict(hybrid_override_pattern="ME*EM-"), (1, 3)),
        ("nemotron_h", dict(layers_block_type=["mamba", "moe", "attention", "moe", "mlp", "moe"]), (1, 3, 5)),
    ],
)
def test_moe_layers(model_type, config, expected):
    config = {"model_type": model_type, "num_hidden_layers": 6} | config
    assert family_of(config).moe_layers(config) == expected


def test_both_spellings_of_the_expert_count():
    for key in ("num_experts", "num_local_experts"):
        config = {"model_type": "qwen3_moe", key: 128}
        assert family_of(config).n_expert(config) == 128


def test_mixtral_names():
    family = family_of({"model_type": "mixtral"})
    assert family.expert_weight(3, 7, "up") == "model.layers.3.block_sparse_moe.experts.7.w3.weight"
    assert family.basis(3, "gate") == "model.layers.3.block_sparse_moe.B_gate"
    assert family.mix(3, "up", 1) == "model.layers.3.block_sparse_moe.W_up_1"


def test_unknown_family_lists_the_known(own_model):
    path = own_model()
    config = json.loads((path / "config.json").read_text()) | {"model_type": "llama"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MobeError, match="'llama'") as e:
        Checkpoint(path)
    assert all(name in e.value.message for name in known_model_types())


@pytest.mark.parametrize("value", [None, 0, -3, "8", 2.5, True])
def test_a_bad_number_names_its_key(value):
    config = {"model_type": "olmoe", "num_experts": value}
    with pytest.raises(MobeError, match="num_experts"):
        family_of(config).n_expert(config)


def test_other_families_are_those_that_the_converter_knows():
    """What the message and docs/families.md say of families that are not read as directories."""
    from mobe_gguf import runtime
    from mobe_gguf.models.families import OTHERS, UNCONVERTED

    runtime.use_conversion()
    import conversion

    for model_type, (name, _) in OTHERS.items():
        if model_type in UNCONVERTED:
            with pytest.raises(NotImplementedError):
                conversion.get_model_class(name)
        else:
            assert conversion.get_model_class(name)
        assert model_type not in known_model_types()


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("bailing_moe_v2", "mobe-gguf convert MODEL model.gguf"),
        ("jetmoe", "does not know this family"),
        ("phimoe", "SparseMixer"),
    ],
)
def test_what_works_instead(model_type, said):
    with pytest.raises(MobeError, match=said):
        family_of({"model_type": model_type})


@pytest.mark.parametrize("value", [[], {}, 7, None])
def test_a_model_type_that_is_no_name(value: object) -> None:
    with pytest.raises(MobeError, match="is not a MoE family"):
        family_of({"model_type": value})
