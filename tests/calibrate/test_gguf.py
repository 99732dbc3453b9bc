"""Moments of a GGUF file: those of the directory that it was made of; q8_0's nearly."""

from __future__ import annotations

import pytest

from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core.errors import MobeError
from mobe_gguf.export import Recipe, export
from mobe_gguf.formats.moments import Moments

pytestmark = pytest.mark.runtime


def gathered(path, text, out) -> Moments:
    about = collect(path, text, out, ctx=32, chunks=4, keep=1, quiet=True)
    assert about["source"] == ("gguf, dequantized" if path.is_file() else "safetensors")
    return Moments(out)


@pytest.mark.parametrize(
    ("family", "quant", "tolerance"), [("qwen3_moe", "f32", 1e-3), ("qwen2_moe", "q8_0", 0.1)]
)
def test_same_as_the_directory(family, quant, tolerance, model, text, tmp_path):
    export(model(family), tmp_path / "m.gguf", Recipe(quant), dense=True, quiet=True)
    got = gathered(tmp_path / "m.gguf", text, tmp_path / "gguf")
    expected = gathered(model(family), text, tmp_path / "hf")
    assert set(got.names) == set(expected.names)
    for name in got.names:
        a, b = (m.find(name).root for m in (got, expected))
        a, b = a @ a.mT * got.scale(name), b @ b.mT * expected.scale(name)
        assert float((a - b).norm() / b.norm()) < tolerance, name


def test_other_architectures_are_told_what_works(model, text, tmp_path):
    export(model("olmoe"), tmp_path / "m.gguf", Recipe("q8_0"), dense=True, quiet=True)
    with pytest.raises(
        MobeError, match=r"gathered for qwen3moe, qwen2moe, this is olmoe. Give the Hugging Face"
    ):
        collect(tmp_path / "m.gguf", text, tmp_path / "o", quiet=True)
