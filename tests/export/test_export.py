"""What export writes, tensor by tensor, against the checkpoint, and against what llama.cpp's own converter writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from export.handmade import make_mobe
from mobe_gguf import runtime
from mobe_gguf.core import names
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.formats.gguf import GgufFile, read_gguf
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.runtime import ggml

Maker = Callable[..., Path]

#: What a MoBE model is called otherwise than its original (``test_card``), and how large it is said to be.
NAMED = {f"general.{key}" for key in ("name", "basename", "finetune", "size_label")}


def values(file: GgufFile, name: str) -> np.ndarray:
    """A tensor of a GGUF file, decoded to float32 in torch's order of axes."""
    info = file.tensors[name]
    raw = np.fromfile(file.path, np.uint8, info.n_bytes, offset=info.offset)
    return ggml.dequantize(raw.reshape(*info.shape[:-1], -1), info.type, info.shape[-1])


def stock_f32(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``convert_hf_to_gguf.py --outtype f32``, but for its refusal of tokenizers that it has not seen."""
    runtime.use_conversion()
    import conversion

    base = conversion.base
    monkeypatch.setattr(base.TextModel, "get_vocab_base_pre", lambda self, tokenizer: "qwen2")
    hparams = base.ModelBase.load_hparams(model, False)
    model_class = conversion.get_model_class(hparams["architectures"][0])
    with torch.inference_mode():
        model_class(model, base.gguf.LlamaFileType.ALL_F32, out, hparams=hparams).write()
    return out


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_ordinary_model_is_what_the_converter_writes(
    family: str, model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tmp_path / "ours.gguf"
    export(model(family), ours, Recipe("f32"), allow_dense=True, quiet=True)
    stock = stock_f32(model(family), tmp_path / "stock.gguf", monkeypatch)
    assert ours.read_bytes() == stock.read_bytes()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in tiny.FAMILIES),
        ("qwen3_moe", dict(g=2, r=32, activation="silu")),
        ("deepseek_v3", dict(g=2, by_row=True, activation="none", our_key=True)),
        ("olmoe", dict(by_row=True, r=16)),
        ("mixtral", dict(dtype=torch.bfloat16, g=4, r=32)),
        ("qwen2_moe", dict(layers=(1,), projections=("up",), r=24)),
        ("deepseek_v2", dict(g=2, by_row=True, r=24, projections=names.ALL_PROJECTIONS)),
        ("mixtral", dict(dtype=torch.bfloat16, layers=(0, 2), projections=("down",))),
    ],
    ids=str,
)
def test_f32(family: str, options: dict[str, Any], mobe: Maker, model: Maker, tmp_path: Path) -> None:
    """Factors as in the checkpoint, everything else bit by bit as in a file of the original model."""
    source = mobe(family, **options)
    report = export(source, tmp_path / "mobe.gguf", Recipe("f32"), quiet=True)
    export(model(family), tmp_path / "dense.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    ours, dense = read_gguf(tmp_path / "mobe.gguf"), read_gguf(tmp_path / "dense.gguf")
    checkpoint = MobeCheckpoint(source)

    expected = {}
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        for projection in layer.projections:
            transforms = [layer.transform(projection, e) for e in range(checkpoint.n_expert)]
            expected[names.transform_name(index, projection)] = torch.stack(transforms)
            expected[names.basis_name(index, projection)] = layer.basis(projection)
            expected[names.mix_name(index, projection)] = layer.mix(projection)
    assert len(expected) == 3 * sum(len(checkpoint.layer(i).projections) for i in checkpoint.moe_layers)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(values(ours, name), tensor.numpy(), err_msg=name, strict=True)
        assert ours.tensors[name].type == "f32"

    others = set(ours.tensors) - set(expected)
    assert others == set(dense.tensors) - set(expected)
    for name in others:
        want = values(dense, name)
        if options.get("dtype") is torch.bfloat16:
            want = torch.from_numpy(want).bfloat16().float().numpy()
        np.testing.assert_array_equal(values(ours, name), want, err_msg=name, strict=True)

    arch = ours.arch
    assert arch == dense.arch
    keys = {k: v for k, v in ours.keys.items() if k not in NAMED}
    assert keys.pop(names.key_version(arch)) == (2 if "down" in options.get("projections", ()) else 1)
    assert keys.pop(names.key_activation(arch)) == options.get("activation", "tanh")
    assert keys.pop(names.key_group_count(arch)) == options.get("g", 1)
    assert keys == {k: v for k, v in dense.keys.items() if k not in NAMED}
    assert report.n_bytes == (tmp_path / "mobe.gguf").stat().st_size
    assert report.original_params == sum(int(np.prod(t.shape)) for t in dense.tensors.values())


def test_shapes_of_the_format(mobe: Maker, tmp_path: Path) -> None:
    """ne, ggml's order, as docs/format.md, "GGUF", has them: d 64, p 48, n 8, r 32, m 4 in 2 groups."""
    export(mobe("qwen3_moe", r=32, g=2, by_row=True), tmp_path / "out.gguf", Recipe("f32"), quiet=True)
    tensors = read_gguf(tmp_path / "out.gguf").tensors
    ne = {name: list(reversed(t.shape)) for name, t in tensors.items()}
    for projection in ("gate", "up"):
        assert ne[f"blk.0.ffn_{projection}_exps.weight"] == [32, 48, 8]
        assert ne[f"blk.0.ffn_{projection}_basis.weight"] == [64, 32, 4]
        assert ne[f"blk.0.ffn_{projection}_basis.mix"] == [32, 2, 8]
    assert ne["blk.0.ffn_down_exps.weight"] == [48, 64, 8]

    source = mobe("qwen3_moe", r=32, g=2, by_row=True, projections=("down",))
    export(source, tmp_path / "out.gguf", Recipe("f32"), quiet=True)
    ne = {name: list(reversed(t.shape)) for name, t in read_gguf(tmp_path / "out.gguf").tensors.items()}
    assert ne["blk.0.ffn_down_exps.weight"] == [48, 32, 8]
    assert ne["blk.0.ffn_down_basis.weight"] == [32, 64, 4]
    assert ne["blk.0.ffn_down_basis.mix"] == [64, 2, 8]


@pytest.mark.parametrize(
    ("family", "architectures"),
    [
        ("qwen3_moe", ["Qwen3MoBEForCausalLM"]),
        ("deepseek_v3", ["DeepseekV3MoBEForCausalLM"]),
        ("bailing_moe", ["BailingMoBEForCausalLM"]),
    ],
)
def test_published_layout(family: str, architectures: list[str], mobe: Maker, tmp_path: Path) -> None:
    """bf16, no ``mobe`` key, the authors' own class in ``architectures``."""
    source = mobe(family, architectures=architectures, dtype=torch.bfloat16, activation="silu")
    export(source, tmp_path / "out.gguf", Recipe("bf16"), quiet=True)
    file = read_gguf(tmp_path / "out.gguf")
    layer = MobeCheckpoint(source).layer(1)
    assert file.tensors["blk.1.ffn_gate_basis.weight"].type == "bf16"
    np.testing.assert_array_equal(values(file, "blk.1.ffn_gate_basis.weight"), layer.basis("gate").numpy())


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0", "q5_1", "iq4_nl", "q4_k", "q6_k", "iq4_xs", "q2_k"])
def test_quantized_values(quant: str, tmp_path: Path, model: Maker) -> None:
    """Every tensor decodes to about what the f32 file holds: nothing is transposed, shifted or left out."""
    sizes = dict(hidden_size=256, moe_intermediate_size=256, head_dim=64, num_experts=4, num_hidden_layers=1)
    source = make_mobe(model("qwen3_moe", **sizes), tmp_path / "mobe", m=2, r=256)
    export(source, tmp_path / "f32.gguf", Recipe("f32"), quiet=True)
    report = export(source, tmp_path / "out.gguf", Recipe(parse_quant(quant)), refit=False, quiet=True)
    exact, rounded = read_gguf(tmp_path / "f32.gguf"), read_gguf(tmp_path / "out.gguf")
    assert not report.fallbacks
    limit = {"f16": 1e-6, "q8_0": 1e-4, "q6_k": 1e-3, "q5_1": 2e-3, "q2_k": 0.12}.get(quant, 0.012)
    for name in exact.tensors:
        a, b = values(exact, name), values(rounded, name)
        assert np.square(a - b).sum() <= limit * np.square(a).sum(), name
        if exact.tensors[name].type == rounded.tensors[name].type:
            np.testing.assert_array_equal(a, b)
    base = Recipe(parse_quant(quant)).base
    assert rounded.tensors["blk.0.ffn_gate_basis.weight"].type == base
    assert rounded.tensors["blk.0.ffn_up_exps.weight"].type == base
    assert all(
        t.type == "f32" for t in rounded.tensors.values() if t.name.endswith((".mix", "gate_inp.weight"))
    )
    assert rounded.keys["general.quantization_version"] == 2


def test_options_choose_types(mobe: Maker, tmp_path: Path) -> None:
    recipe = Recipe(
        "q8_0",
        basis="bf16",
        transform="q5_0",
        overrides=((r"^blk\.1\.ffn_up_basis", "f16"), ("_down_", "q4_0")),
    )
    report = export(mobe("olmoe", r=32), tmp_path / "out.gguf", recipe, quiet=True)
    found = {e.name: e.type for e in report.entries}
    assert found["blk.0.ffn_up_basis.weight"] == "bf16" and found["blk.1.ffn_up_basis.weight"] == "f16"
    assert found["blk.2.ffn_gate_exps.weight"] == "q5_0" and found["blk.2.attn_q.weight"] == "q8_0"
    assert found["blk.0.ffn_down_exps.weight"] == "f16"  # rows of 48
    assert {(e.name, e.wanted) for e in report.fallbacks} == {
        (f"blk.{i}.ffn_down_exps.weight", "q4_0") for i in range(3)
    }


def test_dry_run_writes_nothing_and_tells_the_size(mobe: Maker, tmp_path: Path) -> None:
    planned = export(mobe("olmoe"), tmp_path / "a.gguf", Recipe("q8_0"), dry_run=True, quiet=True)
    assert not list(tmp_path.iterdir())
    done = export(mobe("olmoe"), tmp_path / "a.gguf", Recipe("q8_0"), quiet=True)
    assert (
        planned.entries == done.entries
        and planned.n_bytes == done.n_bytes == (tmp_path / "a.gguf").stat().st_size
    )
    assert 0 < done.n_bytes - done.data_bytes < 64_000  # header, tokens, padding


def test_the_same_bytes_every_time(mobe: Maker, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(mobe("deepseek_v2"), tmp_path / "same.gguf", Recipe("q5_0"), quiet=True)
        (tmp_path / "same.gguf").rename(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_fp8_source(model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3 as published: FP8 with block scales; the converter dequantizes, export streams it all the same."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    source = tmp_path / "fp8"
    shutil.copytree(model("deepseek_v3"), source)
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        blocks = [-(-s // 16) for s in tensors[name].shape]
        tensors[name + "_scale_inv"] = torch.rand(blocks) + 0.5
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (source / "config.json").write_text(json.dumps(config))
    ours = tmp_path / "ours.gguf"
    export(source, ours, Recipe("f32"), allow_dense=True, quiet=True)
    assert ours.read_bytes() == stock_f32(source, tmp_path / "stock.gguf", monkeypatch).read_bytes()


def test_deepseek_v3_routes_by_sigmoid_even_if_its_config_does_not_say_so(
    model: Maker, tmp_path: Path
) -> None:
    import json
    import shutil

    source = tmp_path / "source"
    shutil.copytree(model("deepseek_v3"), source)
    config = json.loads((source / "config.json").read_text())
    del config["scoring_func"]
    (source / "config.json").write_text(json.dumps(config))
    for directory in (source, model("deepseek_v3")):
        export(directory, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
        assert read_gguf(tmp_path / "out.gguf").keys["deepseek2.expert_gating_func"] == 2
