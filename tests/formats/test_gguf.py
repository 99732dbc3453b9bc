"""The head of GGUF files: read as gguf-py reads it, and refused with a name when damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity.gguf_files import factorize, qwen3moe

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.gguf import Array, read_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factorize(qwen3moe()).write(tmp_path_factory.mktemp("gguf") / "whole.gguf")


def test_as_gguf_py_reads_it(whole: Path) -> None:
    import gguf

    ours, theirs = read_gguf(whole), gguf.GGUFReader(whole)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        info = ours.tensors[t.name]
        assert list(info.shape) == [int(x) for x in reversed(t.shape)]
        assert (info.type, info.offset, info.n_bytes) == (
            t.tensor_type.name.lower(),
            t.data_offset,
            t.n_bytes,
        )
    for name, field in theirs.fields.items():
        if name.startswith("GGUF."):
            continue
        value, expected = ours.keys[name], field.contents()
        if isinstance(value, Array):
            kept = 1024 if type(expected[0]) is int else 8
            assert (value.length, list(value.head)) == (len(expected), expected[:kept])
        else:
            assert value == expected
    assert ours.arch == "qwen3moe" and ours.arch_key("expert_count") == 8


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_off_anywhere(whole: Path, tmp_path: Path, where: float) -> None:
    """A shorter file is refused; the message names it.  (Cut inside the last padding, nothing is lost.)"""
    data = whole.read_bytes()
    info = max(read_gguf(whole).tensors.values(), key=lambda t: t.offset)
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(where * (info.offset + info.n_bytes))])
    with pytest.raises(MobeError, match=r"cut\.gguf"):
        read_gguf(path)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_changed(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A changed head is read, or refused in words: no other exception, no endless loop, no huge allocation."""
    content = bytearray(whole.read_bytes())
    end = min(t.offset for t in read_gguf(whole).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    try:
        read_gguf(path)
    except MobeError as e:
        assert "changed.gguf" in e.message  # noqa: PT017


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too few"),
        (b"GGUF" + bytes(20), "version is 0"),
        (b"\x80\x02PK" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "key 0"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensor 0"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"x", "key 0"),
    ],
)
def test_messages(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(MobeError) as e:
        read_gguf(path)
    assert words in e.value.message and str(path) in e.value.message


def test_data_outside_the_file_names_the_tensor(whole: Path, tmp_path: Path) -> None:
    path, last = tmp_path / "short.gguf", max(read_gguf(whole).tensors.values(), key=lambda t: t.offset)
    path.write_bytes(whole.read_bytes()[: last.offset + last.n_bytes - 1])
    with pytest.raises(MobeError, match=last.name):
        read_gguf(path)


def test_a_type_that_is_not_known(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    name = b"blk.0.ffn_gate_basis.weight"
    at = content.index(name) + len(name) + 4 + 3 * 8
    assert struct.unpack_from("<I", content, at) == (0,)
    path = tmp_path / "new.gguf"
    path.write_bytes(content[:at] + struct.pack("<I", 9999) + content[at + 4 :])
    with pytest.raises(MobeError, match=r"blk\.0\.ffn_gate_basis\.weight.*9999"):
        read_gguf(path)


def test_data_off_the_alignment(whole: Path, tmp_path: Path) -> None:
    """Inside the file, but where llama.cpp would not look for them."""
    content = bytearray(whole.read_bytes())
    name = b"blk.0.ffn_gate_basis.weight"
    at = content.index(name) + len(name) + 4 + 3 * 8 + 4
    struct.pack_into("<Q", content, at, struct.unpack_from("<Q", content, at)[0] - 4)
    path = tmp_path / "shifted.gguf"
    path.write_bytes(content)
    with pytest.raises(MobeError, match=r"tensor 'blk\.0\.ffn_gate_basis\.weight': .* off the alignment"):
        read_gguf(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(MobeError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")


def test_values_of_every_type(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "test")
    writer.add_int8("a", -3)
    writer.add_uint64("b", 1 << 60)
    writer.add_float64("c", 0.1)
    writer.add_bool("d", True)
    writer.add_string("e", "ü")
    writer.add_array("f", [1.5] * 20)
    writer.add_array("g", ["x", "yy"])
    writer.add_tensor("t", np.zeros((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    keys = read_gguf(tmp_path / "keys.gguf").keys
    assert (keys["a"], keys["b"], keys["c"], keys["d"], keys["e"]) == (-3, 1 << 60, 0.1, True, "ü")
    assert keys["f"] == Array(20, (1.5,) * 8) and keys["g"] == Array(2, ("x", "yy"))
