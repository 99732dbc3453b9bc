"""``mobe-gguf verify``: whole files pass; of broken ones the tensor, key or file and the reason are named."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from export.test_gguf_kinds import by_layer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity.gguf_files import GgufFile, factorize, qwen3moe
from rich.console import Console

from mobe_gguf import runtime
from mobe_gguf.cli import main
from mobe_gguf.core import progress
from mobe_gguf.evaluate.verify import verify
from mobe_gguf.formats.gguf import read_gguf

BASIS = "blk.1.ffn_up_basis.weight"


def good() -> GgufFile:
    return factorize(qwen3moe(), rank=32, n_basis=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good().write(tmp_path_factory.mktemp("verify") / "whole.gguf")


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["verify", "-q", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_a_whole_file(whole: Path) -> None:
    code, out, err = run(whole)
    assert code == 0 and "whole: 35 tensors" in out and not err


def test_names_that_look_like_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, where rich would take ``[/x]`` for the end of a style that never began."""
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, color_system=None, width=100, **progress.VERBATIM)
    monkeypatch.setattr(progress, "console", terminal)
    file = good()
    file.tensors["a[/x]"] = np.ones((4, 32), np.float32)
    result = CliRunner().invoke(main, ["verify", str(file.write(tmp_path / "mo[bold]e.gguf"))])
    assert result.exit_code == 0 and "mo[bold]e.gguf: whole" in result.stdout, result.output
    assert "a[/x]" in shown.getvalue()


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "iq4_nl", "bf16"])
def test_a_scale_that_is_not_finite_is_found(type_name: str, whole: Path, tmp_path: Path) -> None:
    """In any type, at the very end of a tensor."""
    import subprocess

    path = tmp_path / "model.gguf"
    command = [runtime.tool("llama-quantize"), "--pure", whole, path, type_name]
    subprocess.run(command, check=True, capture_output=True)
    assert run(path)[0] == 0
    info = read_gguf(path).tensors[BASIS]
    assert info.type == type_name
    content = bytearray(path.read_bytes())
    block = {"q8_0": 34, "q4_0": 18, "iq4_nl": 18, "bf16": 2}[type_name]
    at = info.offset + info.n_bytes - block
    content[at : at + 2] = struct.pack("<H", 0x7E00 if type_name != "bf16" else 0x7FC0)  # NaN
    path.write_bytes(content)
    code, _, err = run(path)
    assert code == 1 and f"{BASIS}: " in err and f"row {4 * 32 - 1}" in err


def test_infinity_in_f32_names_row_and_column(tmp_path: Path) -> None:
    file = good()
    file.tensors[BASIS][2, 3, 5] = -np.inf
    code, _, err = run(file.write(tmp_path / "model.gguf"))
    assert code == 1 and f"{BASIS}: value -inf at row {2 * 32 + 3}, column 5" in err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen3moe.mobe.activation", "relu"),
        ("qwen3moe.expert_used_count", 9),
        ("qwen3moe.embedding_length", 0),
        ("qwen3moe.mobe.version", 77),
        ("qwen3moe.mobe.group_count", 3),
    ],
)
def test_keys(key: str, value: object, tmp_path: Path) -> None:
    file = good()
    file.keys[key] = value
    code, _, err = run(file.write(tmp_path / "model.gguf"))
    assert code == 1 and key in err and str(value) in err


def test_shapes_that_contradict_each_other(tmp_path: Path) -> None:
    file = good()
    file.tensors["blk.0.ffn_gate_basis.mix"] = np.ones((8, 3), np.float32)
    code, _, err = run(file.write(tmp_path / "model.gguf"))
    assert code == 1 and "blk.0.ffn_gate_basis.mix" in err and "[8, 3]" in err and "[8, 4]" in err


def test_data_off_their_place(whole: Path, tmp_path: Path) -> None:
    """What lies inside the file but not one after the other, llama.cpp refuses."""
    content = bytearray(whole.read_bytes())
    name = BASIS.encode()
    at = content.index(name) + len(name) + 4 + 3 * 8 + 4
    offset = struct.unpack_from("<Q", content, at)[0]
    struct.pack_into("<Q", content, at, offset - 32)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    code, _, err = run(path)
    assert code == 1 and f"{BASIS}: its data begin at byte" in err


def test_bytes_at_the_end_and_missing_ones(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.read_bytes() + b"x" * 40)
    assert "model.gguf: " in run(path)[2] and "bytes follow" in run(path)[2]
    path.write_bytes(whole.read_bytes()[:-100])
    code, _, err = run(path)
    assert code == 1 and "cut off" in err


def test_a_file_that_is_not_there_or_no_gguf(tmp_path: Path) -> None:
    assert run(tmp_path / "none.gguf")[0] == 1
    (tmp_path / "text.gguf").write_text("hello, this is no model at all")
    code, _, err = run(tmp_path / "text.gguf")
    assert code == 1 and "not a GGUF file" in err


def split(whole: Path, out: Path, tensors: int) -> Path:
    """The first of two files, the first with so many tensors."""
    import subprocess

    command = [runtime.tool("llama-gguf-split"), "--split", "--split-max-tensors", str(tensors), whole, out]
    subprocess.run(command, check=True, capture_output=True)
    return out.with_name(f"{out.name}-00001-of-00002.gguf")


def test_files_of_two_sets(whole: Path, tmp_path: Path) -> None:
    first, other = split(whole, tmp_path / "part", 20), split(whole, tmp_path / "other", 34)
    name = first.name.replace("-00001-", "-00002-")
    other.with_name(other.name.replace("-00001-", "-00002-")).replace(tmp_path / name)
    code, _, err = run(first)
    assert code == 1 and "the 2 files hold 21 tensors, split.tensors.count is 35" in err


def test_split_files(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path / "part", 20)
    code, out, _ = run(first)
    assert code == 0 and "2 files, 35 tensors" in out
    second = tmp_path / "part-00002-of-00002.gguf"
    tensor = list(read_gguf(second).tensors.values())[-1]
    content = bytearray(second.read_bytes())
    content[tensor.offset : tensor.offset + 4] = struct.pack("<f", float("nan"))
    second.write_bytes(content)
    code, _, err = run(first)
    assert code == 1 and f"{tensor.name}: value nan at row 0, column 0" in err


def test_checksums(whole: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(whole.read_bytes()).hexdigest()
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{digest}  {whole.name}\n")
    code, out, _ = run(whole, "--sums", sums)
    assert code == 0 and "checksums as expected" in out
    sums.write_text(f"{'0' * 64} *{whole.name}\n")
    code, _, err = run(whole, "--sums", sums)
    assert code == 1 and digest in err and "0" * 64 in err
    sums.write_text(f"{digest}  other.gguf\n")
    assert "does not name it" in run(whole, "--sums", sums)[2]
    sums.write_text("not a list\n")
    code, _, err = run(whole, "--sums", sums)
    assert code == 2 and "line 1" in err


def test_json(whole: Path, tmp_path: Path) -> None:
    file = good()
    file.tensors[BASIS][0, 0, 0] = np.nan
    code, out, _ = run(file.write(tmp_path / "model.gguf"), "--json")
    found = json.loads(out)
    assert code == 1 and not found["whole"] and found["problems"][0]["where"] == BASIS
    found = json.loads(run(whole, "--json")[1])
    assert found["whole"] and found["tensors"] == 35 and found["bytes"] == whole.stat().st_size


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_changed(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Head or data: an answer, never an exception."""
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.gguf"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 700]))])
    assert all(where and why for where, why in verify(path, quiet=True).problems)


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "output_norm.weight",
        "blk.1.ffn_gate_inp.weight",
        "blk.0.ffn_down_exps.weight",
    ],
)
def test_tensors_that_no_model_with_experts_can_do_without(name: str, tmp_path: Path) -> None:
    for number, file in enumerate((good(), qwen3moe())):
        del file.tensors[name]
        code, _, err = run(file.write(tmp_path / f"{number}.gguf"))
        assert code == 1 and f"tensor {name} is missing" in err


def test_a_model_without_experts_or_without_a_last_norm(tmp_path: Path) -> None:
    file = qwen3moe()
    del file.tensors["output_norm.weight"]
    file.keys = {k.replace("qwen3moe.", "lfm2moe."): v for k, v in file.keys.items()}
    file.keys["general.architecture"] = "lfm2moe"
    assert run(file.write(tmp_path / "lfm2.gguf"))[0] == 0
    file.tensors = {"blk.0.ffn_up.weight": np.ones((4, 32), np.float32)}
    assert run(file.write(tmp_path / "dense.gguf"))[0] == 0


def test_a_directory(whole: Path, tmp_path: Path) -> None:
    code, _, err = run(whole.parent)
    assert code == 2 and f"{whole.parent} is a directory; expected a GGUF file" in err
    assert f"mobe-gguf verify {whole}" in err
    assert f"mobe-gguf inspect {tmp_path}" in run(tmp_path)[2]


def test_what_llama_cpps_tools_make_of_another_alignment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sound file whose data are padded to 256 they write, exit code 0, files that are none: found before anyone loads one."""
    import subprocess

    import gguf

    class Writer(gguf.GGUFWriter):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            self.data_alignment = 256

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    file = qwen3moe()
    file.keys["general.alignment"] = 256
    source = file.write(tmp_path / "source.gguf")
    assert run(source)[0] == 0
    quantized, part = tmp_path / "quantized.gguf", tmp_path / "part"
    subprocess.run(
        [runtime.tool("llama-quantize"), source, quantized, "Q8_0"], check=True, capture_output=True
    )
    command = [runtime.tool("llama-gguf-split"), "--split", "--split-max-tensors", "20", source, part]
    subprocess.run(command, check=True, capture_output=True)
    for broken in (quantized, tmp_path / "part-00001-of-00002.gguf"):
        code, _, err = run(broken)
        assert code == 1 and "off the alignment" in err, "the tool was mended: docs/parts.md"


def test_values_that_are_too_small_for_their_type(whole: Path, tmp_path: Path) -> None:
    file = good()
    for name in file.tensors:
        if "ffn_down_exps" in name:
            file.tensors[name] = (file.tensors[name] / file.tensors[name].std() * 1e-5).astype(np.float16)
    path = file.write(tmp_path / "small.gguf")
    found = json.loads(run(path, "--json")[1])
    assert found["whole"] and not json.loads(run(whole, "--json")[1])["notes"]
    (note,) = found["notes"]
    assert "ffn_down_exps.weight and 1 more tensors: values around 1.0e-05 are too small for f16" in note
    result = CliRunner().invoke(main, ["verify", str(path)])
    assert result.exit_code == 0 and note in result.stderr


def test_no_experts_used_where_there_are_some(tmp_path: Path) -> None:
    file = by_layer()
    assert not verify(file.write(tmp_path / "whole.gguf"), quiet=True).problems
    file.keys["nemotron_h_moe.expert_used_count"] = [0, 0, 0, 3]
    (problem,) = verify(file.write(tmp_path / "none.gguf"), quiet=True).problems
    assert problem == ("nemotron_h_moe.expert_used_count", "it is 0 in layer 2, which has experts")
