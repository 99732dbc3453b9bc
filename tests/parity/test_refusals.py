"""Broken MoBE files: llama.cpp refuses them with the name of the tensor or key, and never crashes."""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobe_gguf.core.names import ALL_PROJECTIONS
from parity.gguf_files import EXPERTS, FF_EXP, D, GgufFile, factorize, qwen3moe
from parity.loader import Loader

R, M = 32, 4

A, BASIS, MIX = "blk.1.ffn_up_exps.weight", "blk.1.ffn_up_basis.weight", "blk.1.ffn_up_basis.mix"
VERSION, ACTIVATION, GROUPS = (f"qwen3moe.mobe.{key}" for key in ("version", "activation", "group_count"))


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with Loader() as loader:
        yield loader


def good(**factors) -> GgufFile:
    return factorize(qwen3moe(), **{"rank": R, "n_basis": M} | factors)


@pytest.mark.parametrize(
    "factors",
    [
        {},
        {"by_row": True},
        {"n_group": 2},
        {"n_group": 2, "by_row": True},
        {"rank": D},
        {"activation": "none"},
        {"projections": ALL_PROJECTIONS},
        {"projections": ("down",), "n_group": 2, "by_row": True},
    ],
    ids=str,
)
def test_whole_files_load(factors, loader, tmp_path):
    """What is broken below is in order before."""
    outcome = loader.load(good(**factors).write(tmp_path / "model.gguf"))
    assert outcome.loaded and outcome.signal is None, outcome


def drop(name: str) -> Callable[[GgufFile], None]:
    """The tensor or key is not in the file."""

    def break_it(file: GgufFile) -> None:
        del (file.tensors if name in file.tensors else file.keys)[name]

    return break_it


def put(name: str, *shape: int, dtype: type = np.float32) -> Callable[[GgufFile], None]:
    """The tensor gets this shape, in numpy's order."""
    return lambda file: file.tensors.update({name: np.full(shape, 0.1, dtype)})


def put_key(name: str, value: object) -> Callable[[GgufFile], None]:
    return lambda file: file.keys.update({name: value})


#: What is broken -> how, and the name that the message must hold.
BROKEN = {
    "no mix": (drop(MIX), MIX),
    "no basis": (drop(BASIS), BASIS),
    "no A": (drop(A), A),
    "basis too wide": (put(BASIS, M, R, D + 1), BASIS),
    "basis too narrow": (put(BASIS, M, R, D - 1), BASIS),
    "basis has more rows than A columns": (put(BASIS, M, R + 1, D), BASIS),
    "basis has fewer rows than A columns": (put(BASIS, M, R - 1, D), BASIS),
    "one basis only, as a matrix": (put(BASIS, R, D), MIX),
    "basis of four dimensions": (put(BASIS, 2, M, R, D), BASIS),
    "mix for fewer bases": (put(MIX, EXPERTS, M - 1), MIX),
    "mix for more bases": (put(MIX, EXPERTS, M + 1), MIX),
    "mix for fewer experts": (put(MIX, EXPERTS - 1, M), MIX),
    "mix transposed": (put(MIX, M, EXPERTS), MIX),
    "row-wise mix for fewer rows": (put(MIX, EXPERTS, M, R - 1), MIX),
    "row-wise mix for fewer experts": (put(MIX, EXPERTS - 1, M, R), MIX),
    "no bases": (put(BASIS, 0, R, D), BASIS),
    "no coefficients": (put(MIX, EXPERTS, 0), MIX),
    "no rank": (put(A, EXPERTS, FF_EXP, 0), A),
    "A is I32": (put(A, EXPERTS, FF_EXP, R, dtype=np.int32), A),
    "basis is I32": (put(BASIS, M, R, D, dtype=np.int32), BASIS),
    "mix is F16": (put(MIX, EXPERTS, M, dtype=np.float16), MIX),
    "A of another rank": (put(A, EXPERTS, FF_EXP, R + 1), BASIS),
    "A for fewer experts": (put(A, EXPERTS - 1, FF_EXP, R), A),
    "A of another width": (put(A, EXPERTS, FF_EXP + 1, R), A),
    "unknown version": (put_key(VERSION, 3), "version 3"),
    "version 0": (put_key(VERSION, 0), "version 0"),
    "version is a string": (put_key(VERSION, "1"), VERSION),
    "no version": (drop(VERSION), VERSION),
    "unknown activation": (put_key(ACTIVATION, "gelu"), "gelu"),
    "activation is a number": (put_key(ACTIVATION, 1), ACTIVATION),
    "no activation": (drop(ACTIVATION), ACTIVATION),
    "0 groups": (put_key(GROUPS, 0), "blk.0.ffn_gate_basis.weight"),
    "3 groups": (put_key(GROUPS, 3), "blk.0.ffn_gate_basis.weight"),
    "2 groups said, 1 there": (put_key(GROUPS, 2), "blk.0.ffn_gate_basis.mix"),
    "groups is a string": (put_key(GROUPS, "1"), GROUPS),
    "no group count": (drop(GROUPS), GROUPS),
}


#: The same of files whose down is factorized, too.
DOWN_A, DOWN_BASIS, DOWN_MIX = (name.replace("_up_", "_down_") for name in (A, BASIS, MIX))
BROKEN_DOWN = {
    "version 1 with bases of down": (put_key(VERSION, 1), "need MoBE version 2, the file has version 1"),
    "version 3 with bases of down": (put_key(VERSION, 3), "version 3"),
    "no mix of down": (drop(DOWN_MIX), DOWN_MIX),
    "no basis of down": (drop(DOWN_BASIS), DOWN_BASIS),
    "no A of down": (drop(DOWN_A), DOWN_A),
    "basis of down for another d": (put(DOWN_BASIS, M, D + 1, R), DOWN_BASIS),
    "basis of down has longer rows than A has rows": (put(DOWN_BASIS, M, D, R + 1), DOWN_BASIS),
    "basis of down the other way round": (put(DOWN_BASIS, M, R, D), DOWN_BASIS),
    "A of down the other way round": (put(DOWN_A, EXPERTS, FF_EXP, R), DOWN_BASIS),
    "A of down of another width": (put(DOWN_A, EXPERTS, R, FF_EXP + 1), DOWN_A),
    "A of down for fewer experts": (put(DOWN_A, EXPERTS - 1, R, FF_EXP), DOWN_A),
    "mix of down for the rows of gate": (put(DOWN_MIX, EXPERTS, M, R), DOWN_MIX),
    "mix of down is F16": (put(DOWN_MIX, EXPERTS, M, dtype=np.float16), DOWN_MIX),
}


@pytest.mark.parametrize("what", [*BROKEN, *BROKEN_DOWN])
def test_broken_files_are_refused(what, loader, tmp_path):
    break_it, named = (BROKEN | BROKEN_DOWN)[what]
    file = good() if what in BROKEN else good(projections=ALL_PROJECTIONS)
    break_it(file)
    outcome = loader.load(file.write(tmp_path / "model.gguf"))
    assert outcome.signal is None, outcome.stderr
    assert not outcome.loaded and named in outcome.errors, outcome


def data_span(data: bytes, name: str) -> tuple[int, int]:
    """Where the data of a tensor begins and ends in the file ``data``."""
    import gguf

    with tempfile.NamedTemporaryFile(suffix=".gguf") as f:
        f.write(data)
        f.flush()
        tensor = next(t for t in gguf.GGUFReader(f.name).tensors if t.name == name)
        return tensor.data_offset, tensor.data_offset + tensor.n_bytes


@pytest.mark.parametrize("name", [A, BASIS, MIX])
def test_file_cut_within_a_tensor(name, loader, tmp_path):
    data = good().write(tmp_path / "model.gguf").read_bytes()
    begin, end = data_span(data, name)
    for length in (begin, (begin + end) // 2, end - 1):
        (tmp_path / "model.gguf").write_bytes(data[:length])
        outcome = loader.load(tmp_path / "model.gguf")
        assert not outcome.loaded and outcome.signal is None and name in outcome.errors, outcome


def test_file_cut_within_its_header(loader, tmp_path):
    """There is no tensor to name yet."""
    data = good().write(tmp_path / "model.gguf").read_bytes()
    names_end = data.index(MIX.encode()) + len(MIX)
    for length in (0, 3, 4, 23, 24, 100, names_end // 2, names_end - 1, names_end, names_end + 20):
        (tmp_path / "model.gguf").write_bytes(data[:length])
        outcome = loader.load(tmp_path / "model.gguf")
        assert not outcome.loaded and outcome.signal is None and outcome.errors, f"{length} bytes: {outcome}"


#: What a shape, a type or a count may come to be.
NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    5,
    8,
    31,
    32,
    33,
    48,
    64,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def header_fields(data: bytes) -> list[tuple[int, int]]:
    """``(offset, size)`` of every field of the header that is about factors: names and their lengths, numbers of
    dimensions, dimensions, types, offsets of data; types and values of keys."""
    fields = []

    def take(size: int) -> int:
        nonlocal at
        fields.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    tensors = good(projections=ALL_PROJECTIONS).tensors
    factors = [
        name for name in tensors if re.search(r"_basis\.|(gate|up|down)_exps", name) and name.encode() in data
    ]
    for name in (*factors, VERSION, ACTIVATION, GROUPS):
        encoded = struct.pack("<Q", len(name)) + name.encode()
        at = data.index(encoded)
        take(take(8))
        if name in factors:
            for _ in range(take(4)):
                take(8)
            take(4)
            take(8)
        elif take(4) == 8:  # GGUF_TYPE_STRING
            take(take(8))
        else:
            take(4)
    return fields


@st.composite
def damaged(draw: st.DrawFn, data: bytes, fields: list[tuple[int, int]]) -> bytes:
    """``data`` with one to three of ``fields`` overwritten: by a telling number, or by one random byte."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        offset, size = draw(st.sampled_from(fields))
        if size in (4, 8) and draw(st.booleans()):
            number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * size)
            result[offset : offset + size] = number.to_bytes(size, "little")
        else:
            result[offset + draw(st.integers(0, size - 1))] = draw(st.integers(0, 255))
    return bytes(result)


@pytest.mark.parametrize(
    "factors", [{}, {"by_row": True}, {"projections": ALL_PROJECTIONS}], ids=["scalar", "row-wise", "down"]
)
def test_damaged_headers_never_crash(factors, loader, tmp_path):
    """Only the fields about factors are damaged: the others are llama.cpp's own affair."""
    path = good(**factors).write(tmp_path / "model.gguf")
    data = path.read_bytes()

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(damaged(data, header_fields(data)))
    def load(broken: bytes) -> None:
        path.write_bytes(broken)
        outcome = loader.load(path)
        assert outcome.signal is None, outcome
        assert outcome.loaded or outcome.errors

    load()
