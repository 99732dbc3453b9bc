"""MoBE checkpoints: the published layout and ours, and the formula that they stand for."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from export.handmade import make_mobe
from safetensors.torch import load_file, save_file

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint, reconstruct


def by_hand(tensors, family, layer, projection, n, m, g, activation):
    """The formula in plain loops over experts and bases."""
    f = {"none": lambda x: x, "tanh": torch.tanh, "silu": lambda x: x * torch.sigmoid(x)}[activation]
    out = []
    for i in range(n):
        group, row = divmod(i, n // g)
        index = group if g > 1 else None
        basis, mix = (
            tensors[family.basis(layer, projection, index)],
            tensors[family.mix(layer, projection, index)],
        )
        z = 0
        for j in range(m // g):
            alpha = mix[row, j]  # a number, or one for each row of the basis
            z = z + (alpha[:, None] if alpha.dim() else alpha) * basis[j]
        a = tensors[family.expert_weight(layer, i, projection)]
        out.append(f(z) @ a if projection == "down" else a @ f(z))
    return torch.stack(out)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        dict(activation="silu"),
        dict(g=2, activation="tanh", our_key=True),
        dict(by_row=True, activation="none", r=20),
        dict(by_row=True, g=2, activation="silu", r=16),
        dict(by_row=True, g=2, activation="silu", r=16, projections=ALL_PROJECTIONS),
        dict(activation="tanh", projections=("down",)),
    ],
    ids=["published", "groups", "rows", "rows-groups", "down", "down-alone"],
)
def test_reconstruct_is_the_formula(family, options, model, tmp_path):
    path = make_mobe(model(family), tmp_path / "mobe", m=4, **options)
    checkpoint = MobeCheckpoint(path)
    tensors = load_file(path / "model.safetensors")
    g, layer = options.get("g", 1), checkpoint.layer(checkpoint.moe_layers[-1])
    assert checkpoint.is_mobe and layer.projections == options.get("projections", ("gate", "up"))
    for projection in layer.projections:
        assert (layer.group_count(projection), layer.n_basis(projection)) == (g, 4)
        assert layer.rank(projection) == options.get("r", 48)
        assert layer.is_row_mixed(projection) == options.get("by_row", False)
        assert torch.equal(layer.basis_matrix(projection, 3), layer.basis(projection)[3])
        expected = by_hand(
            tensors, checkpoint.family, layer.index, projection, 8, 4, g, options["activation"]
        )
        assert torch.allclose(reconstruct(layer, projection), expected, atol=1e-5)
        assert torch.equal(
            layer.transform(projection, 2),
            tensors[checkpoint.family.expert_weight(layer.index, 2, projection)],
        )


def test_published_bf16(model, tmp_path):
    path = make_mobe(model("qwen3_moe"), tmp_path / "mobe", dtype=torch.bfloat16)
    assert "mobe" not in json.loads((path / "config.json").read_text())
    assert MobeCheckpoint(path).layer(0).basis("gate").dtype == torch.float32


def test_a_layer_without_bases_is_ordinary(model, tmp_path):
    source = model("qwen3_moe")
    checkpoint = MobeCheckpoint(make_mobe(source, tmp_path / "mobe", layers=(1,), projections=("up",)))
    assert [checkpoint.layer(i).projections for i in range(3)] == [(), ("up",), ()]
    assert torch.equal(reconstruct(checkpoint.layer(1), "gate"), Checkpoint(source).expert_stack(1, "gate"))


def test_an_ordinary_model_is_told_to_be_factorized(model):
    with pytest.raises(MobeError, match="mobe-gguf factorize"):
        MobeCheckpoint(model("qwen3_moe"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t, b: t.pop(b + "W_gate"), "W_gate is missing"),
        (
            lambda t, b: t.__setitem__(b + "W_gate", torch.zeros(8, 5)),
            r"W_gate has shape \[8, 5\], expected \[8, 4\]",
        ),
        (lambda t, b: t.__setitem__(b + "B_gate", torch.zeros(4, 48, 60)), r"B_gate has shape \[4, 48, 60\]"),
        (
            lambda t, b: t.__setitem__(b + "experts.3.gate_proj.weight", torch.zeros(48, 5)),
            "experts.3.gate_proj",
        ),
        (lambda t, b: t[b + "B_gate"].fill_(float("nan")), "B_gate holds NaN or Inf"),
    ],
)
def test_damage_names_the_tensor(model, tmp_path, damage, message):
    path = make_mobe(model("qwen3_moe"), tmp_path / "mobe", m=4)
    tensors = load_file(path / "model.safetensors")
    damage(tensors, "model.layers.2.mlp.")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(MobeError, match=message):
        reconstruct(MobeCheckpoint(path).layer(2), "gate")


def test_groups_are_mixed_in_one_way(model, tmp_path):
    path = make_mobe(model("qwen3_moe"), tmp_path / "mobe", m=4, g=2)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.mlp.W_gate_1"] = torch.zeros(4, 2, 48)
    save_file(tensors, path / "model.safetensors")
    expected = r"W_gate_1 has shape \[4, 2, 48\], expected \[4, 2\] \(as model\.layers\.2\.mlp\.W_gate_0\)"
    with pytest.raises(MobeError, match=expected):
        MobeCheckpoint(path).layer(2).mix("gate")


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("B_down", (4, 48, 64), r"B_down has shape \[4, 48, 64\], expected \[m, 64, r\]"),
        ("W_down", (8, 4, 48), r"W_down has shape \[8, 4, 48\], expected \[8, 4\], or \[8, 4, 64\]"),
        ("experts.3.down_proj.weight", (48, 40), r"experts.3.down_proj.* expected \[40, 48\]"),
    ],
)
def test_damage_of_down_names_the_tensor(model, tmp_path, name, shape, message):
    path = make_mobe(model("qwen3_moe"), tmp_path / "mobe", m=4, r=40, projections=("down",))
    tensors = load_file(path / "model.safetensors")
    tensors[f"model.layers.2.mlp.{name}"] = torch.zeros(*shape)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(MobeError, match=message):
        reconstruct(MobeCheckpoint(path).layer(2), "down")


def test_unknown_activation(model, tmp_path):
    checkpoint = MobeCheckpoint(make_mobe(model("qwen3_moe"), tmp_path / "mobe", activation="relu"))
    with pytest.raises(MobeError, match="'relu'; known: none, silu, tanh"):
        _ = checkpoint.activation


def test_a_dense_layer_is_no_moe_layer(model, tmp_path):
    checkpoint = MobeCheckpoint(make_mobe(model("deepseek_v2"), tmp_path / "mobe"))
    with pytest.raises(MobeError, match="layer 0 has no routed experts"):
        checkpoint.layer(0)
