"""Directories that people have: each is read as transformers reads it, or refused with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import Unchanged
from mobe_gguf.formats.safetensors import INDEX_NAME
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.gguf_source import GgufModel
from models.editing import edit_config, edit_tensors

Maker = Callable[..., Path]


def whole(path: Path) -> None:
    Checkpoint(path).check_whole()


def refused(path: Path, *said: str) -> None:
    """By every command that would work long on it."""
    with pytest.raises(MobeError) as error:
        whole(path)
    for text in said:
        assert text in str(error.value), error.value
    out = path.parent / "out"
    for command in (["factorize", path, out], ["export", path, f"{out}.gguf", "--dense", "--quant", "f32"]):
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert done.exit_code == 1 and done.stderr.startswith("Error: "), done.stderr
        assert not out.exists() and not Path(f"{out}.gguf").exists()


def test_no_output(own_model: Maker) -> None:
    path = own_model("olmoe")
    edit_tensors(path, lambda tensors: tensors.pop("lm_head.weight"))
    refused(path, "lm_head.weight is missing", "tie_word_embeddings")
    edit_config(path, tie_word_embeddings=True)
    whole(path)


def stale_index(path: Path, shard_there: bool) -> None:
    """An index of an older version, with other weights, beside ``model.safetensors``."""
    tensors = load_file(path / "model.safetensors")
    if shard_there:
        save_file({name: t + 1 for name, t in tensors.items()}, path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (path / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("shard_there", [True, False])
def test_one_file_counts_before_an_index(
    shard_there: bool, own_model: Maker, model: Maker, tmp_path: Path
) -> None:
    path = own_model("olmoe")
    stale_index(path, shard_there)
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert torch.equal(Checkpoint(path).get(name), load_file(path / "model.safetensors")[name])
    run = CliRunner().invoke
    dense = run(main, ["export", str(path), str(tmp_path / "a.gguf"), "--dense", "--quant", "f32"])
    assert dense.exit_code == 0 and "model.safetensors is read" in dense.stdout + dense.stderr, dense.stderr
    again = run(
        main, ["export", str(model("olmoe")), str(tmp_path / "b.gguf"), "--dense", "--quant", "f32", "-q"]
    )
    assert again.exit_code == 0
    tail = slice(-(1 << 16), None)  # the tensors' data, behind the names
    assert (tmp_path / "a.gguf").read_bytes()[tail] == (tmp_path / "b.gguf").read_bytes()[tail]
    planned = run(main, ["factorize", str(path), str(tmp_path / "out"), "--dry-run"])
    assert planned.exit_code == 0 and "model.safetensors is read" in planned.stderr, planned.stderr


@pytest.mark.parametrize("fused", [True, False])
def test_counts_of_experts(fused: bool, own_model: Maker) -> None:
    path = own_model("qwen2_moe", fused=fused)
    edit_config(path, num_experts=7)
    refused(path, "7")


def test_rows_of_the_router(own_model: Maker) -> None:
    path = own_model("olmoe")
    name = "model.layers.1.mlp.gate.weight"
    edit_tensors(path, lambda tensors: tensors.update({name: tensors[name][:7].clone()}))
    refused(path, name, "[7, 64]", "expected [8, 64]")


def test_rows_of_the_embedding(own_model: Maker) -> None:
    path = own_model("olmoe")
    edit_config(path, vocab_size=300)
    refused(path, "has shape [384, 64], expected [300, 64]")


def test_square_fused_experts_are_told_by_down(own_model: Maker) -> None:
    """``2p = d``: gate and up have the same shape stored ``[n, d, 2p]``; then down is ``[n, p, d]``."""
    path = own_model("qwen3_moe", fused=True, moe_intermediate_size=32)

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    whole(path)
    edit_tensors(path, transpose)
    refused(path, "mlp.experts.down_proj has shape [8, 32, 64], expected [8, 64, 32]")


@pytest.mark.parametrize("together", [True, False])
def test_fp8_blocks_over_both_halves(together: bool, own_model: Maker, model: Maker) -> None:
    """Blocks of 32 rows over a fused ``2p = 96``, of which gate ends within the second."""
    path = own_model("qwen3_moe", fused=True, moe_intermediate_size=48)
    edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    name = "model.layers.0.mlp.experts.gate_up_proj"
    truth = load_file(path / "model.safetensors")[name]

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        parts = [truth] if together else truth.chunk(2, 1)
        scales = [torch.nn.functional.max_pool2d(w.abs(), 32, ceil_mode=True) / 448 for w in parts]
        full = [
            s.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, : w.shape[1], : w.shape[2]]
            for s, w in zip(scales, parts, strict=True)
        ]
        tensors[name] = (truth / torch.cat(full, 1)).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.cat(scales, 1)

    edit_tensors(path, quantize)
    checkpoint = Checkpoint(path)
    checkpoint.check_experts(0, "up")
    for part, projection in enumerate(("gate", "up")):
        expected = truth.chunk(2, 1)[part]
        torch.testing.assert_close(checkpoint.expert_stack(0, projection), expected, rtol=0.07, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "remove 'quantization_config'"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "/own model.gguf"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ],
)  # fmt: skip
def test_forms_by_config(config: dict[str, Any], said: str, own_model: Maker) -> None:
    path = own_model("olmoe")
    edit_config(path, **config)
    refused(path, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name: name.replace("mlp.experts.0", "mlp.switch_mlp"), "MLX"),
        (lambda name: name.replace(".up_proj.weight", ".up_proj.qweight"), "GPTQ or AWQ"),
        (lambda name: name.replace(".up_proj.weight", ".up_proj.weight_packed"), "compressed-tensors"),
        (lambda name: "language_model." + name, "multimodal"),
    ],
    ids=["mlx", "gptq", "packed", "prefix"],
)
def test_forms_by_names(change: Callable[[str], str], said: str, own_model: Maker) -> None:
    path = own_model("olmoe")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(path, rename)
    refused(path, said)


def _scheme(form: str, **weights: Any) -> dict[str, Any]:
    """``quantization_config`` as compressed-tensors writes it."""
    group = {"targets": ["Linear"], "weights": weights | {"symmetric": True, "dynamic": False}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def _by_channel(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """FP8 with a scale for each row."""
    scale = (w.abs().amax(1, keepdim=True) / 448).bfloat16()
    stored = (w / scale.float()).to(torch.float8_e4m3fn)
    return {name: stored, name + "_scale": scale}, stored.float() * scale.float()


def _packed(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Four bits, eight values a number, a scale for each 16 values of a row."""
    groups = w.unflatten(1, (-1, 16))
    scale = (groups.abs().amax(2) / 7).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    numbers = (codes.long() + 8).flatten(1).unflatten(1, (-1, 8)) << (4 * torch.arange(8))
    numbers = numbers.sum(-1)
    stored = torch.where(numbers >= 1 << 31, numbers - (1 << 32), numbers).int()
    shape = torch.tensor(w.shape, dtype=torch.int64)
    tensors = {name + "_packed": stored, name + "_scale": scale, name + "_shape": shape}
    return tensors, (codes * scale.float()[..., None]).flatten(1)


@pytest.mark.parametrize(
    ("store", "scheme"),
    [
        (_by_channel, _scheme("float-quantized", num_bits=8, type="float", strategy="channel")),
        (_packed, _scheme("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16)),
    ],
)
def test_compressed_tensors_by_way_of_gguf(
    store: Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]],
    scheme: dict[str, Any],
    own_model: Maker,
    tmp_path: Path,
) -> None:
    """Refused as a directory with the command that reads it; that command reads the values that are meant."""
    path = own_model("qwen3_moe", num_hidden_layers=1)
    edit_config(path, quantization_config=scheme)
    meant: dict[str, torch.Tensor] = {}

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            stored, meant[name] = store(name, tensors.pop(name))
            tensors |= stored

    edit_tensors(path, quantize)
    refused(path, "compressed-tensors", f"mobe-gguf convert {path} model.gguf")
    out = tmp_path / "model.gguf"
    done = CliRunner().invoke(main, ["convert", str(path), str(out), "--outtype", "f32", "-q"])
    assert done.exit_code == 0, done.stderr
    model = GgufModel(out)
    for projection in ("gate", "up", "down"):
        for e in (0, 7):
            expected = meant[f"model.layers.0.mlp.experts.{e}.{projection}_proj.weight"]
            torch.testing.assert_close(model.expert(0, projection, e), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("command", ["factorize", "moments", "verify", "inspect"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_directory_is_not_the_model(
    command: str, name: str, model: Maker, tmp_path: Path
) -> None:
    words = [command, str(model("olmoe") / name)]
    words += [str(tmp_path / "out")] if command in ("factorize", "moments") else []
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1 and f"by its directory: {model('olmoe')}" in done.output, done.output


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("export", ["--dense", "--quant", "q8_0"]),
        ("convert", []),
        ("moments", []),
        ("compress", ["--quant", "q8_0"]),
    ],
)
def test_no_command_replaces_what_it_reads(command: str, options: list[str], own_model: Maker) -> None:
    path = own_model("olmoe")
    before = (path / "model.safetensors").read_bytes()
    done = CliRunner().invoke(main, [command, str(path), str(path / "model.safetensors"), *options])
    assert done.exit_code == 2 and "that is read; it would be replaced" in done.stderr, done.stderr
    assert (path / "model.safetensors").read_bytes() == before


def test_widths_that_grouped_products_refuse(own_model: Maker, tmp_path: Path) -> None:
    """Rows of 33 values: moments are gathered, and the file is compared with transformers."""
    path, text = own_model("qwen3_moe", num_hidden_layers=1, moe_intermediate_size=33), tmp_path / "text"
    text.write_text(tiny.TEXT * 4)
    for command in (
        ["moments", path, tmp_path / "m.safetensors", "--text", text, "--ctx", "32", "--chunks", "2", "-q"],
        ["export", path, tmp_path / "m.gguf", "--dense", "--quant", "q8_0"],
    ):
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert done.exit_code == 0, done.output
    assert "differs from transformers" in done.stderr


def test_moments_are_no_imatrix(model: Maker, tmp_path: Path) -> None:
    asked = ["factorize", str(model("olmoe")), str(tmp_path / "out"), "--imatrix"]
    done = CliRunner().invoke(main, [*asked, str(model("olmoe") / "model.safetensors")])
    assert done.exit_code == 1 and "second moments are given with --moments" in done.stderr


def test_rank_without_blocks(model: Maker, tmp_path: Path) -> None:
    run = CliRunner().invoke
    asked = ["factorize", str(model("olmoe")), str(tmp_path / "out"), "--dry-run", "--rank"]
    assert (
        "no whole blocks of 32: every --quant writes it as f16. 32 and 64 are"
        in run(main, [*asked, "40"]).stderr
    )
    assert "no whole blocks" not in run(main, [*asked, "32"]).stderr


def _extra_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["score.weight"] = torch.randn(2, 64)


def _dense_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(96, 64)


@pytest.mark.parametrize(
    ("damage", "said"), [(_extra_head, "score.weight"), (_dense_layer, "model.layers.0.mlp.up_proj.weight")]
)
def test_converter_is_asked_before_work(damage, said: str, own_model: Maker, tmp_path: Path) -> None:
    """What export would meet at the end is met by ``factorize`` and ``compress`` at the start."""
    path = own_model("qwen3_moe", num_hidden_layers=1)
    edit_tensors(path, damage)
    for command in (
        ["factorize", path, tmp_path / "mobe", "--steps", "1"],
        ["compress", path, tmp_path / "out.gguf", "--quant", "q8_0"],
    ):
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert done.exit_code == 1 and said in done.stderr, (command, done.stderr)
    assert not (tmp_path / "mobe").exists() and not (tmp_path / "mobe.work").exists()


def test_tokenizer_may_come_later(own_model: Maker, tmp_path: Path) -> None:
    path = own_model("qwen3_moe", num_hidden_layers=1)
    (path / "tokenizer.json").unlink()
    done = CliRunner().invoke(main, ["factorize", str(path), str(tmp_path / "mobe"), "--dry-run"])
    assert done.exit_code == 0 and "export needs the tokenizer" in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize("family", tiny._CLASSES)
def test_fused_experts_everywhere(family: str, model: Maker, tmp_path: Path) -> None:
    """transformers 5's form goes through ``factorize``, ``export``, ``export --dense`` and ``reconstruct``, as the other does."""
    files = {}
    for fused in (False, True):
        folder = tmp_path / str(fused)
        source, mobe = model(family, fused=fused, num_hidden_layers=2), folder / "mobe"
        folder.mkdir()
        for command in (
            ["factorize", source, mobe, "--steps", 2, "--dtype", "f32", "-q"],
            ["export", source, folder / "dense.gguf", "--dense", "--quant", "f32", "-q"],
            ["export", mobe, folder / "mobe.gguf", "--quant", "f32", "-q"],
            ["reconstruct", mobe, folder / "model", "-q"],
        ):
            done = CliRunner().invoke(main, [str(word) for word in command])
            assert done.exit_code == 0, (command, done.stderr)
        files[fused] = [data_of(folder / name) for name in ("dense.gguf", "mobe.gguf")]
        shutil.rmtree(folder)
    assert files[False] == files[True]


def data_of(path: Path) -> dict[str, bytes]:
    from mobe_gguf.formats.gguf import read_gguf

    raw = path.read_bytes()
    return {name: raw[t.offset : t.offset + t.n_bytes] for name, t in read_gguf(path).tensors.items()}


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj.weight"]
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.complex64, torch.float8_e5m2])
def test_weights_that_are_no_floats(name: str, dtype: torch.dtype, own_model: Maker) -> None:
    """Whole numbers are codes whose scales are missing; the router's gave other answers than transformers, and no word."""
    path = own_model("qwen3_moe", num_hidden_layers=1)
    edit_tensors(path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(MobeError, match=f"tensor {name} has type"):
        whole(path)


@pytest.mark.parametrize(
    "name", ["lm_head.bias", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"]
)
@pytest.mark.parametrize("shape", [(), (0,), (0, 64)])
def test_weights_that_are_empty(name: str, shape: tuple[int, ...], own_model: Maker) -> None:
    path = own_model("qwen3_moe", num_hidden_layers=1)
    edit_tensors(path, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(MobeError, match=f"tensor {name} has shape .*, which holds no weights"):
        whole(path)


def test_a_bias_that_transformers_leaves_out(own_model: Maker) -> None:
    """llama.cpp added it in the layer that has it."""
    path = own_model("qwen3_moe", num_hidden_layers=2)
    name = "model.layers.1.self_attn.q_proj.bias"
    edit_tensors(path, lambda tensors: tensors.update({name: torch.ones(64)}))
    refused(path, f"there is a tensor {name}, and config.json says 'attention_bias' false")


def test_a_token_beyond_the_vocabulary(own_model: Maker, tmp_path: Path) -> None:
    """The converter asserts without words; its condition is shown."""
    source = own_model("qwen3_moe", num_hidden_layers=1)
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    more = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [{"id": 9999, "content": "<far>", "special": True, **more}]
    path.write_text(json.dumps(tokenizer))
    command = ["export", str(source), str(tmp_path / "out.gguf"), "--dense", "--quant", "f32"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and "< vocab_size" in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["export", "factorize", "moments", "compress"])
@pytest.mark.parametrize("gone", [False, True])
def test_weights_that_change_while_they_are_read(
    command: str, gone: bool, own_model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as by a download into the same directory: the result would be of two models."""
    source, text = own_model("qwen3_moe", num_hidden_layers=1), tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 4)
    shard = source / "model.safetensors"
    words = {
        "export": "--dense --quant f32",
        "factorize": "--steps 2 --dtype f32",
        "moments": f"--text {text} --ctx 32 --chunks 2",
        "compress": f"--form plain --quant q4_0 --no-measure --text {text} --ctx 32 --chunks 2",
    }[command]
    checked = Unchanged.check

    def late(self: Unchanged, left: str) -> None:
        if gone:
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes())
        checked(self, left)

    monkeypatch.setattr(Unchanged, "check", late)
    out = tmp_path / ("out" if command == "factorize" else "out.gguf")
    done = CliRunner().invoke(main, [command, str(source), str(out), *words.split(), "-q"])
    said = "is gone" if gone else "was changed"
    assert done.exit_code == 1 and f"{shard}: it {said} while it was read" in done.stderr, done.stderr
    assert not out.exists()
