"""GGUF files as the model to factorize: experts by slice, of every type; jobs as of any other model."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import gguf_files

from mobe_gguf import runtime
from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.factorize.job import prepare, run, running, work_directory
from mobe_gguf.factorize.plan import Options
from mobe_gguf.formats.types import BY_NAME
from mobe_gguf.models import gguf_source
from mobe_gguf.models.gguf_factors import GgufFactors
from mobe_gguf.models.gguf_source import GgufModel, StoredTensor
from mobe_gguf.models.mobe_checkpoint import reconstruct
from mobe_gguf.models.original import open_original
from mobe_gguf.runtime import ggml

FAST = Options(steps=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 file: 2 layers, 8 experts of 48 x 64."""
    return gguf_files.qwen3moe().write(tmp_path_factory.mktemp("gguf") / "plain.gguf")


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str, int]], arch: str = "qwen3moe") -> Path:
    """A file of tensors given as (bytes ``[..., row bytes]``, ggml type, values a row), with the keys that are read here and,
    empty, the tensors beside experts that every model has."""
    runtime.use_conversion()  # PyPI's gguf cannot write q2_0
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_uint32(f"{arch}.block_count", 2)
    writer.add_uint32(f"{arch}.expert_used_count", 2)
    for name, (data, type_name, _) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_name.upper()])
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    others = [f"blk.{i}.ffn_gate_inp.weight" for i in sorted(layers)]
    for name in ("token_embd.weight", "output_norm.weight", *others):
        if name not in tensors:
            writer.add_tensor(name, np.zeros((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encoded(values: np.ndarray, type_name: str) -> tuple[np.ndarray, str, int]:
    importance = np.ones(values.shape[-1], np.float32)
    return ggml.quantize(values, type_name, importance), type_name, values.shape[-1]


def experts(p: int = 4, d: int = 256, n: int = 3) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((n, p, d), dtype=np.float32)


#: Types whose values can be read: all but integers and those of inputs.
DECODED = sorted(set(BY_NAME) - {"f64", "i8", "i16", "i32", "i64", "q8_1", "q8_k"})


def test_every_type_is_here() -> None:
    assert sorted(name for name, info in ggml.types().items() if info.decodes) == DECODED


@pytest.mark.parametrize("type_name", DECODED)
def test_every_type(type_name: str, tmp_path: Path) -> None:
    """What a slice decodes to is what the whole decodes to."""
    w = experts()
    tensors = {}
    for projection in names.ALL_PROJECTIONS:
        values = w if projection != "down" else np.ascontiguousarray(np.repeat(w, 64, axis=1)[..., :256])
        tensors[names.transform_name(1, projection)] = encoded(values, type_name)
    model = GgufModel(write(tmp_path / "m.gguf", tensors))
    assert (model.n_expert, model.n_ff_exp, model.n_embd, model.moe_layers) == (3, 4, 256, (1,))
    for projection in ("gate", "up"):
        model.check_experts(1, projection)
        data, _, row = tensors[names.transform_name(1, projection)]
        expected = torch.from_numpy(ggml.dequantize(data, type_name, row))
        assert torch.equal(model.expert(1, projection, 2), expected[2])
        assert torch.equal(model.expert_stack(1, projection), expected)
        stored = model.stored(1, projection)
        assert b"".join(stored.blocks()) == data.tobytes()
        assert torch.equal(torch.cat(list(stored.pieces())).reshape(3, 4, 256), expected)


def test_merged_gate_and_up(tmp_path: Path) -> None:
    w = experts(p=6)
    data = encoded(w, "q4_k")
    model = GgufModel(write(tmp_path / "m.gguf", {gguf_source.merged_name(0): data}))
    expected = torch.from_numpy(ggml.dequantize(data[0], "q4_k", 256))
    assert model.is_merged(0) and model.n_ff_exp == 3 and model.moe_layers == (0,)
    assert torch.equal(model.expert_stack(0, "gate"), expected[:, :3])
    assert torch.equal(model.expert_stack(0, "up"), expected[:, 3:])
    up = model.stored(0, "up")
    assert b"".join(up.blocks()) == data[0][:, 3:].tobytes()
    assert torch.equal(torch.cat(list(up.pieces())).reshape(3, 3, 256), expected[:, 3:])
    with pytest.raises(MobeError, match="ffn_down_exps.weight is missing"):
        model.expert(0, "down", 0)


def test_only_the_expert_is_read(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, pread = GgufModel(plain), [], os.pread

    def counting(fd: int, n: int, at: int) -> bytes:
        read.append((at, n))
        return pread(fd, n, at)

    monkeypatch.setattr(os, "pread", counting)
    model.expert(1, "up", 5)
    info = model.file.tensors[names.transform_name(1, "up")]
    assert read == [(info.offset + 5 * 48 * 64 * 4, 48 * 64 * 4)]


def test_memory_while_copying_and_decoding(tmp_path: Path) -> None:
    """A tensor of 32 MB, in pieces."""
    big = np.zeros((1 << 15, 256), np.float32)
    path = write(tmp_path / "m.gguf", {"token_embd.weight": encoded(big, "f32"), **_up(experts())})
    stored = StoredTensor.of(GgufModel(path).file.tensors["token_embd.weight"])
    del big
    tracemalloc.start()
    assert sum(map(len, stored.blocks())) == 32 << 20
    assert sum(piece.numel() for piece in stored.pieces()) == 1 << 23
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def _up(w: np.ndarray) -> dict[str, tuple[np.ndarray, str, int]]:
    return {names.transform_name(0, p): encoded(w, "f32") for p in names.PROJECTIONS}


def test_what_is_refused(plain: Path, tmp_path: Path) -> None:
    dense = gguf_files.llama().write(tmp_path / "dense.gguf")
    with pytest.raises(MobeError, match=r"dense\.gguf: no tensor blk.*\(llama\) has no routed experts"):
        open_original(dense)
    mobe = gguf_files.factorize(gguf_files.qwen3moe()).write(tmp_path / "mobe.gguf")
    with pytest.raises(MobeError, match=r"holds MoBE factors already \(blk\.0\.ffn_gate_basis"):
        open_original(mobe)
    (tmp_path / "cut.gguf").write_bytes(plain.read_bytes()[:-100])
    with pytest.raises(MobeError, match=r"cut\.gguf.*lie outside the file"):
        open_original(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("something else, of some length")
    with pytest.raises(MobeError, match="not a GGUF file"):
        open_original(tmp_path / "text.gguf")
    with pytest.raises(MobeError, match="no such directory"):
        open_original(tmp_path / "missing.gguf")


def test_values_that_are_not_finite(plain: Path, tmp_path: Path) -> None:
    file = gguf_files.qwen3moe()
    file.tensors[names.transform_name(1, "up")][3, 2, 1] = np.nan
    model = GgufModel(file.write(tmp_path / "nan.gguf"))
    model.expert(1, "up", 2)
    with pytest.raises(
        MobeError, match=r"blk\.1\.ffn_up_exps\.weight, expert 3, holds 1 values that are NaN"
    ):
        run(prepare(model.path, tmp_path / "out", FAST), quiet=True)
    assert not (tmp_path / "out").exists()


def test_matrices_of_a_layer_that_do_not_fit_each_other(tmp_path: Path) -> None:
    tensors = _up(experts()) | {names.transform_name(1, p): encoded(experts(p=8), "f32") for p in ("up",)}
    tensors |= {names.transform_name(1, "gate"): encoded(experts(p=4), "f32")}
    tensors |= {names.transform_name(i, "down"): encoded(experts(), "f32") for i in range(2)}
    path = write(tmp_path / "m.gguf", tensors)
    with pytest.raises(
        MobeError, match=r"blk\.1\.ffn_gate_exps\.weight has shape \[3, 4, 256\], expected \[3, 8, 256\]"
    ):
        prepare(path, tmp_path / "out", FAST)
    assert prepare(path, tmp_path / "out", Options(layers=(0,), bases=2, steps=2)).settings.layers == (0,)


def test_experts_without_a_gate(tmp_path: Path) -> None:
    """Some architectures have up and down alone."""
    tensors = {names.transform_name(0, p): encoded(experts(), "f32") for p in ("up", "down")}
    path = write(tmp_path / "m.gguf", tensors)
    with pytest.raises(MobeError, match=r"ffn_gate_exps\.weight is missing.*\n  --projections up"):
        prepare(path, tmp_path / "out", FAST)
    run(prepare(path, tmp_path / "out", Options(projections=("up",), bases=2, steps=2)), quiet=True)
    assert GgufFactors(tmp_path / "out").layer(0).projections == ("up",)


def test_a_whole_job(plain: Path, tmp_path: Path) -> None:
    result = run(prepare(plain, tmp_path / "out", Options(bases=4, groups=2, rank=40, steps=3)), quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}, "the work directory must be gone"
    source, got = GgufModel(plain), GgufFactors(tmp_path / "out")
    assert got.activation == "tanh" and got.arch == "qwen3moe" and got.moe_layers == (0, 1)
    for unit in result.units:
        layer = got.layer(unit.layer)
        assert layer.group_count(unit.projection) == 2 and layer.rank(unit.projection) == 40
        w = source.expert_stack(unit.layer, unit.projection)
        error = float((w - reconstruct(layer, unit.projection)).square().sum() / w.square().sum())
        assert error == pytest.approx(unit.error, rel=1e-3)
        recorded = got.config["mobe"]["errors"][str(unit.layer)][unit.projection]
        assert error == pytest.approx(recorded, rel=1e-3)
    assert got.dtype("blk.1.B_up_1") == torch.float32, "that of the experts"
    assert got.open_source().checksum == source.checksum
    with pytest.raises(MobeError, match="holds factors of a GGUF file already"):
        prepare(tmp_path / "out", tmp_path / "again", FAST)


def test_resume(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after some units; the same bytes as in one go.  Another file, or setting, is refused.  (The last digits depend on
    the number of threads of a unit, and so on that of the workers.)"""
    run(prepare(plain, tmp_path / "whole", FAST), quiet=True, workers=1)
    fit_unit, done = running.fit_unit, []

    def failing(*args, **kwargs):
        if len(done) == 2:
            raise MobeError("stopped here")
        done.append(args)
        return fit_unit(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(running, "fit_unit", failing)
        with pytest.raises(MobeError, match="stopped here"):
            run(prepare(plain, tmp_path / "out", FAST), quiet=True, workers=1)
    other = gguf_files.qwen3moe()
    other.tensors["output.weight"] += 1
    other.write(tmp_path / "other.gguf")
    with pytest.raises(MobeError, match="the checksum of MODEL was"):
        prepare(tmp_path / "other.gguf", tmp_path / "out", FAST, resume=True)
    with pytest.raises((MobeError, UsageError), match="--steps is 3 now"):
        prepare(plain, tmp_path / "out", Options(steps=3), resume=True)
    assert json.loads((work_directory(tmp_path / "out") / "job.json").read_text())["source_checksum"]
    run(prepare(plain, tmp_path / "out", FAST, resume=True), quiet=True, workers=1)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_a_method_without_a_form_of_its_own(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--method d2moe writes an ordinary model.*plain.gguf is a GGUF file"
    ):
        prepare(plain, tmp_path / "out", Options(method="d2moe"))
    run(prepare(plain, tmp_path / "out", Options(method="svd", rank=24)), quiet=True)
    assert GgufFactors(tmp_path / "out").activation == "none"


def test_checksum_sees_tensors_not_metadata(plain: Path, tmp_path: Path) -> None:
    expected = GgufModel(plain).checksum
    file = gguf_files.qwen3moe()
    file.keys["general.name"] = "another name"
    assert GgufModel(file.write(tmp_path / "name.gguf")).checksum == expected
    file.tensors["blk.1.attn_norm.weight"][0] += 1
    assert GgufModel(file.write(tmp_path / "value.gguf")).checksum != expected
    file = gguf_files.qwen3moe()
    file.tensors["output_norm.weight"] = file.tensors["output_norm.weight"].astype(np.float16)
    assert GgufModel(file.write(tmp_path / "type.gguf")).checksum != expected


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_gate_inp.weight"])
def test_a_file_without_what_every_model_needs(name: str, tmp_path: Path) -> None:
    file = gguf_files.qwen3moe()
    GgufModel(file.write(tmp_path / "whole.gguf")).check_whole()
    del file.tensors[name]
    path = file.write(tmp_path / "model.gguf")
    with pytest.raises(MobeError, match=f"{path}: tensor {name} is missing"):
        prepare(path, tmp_path / "out", Options())


def test_more_experts_used_than_there_are(tmp_path: Path) -> None:
    file = gguf_files.qwen3moe()
    file.keys["qwen3moe.expert_used_count"] = 9
    path = file.write(tmp_path / "model.gguf")
    with pytest.raises(MobeError, match="key qwen3moe.expert_used_count is 9, expected 1 to 8"):
        prepare(path, tmp_path / "out", Options())


def test_layers_for_prediction_are_left_as_they_are(tmp_path: Path) -> None:
    """No text runs through them, so no moments or imatrix have anything of them."""
    file = gguf_files.qwen3moe()
    file.keys["qwen3moe.nextn_predict_layers"] = 1
    model = GgufModel(file.write(tmp_path / "model.gguf"))
    assert model.moe_layers == (0,) and model.n_layer == 1
    file.keys["qwen3moe.nextn_predict_layers"] = 2
    with pytest.raises(MobeError, match="nextn_predict_layers is 2, expected less than the 2 layers"):
        GgufModel(file.write(tmp_path / "model.gguf"))


def test_experts_used_by_layer(tmp_path, model):
    """An array that begins with 0, for a dense layer: the most of them are used, and the file is sound."""
    import gguf

    from mobe_gguf.evaluate.verify import verify
    from mobe_gguf.export import Recipe, export

    source, out = tmp_path / "one.gguf", tmp_path / "array.gguf"
    export(model("olmoe"), source, Recipe("f32"), allow_dense=True, quiet=True)
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "olmoe")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind, of = field.types[0], field.types[-1]
        if key == "olmoe.expert_used_count":
            writer.add_array(key, [0, 2, 2])
        else:
            writer.add_key_value(
                key, field.contents(), kind, of if kind == gguf.GGUFValueType.ARRAY else None
            )
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.0.") and "_exps" in tensor.name:
            continue
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GgufModel(out).n_expert_used == 2
    GgufModel(out).check_whole()
    assert not verify(out, quiet=True).problems
