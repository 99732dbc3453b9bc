"""Reading model directories: every layout gives the same experts, every damage a message that names it."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.safetensors import INDEX_NAME, read_header
from mobe_gguf.models.checkpoint import Checkpoint, dequantize_fp8
from models.editing import edit_config, edit_tensors, to_fp8


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_expert_stack_is_the_experts(family, model):
    path = model(family)
    checkpoint, tensors = Checkpoint(path), load_file(path / "model.safetensors")
    layer = checkpoint.moe_layers[-1]
    for projection, shape in (("gate", (8, 48, 64)), ("up", (8, 48, 64)), ("down", (8, 64, 48))):
        stack = checkpoint.expert_stack(layer, projection)
        assert stack.shape == shape and stack.dtype == torch.float32
        name = checkpoint.family.expert_weight(layer, 5, projection)
        assert torch.equal(stack[5], tensors[name])
        checkpoint.check_experts(layer, projection)


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "bailing_moe"])
def test_fused_layout_of_transformers_5(family, model):
    classic, fused = Checkpoint(model(family)), Checkpoint(model(family, fused=True))
    assert fused.moe_layers == classic.moe_layers
    layer = classic.moe_layers[0]
    for projection in ("gate", "up", "down"):
        assert fused.is_fused(layer, projection) and not classic.is_fused(layer, projection)
        fused.check_experts(layer, projection)
        assert torch.equal(fused.expert_stack(layer, projection), classic.expert_stack(layer, projection))


def test_shards(model):
    single, sharded = Checkpoint(model("qwen3_moe")), Checkpoint(model("qwen3_moe", max_shard_size="200KB"))
    assert len(list(sharded.path.glob("*.safetensors"))) > 3
    assert set(single.names) == set(sharded.names)
    assert all(torch.equal(single.get(n), sharded.get(n)) for n in single.names)
    assert single.checksum != sharded.checksum


def test_a_shard_larger_than_memory(own_model):
    """16 TB, all hole behind its first tensors: the head is read, and tensors without the rest."""
    path = own_model() / "model.safetensors"
    before = Checkpoint(path.parent)
    stack, head = before.expert_stack(0, "up"), read_header(path)
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
        size = 1 << 43
        header["hole"] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        file.seek(0)
        file.write(struct.pack("<Q", len(raw)) + raw + data)
        file.truncate(8 + len(raw) + len(data) + size)
    after = Checkpoint(path.parent)
    assert after.info("hole").n_bytes == size and len(after.names) == len(head) + 1
    assert torch.equal(after.expert_stack(0, "up"), stack)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, model):
    exact, half = Checkpoint(model("olmoe")), Checkpoint(model("olmoe", dtype=dtype))
    assert half.dtype(half.expert_sources(0, "gate")[0]) == dtype
    assert torch.equal(half.expert_stack(0, "gate"), exact.expert_stack(0, "gate").to(dtype).float())


def test_fp8(own_model):
    path = own_model("deepseek_v3")
    exact = Checkpoint(path).expert_stack(1, "gate")

    def quantize(tensors):
        for name in [n for n in tensors if ".mlp.experts." in n]:
            tensors[name], tensors[name + "_scale_inv"] = to_fp8(tensors[name], 32)

    edit_tensors(path, quantize)
    edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    checkpoint = Checkpoint(path)
    got = checkpoint.expert_stack(1, "gate")
    # e4m3 has 3 mantissa bits: a relative error of at most 1/16, on average about 0.026
    assert ((got - exact).norm() / exact.norm()) < 0.04
    assert checkpoint.expert_sources(1, "gate")[-1].endswith("weight_scale_inv")


def test_fp8_fused_and_without_scales(own_model):
    path = own_model("deepseek_v3", fused=True)
    exact = {p: Checkpoint(path).expert_stack(1, p) for p in ("gate", "up", "down")}

    def quantize(tensors):
        for name in [n for n in tensors if ".mlp.experts." in n]:
            parts = [to_fp8(w, 16) for w in tensors[name]]
            tensors[name] = torch.stack([w for w, _ in parts])
            tensors[name + "_scale_inv"] = torch.stack([s for _, s in parts])

    edit_tensors(path, quantize)
    edit_config(path, quantization_config={"weight_block_size": [16, 16]})
    for projection, expected in exact.items():
        got = Checkpoint(path).expert_stack(1, projection)
        assert ((got - expected).norm() / expected.norm()) < 0.04
    edit_tensors(path, lambda t: t.pop("model.layers.1.mlp.experts.gate_up_proj_scale_inv"))
    with pytest.raises(MobeError, match="gate_up_proj_scale_inv is missing"):
        Checkpoint(path).expert_stack(1, "gate")


def test_fp8_scales_of_a_wrong_shape():
    with pytest.raises(MobeError, match=r"\[1, 1\], expected \[2, 1\]"):
        dequantize_fp8("x", torch.zeros(130, 5).to(torch.float8_e4m3fn), torch.ones(1, 1), (128, 128))


def test_missing_shard(own_model):
    path = own_model("qwen3_moe", max_shard_size="200KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MobeError, match=f"{shard.name} is missing.*tensors"):
        Checkpoint(path)


def test_index_names_an_absent_tensor(own_model):
    path = own_model("qwen3_moe", max_shard_size="200KB")
    index = json.loads((path / INDEX_NAME).read_text())
    index["weight_map"]["model.ghost"] = sorted(path.glob("*.safetensors"))[0].name
    (path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(MobeError, match="model.ghost"):
        Checkpoint(path)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7])
def test_index_may_not_leave_the_directory(own_model, shard):
    path = own_model("qwen3_moe", max_shard_size="200KB")
    index = json.loads((path / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(MobeError, match="only plain file names"):
        Checkpoint(path)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_truncated(own_model, keep):
    file = own_model() / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(MobeError, match="model.safetensors: truncated or corrupt"):
        Checkpoint(file.parent)


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(_header),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
            lambda x: (
                st.lists(x, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), x, max_size=3
                )
            ),
            max_leaves=12,
        ).map(lambda v: _header(json.dumps(v).encode())),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "I4", ""]),
                "shape": st.lists(st.integers(-1, 3), max_size=3),
            },
            optional={"data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3)},
        ).map(lambda v: _header(json.dumps({"a": v}).encode()) + bytes(12)),
    )
)
def test_a_corrupt_header_never_escapes_as_another_error(raw, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    try:
        read_header(path)
    except MobeError as e:
        assert "x.safetensors" in e.message


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_flipped_byte_in_a_header_is_read_or_reported(position, value, tmp_path):
    path = tmp_path / "x.safetensors"
    if not path.exists():
        save_file({f"t{i}": torch.zeros(3, i) for i in range(1, 20)}, path)
        (tmp_path / "whole").write_bytes(path.read_bytes())
    raw = bytearray((tmp_path / "whole").read_bytes())
    raw[position % len(raw)] = value
    path.write_bytes(raw)
    try:
        read_header(path)
    except MobeError as e:
        assert "x.safetensors" in e.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(own_model, value):
    path, name = own_model(), "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_tensors(path, lambda t: t[name].view(-1).__setitem__(7, value))
    with pytest.raises(MobeError, match=f"{name} holds 1 values that are NaN or Inf"):
        Checkpoint(path).expert_stack(1, "up")


def test_missing_expert(own_model):
    path, name = own_model(), "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_tensors(path, lambda t: t.pop(name))
    with pytest.raises(MobeError, match=f"{name} is missing"):
        Checkpoint(path).check_experts(1, "up")


@pytest.mark.parametrize("fused", [False, True])
def test_wrong_shape(own_model, fused):
    path = own_model(fused=fused)
    edit_config(path, moe_intermediate_size=50)
    expected = r"\[8, 96, 64\], expected \[8, 100, 64\]" if fused else r"\[48, 64\], expected \[50, 64\]"
    with pytest.raises(MobeError, match=expected):
        Checkpoint(path).check_experts(0, "gate")


def test_layers_that_contradict_the_config(own_model):
    path = own_model("deepseek_v2")
    edit_config(path, first_k_dense_replace=0)
    with pytest.raises(MobeError, match="layer 0 has experts, but neither"):
        _ = Checkpoint(path).moe_layers
    edit_config(path, first_k_dense_replace=2)
    with pytest.raises(MobeError, match="layer 1 is dense, but it has expert tensors"):
        _ = Checkpoint(path).moe_layers
    edit_config(path, first_k_dense_replace=3)
    with pytest.raises(MobeError, match="no MoE layer at all"):
        _ = Checkpoint(path).moe_layers


def test_unsupported_type(own_model):
    path = own_model()
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    edit_tensors(path, lambda t: t.__setitem__(name, t[name].to(torch.int8)))
    with pytest.raises(MobeError, match=f"{name} has type int8"):
        Checkpoint(path).expert_stack(0, "gate")


def test_not_a_model_directory(own_model, tmp_path):
    path = own_model()
    for target, message in (
        (tmp_path / "absent", "no such directory"),
        (path / "config.json", "is a file"),
        (tmp_path, "no config.json"),
    ):
        with pytest.raises(MobeError, match=message):
            Checkpoint(target)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(MobeError, match="pytorch_model.bin: PyTorch pickles are not read"):
        Checkpoint(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "\ufeff{}", "[" * 100_000])
def test_bad_config(own_model, text):
    path = own_model()
    (path / "config.json").write_text(text)
    with pytest.raises(MobeError, match=r"config.json"):
        Checkpoint(path)


def test_checksum_tells_a_fine_tune_from_its_base(own_model, tmp_path):
    path = own_model()
    before = Checkpoint(path).checksum
    assert Checkpoint(path).checksum == before
    shutil.copytree(path, tmp_path / "copy")
    assert Checkpoint(tmp_path / "copy").checksum == before
    edit_tensors(path, lambda t: [x.mul_(1.001) for x in t.values()])
    assert Checkpoint(path).checksum != before


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "bailing_moe"])
def test_what_a_model_cannot_do_without(family, fused, own_model):
    path = own_model(family, fused=fused)
    checkpoint = Checkpoint(path)
    checkpoint.check_whole()
    assert checkpoint.missing() == []
    routers = [
        n for n in checkpoint.names if n.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))
    ]
    assert len(routers) == len(checkpoint.moe_layers)
    gone = ["model.embed_tokens.weight", "model.norm.weight", routers[-1]]
    edit_tensors(path, lambda tensors: [tensors.pop(name) for name in gone])
    assert Checkpoint(path).missing() == gone
    with pytest.raises(MobeError, match=f"own: tensor {gone[0]} is missing"):
        Checkpoint(path).check_whole()


def test_bailing_calls_its_embeddings_otherwise(own_model):
    path = own_model("bailing_moe")
    Checkpoint(path).check_whole()
    edit_tensors(path, lambda tensors: tensors.pop("model.word_embeddings.weight"))
    assert Checkpoint(path).missing() == ["model.word_embeddings.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, r"'architectures' must be a list with the name .*, got None"),
        ({"architectures": 5}, r"'architectures' must be a list with the name .*, got 5"),
        ({"architectures": []}, r"'architectures' must be a list with the name .*, got \[\]"),
        ({"architectures": [5]}, r"'architectures' must be a list with the name .*, got \[5\]"),
        ({"quantization_config": "fp8"}, "'quantization_config' must be an object, got 'fp8'"),
        (
            {"quantization_config": {"weight_block_size": [0, 128]}},
            r"'weight_block_size' must be two positive integers, got \[0, 128\]",
        ),
        (
            {"quantization_config": {"weight_block_size": 128}},
            "'weight_block_size' must be two positive integers, got 128",
        ),
        ({"num_experts_per_tok": None}, "no 'num_experts_per_tok'"),
        ({"num_experts_per_tok": 0}, "'num_experts_per_tok' must be a positive integer, got 0"),
        ({"num_experts_per_tok": 9}, "'num_experts_per_tok' is 9, expected 1 to 8"),
        ({"num_experts": 10**12}, "'num_experts' is 1000000000000, but tensor .*999999999999.* is missing"),
        ({"num_hidden_layers": 10**12}, "'num_hidden_layers' is 1000000000000, but the model has only"),
    ],
)
def test_a_config_that_makes_no_sense(changes, message, own_model):
    """What would run on for ever, or be found only by the export, as an error of Python."""
    path = own_model("qwen3_moe")
    edit_config(path, **changes)
    with pytest.raises(MobeError, match=f"^{path}/config.json: {message}"):
        Checkpoint(path).check_whole()


@pytest.mark.parametrize("projection", ["gate", "down"])
def test_types_that_cannot_be_read_are_known_from_the_header(projection, own_model):
    path = own_model("qwen3_moe")
    name = Checkpoint(path).family.expert_weight(1, 3, projection)
    for dtype, message in (
        (torch.int8, "has type int8; experts can be read from f32"),
        (torch.float8_e4m3fn, f"is FP8 but {name}_scale_inv is missing"),
    ):
        edit_tensors(path, lambda tensors, dtype=dtype: tensors.update({name: tensors[name].to(dtype)}))
        with pytest.raises(MobeError, match=f"tensor {name} {message}"):
            Checkpoint(path).check_whole()
    edit_tensors(path, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(2, 1)}))
    with pytest.raises(MobeError, match=rf"{name}_scale_inv has shape \[2, 1\], expected \[1, 1\]"):
        Checkpoint(path).check_whole()
    edit_tensors(path, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(1, 1)}))
    Checkpoint(path).check_whole()
