"""Encoding tensors: values that have the type already are copied, to the same bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mobe_gguf.core.errors import MobeError
from mobe_gguf.export import Recipe, encoder, export, refit, write
from mobe_gguf.export.encoder import NearestEncoder
from mobe_gguf.export.source import Stacked, Tensor, Whole
from mobe_gguf.models.gguf_source import StoredTensor
from mobe_gguf.quant import roundtrip
from mobe_gguf.quant.recipe import BLOCK, NEED_IMATRIX
from mobe_gguf.runtime import ggml

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def encoded(values: torch.Tensor, type_name: str, source: type = Whole) -> bytes:
    given = Whole(values) if source is Whole else Stacked(tuple(values.shape), lambda i: values[i])
    return b"".join(
        bytes(block) for block in write.encode(Tensor("t", given), NearestEncoder(type_name, None), type_name)
    )


def every_finite(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of 16 bits, subnormal ones and zeros of both signs among them; of 32 bits as many at random."""
    if dtype is torch.float32:
        bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32).view(np.int32)
    else:
        bits = np.arange(2**16, dtype=np.uint16).view(np.int16)
    values = torch.from_numpy(bits).view(dtype)
    return torch.where(values.isfinite(), values, 0).reshape(4, 64, 256)


@pytest.mark.parametrize("type_name", DTYPES)
@pytest.mark.parametrize("source", [Whole, Stacked])
def test_same_type_same_bytes(type_name, source, monkeypatch):
    values = every_finite(DTYPES[type_name])
    expected = ggml.quantize(values.float().numpy(), type_name).tobytes()
    asked = []
    monkeypatch.setattr(ggml, "quantize", lambda *_, **__: asked.append(1))
    assert encoded(values, type_name, source) == expected and not asked
    strided = values.transpose(0, 1).contiguous().transpose(0, 1)
    assert encoded(strided, type_name, source) == expected


def test_a_model_is_copied(mobe, tmp_path, monkeypatch):
    """A, B and all that the converter leaves alone: only vectors, router and mix, which are f32, are converted."""
    converted = []
    real = ggml.quantize
    monkeypatch.setattr(
        ggml, "quantize", lambda *a, **k: converted.append((a[1], k["name"])) or real(*a, **k)
    )
    source = mobe("olmoe", dtype=torch.bfloat16)
    export(source, tmp_path / "copied.gguf", Recipe("bf16"), quiet=True)
    names = "".join(name for _, name in converted)
    assert (
        {kind for kind, _ in converted} == {"f32"} and "_basis.weight" not in names and "_exps" not in names
    )
    monkeypatch.setattr(encoder, "PLAIN", {})
    export(source, tmp_path / "converted.gguf", Recipe("bf16"), quiet=True)
    assert (tmp_path / "copied.gguf").read_bytes() == (tmp_path / "converted.gguf").read_bytes()
    assert "ffn_gate_basis.weight" in "".join(name for _, name in converted)


@pytest.mark.parametrize("type_name", DTYPES)
def test_other_types_pass_through_float32(type_name):
    for dtype in DTYPES.values():
        values = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert encoded(values, type_name) == ggml.quantize(values.float().numpy(), type_name).tobytes()


@pytest.mark.parametrize("type_name", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -float("nan")])
def test_what_is_not_finite_is_refused(type_name, value):
    values = torch.zeros(4, 32, dtype=DTYPES[type_name])
    values[2, 7] = value
    with pytest.raises(MobeError, match=r"tensor t, .* row 2, column 7 is not finite"):
        encoded(values, type_name)


def test_what_is_not_whole_is_refused(tmp_path):
    """A source with fewer rows than its shape says; a tensor of another size than the tensor table has."""
    short = Stacked((4, 8, 32), lambda i: torch.zeros(7, 32))
    with pytest.raises(MobeError, match="32 rows of 32 values gave 28"):
        list(write.encode(Tensor("t", short), NearestEncoder("f16", None), "f16"))
    wrong = write.Encoded(Tensor("t", Whole(torch.zeros(4, 32))), "f16", 255)
    with open(tmp_path / "out", "wb") as file, pytest.raises(MobeError, match="t: 256 bytes.*255"):
        wrong.tofile(file)


class Anything:
    """An encoder of somebody else's, which looks at nothing."""

    by_matrix = False

    def open(self):
        return lambda rows, matrix, name: np.zeros(rows.shape, np.uint8)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("type_name", sorted(BLOCK))
def test_every_type_and_path_is_checked_before_its_encoder(type_name, value, monkeypatch):
    """libggml turns such values into valid blocks without a word (or stops the process): it is never asked."""
    values = torch.zeros(4, 256)
    values[2, 7] = value
    monkeypatch.setattr(ggml, "_in_parallel", lambda work, rows, *_: work(0, rows))
    where = r"row 2, column 7 is not finite"
    ones = np.ones(256, np.float32)
    calls = [lambda: list(write.encode(Tensor("t", Whole(values)), Anything(), type_name))]
    if type_name[:3] not in (
        "iq1",
        "iq2",
    ):  # their encoders prepare tables for half a minute before they look
        calls.append(lambda: ggml.quantize(values.numpy(), type_name, ones))
        calls.append(lambda: refit.decoded(values, type_name, ones, "t"))
    if type_name not in NEED_IMATRIX:
        calls.append(lambda: roundtrip.rounded(values, type_name))
    for call in calls:
        with pytest.raises(MobeError, match=where):
            call()


@pytest.mark.parametrize("type_name", ["q8_0", "q4_k", "bf16", "f32"])
def test_what_passes_through_a_gguf_file_is_checked(type_name, tmp_path):
    data = ggml.quantize(np.ones((2, 8, 256), np.float32), type_name)
    path = tmp_path / "source.gguf"
    kind = ggml.type_info(type_name)
    stored = StoredTensor("t", path, type_name, (2, 8, 256), 0, data.nbytes // 2)
    for damage in (False, True):
        raw = bytearray(data.tobytes())
        if damage:  # the last block's scale, or the last value
            at = len(raw) - kind.bytes + (2 if type_name == "f32" else 0)
            raw[at : at + 2] = (0x7FFF).to_bytes(2, "little")
        path.write_bytes(raw)
        out, tensor = io.BytesIO(), write.Copied(Tensor("t", stored), type_name, len(raw))
        if damage:
            with pytest.raises(MobeError, match=r"source.gguf: tensor t holds values that are NaN or Inf"):
                tensor.tofile(out)
        else:
            tensor.tofile(out)
            assert out.getvalue() == raw


def test_values_that_are_too_small_are_mentioned(mobe, tmp_path):
    source = mobe("olmoe", dtype=torch.float32)
    assert not any(
        "too small" in note for note in export(source, tmp_path / "a", Recipe("f16"), quiet=True).notes
    )
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors[name] = tensor * 1e-5 if "q_proj" in name else tensor
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (note,) = export(source, tmp_path / "b", Recipe("f16"), quiet=True).notes
    assert note.startswith("blk.0.attn_q.weight") and "too small for f16" in note
