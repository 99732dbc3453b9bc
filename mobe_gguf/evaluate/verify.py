"""Check whether a GGUF file is intact: structure, shapes, finite values and, on request, checksums.

:mod:`mobe_gguf.formats.gguf` reads the head, and :mod:`mobe_gguf.evaluate.inspect` compares factors with the layout.
Values are checked by ggml's own function, the one behind llama.cpp's ``--check-tensors``.  Reads the data once, a few
megabytes at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import CHUNK, sha256
from mobe_gguf.core.progress import bar
from mobe_gguf.evaluate.inspect import describe_gguf
from mobe_gguf.formats.gguf import Array, GgufFile, GgufTensor, join, padded, read_parts
from mobe_gguf.quant.small import LEAST, Squares, is_small, small_line
from mobe_gguf.runtime import ggml

#: How many values of each piece of a tensor are decoded to find their size.
SAMPLE = 1 << 14


@dataclass
class Verdict:
    """``problems``: ``(what, why)``; what is a tensor's name, a key or a file.  ``notes``: remarks on an intact file,
    for its maker. ``sums``: sha256 by file name."""

    path: Path
    files: list[Path] = field(default_factory=list)
    n_tensors: int = 0
    n_bytes: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)


def verify(
    path: str | os.PathLike[str], *, sums: dict[str, str] | None = None, quiet: bool = False
) -> Verdict:
    """Check the file at ``path``, or all files of a split model if it is the first of them.

    ``sums``: expected sha256 by file name (see :func:`read_sums`); a file of the model that is not among them is a problem.
    If the head cannot be read, that is the only problem reported.  MobeError if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        mend = (
            f"Name a file in it:\n  mobe-gguf verify {files[0]}"
            if files
            else f"To look at a model's directory:\n  mobe-gguf inspect {path}"
        )
        raise UsageError(f"{path} is a directory; expected a GGUF file. {mend}")
    if not path.is_file():
        raise MobeError(f"{path}: no such file")
    verdict = Verdict(path)
    try:
        heads = read_parts(path)
        model = join(heads)
        verdict.files = [head.path for head in heads]
        verdict.problems += [(str(path), problem) for problem in describe_gguf(model).problems]
    except MobeError as e:
        verdict.problems.append((str(path), e.message.removeprefix(f"{path}: ")))
        return verdict
    verdict.n_tensors, verdict.n_bytes = len(model.tensors), model.size
    for head in heads:
        verdict.problems += _layout(head)
    verdict.problems += _keys(model)
    small: list[tuple[str, str, float]] = []
    with bar("values", round(model.size / 1e6), quiet) as progress:
        for head in heads:
            for info in head.tensors.values():
                progress.update(info.name)
                squares = Squares()
                verdict.problems += [(info.name, problem) for problem in _values(info, squares)]
                scaled = (
                    info.name.replace(".weight", ".scale") in model.tensors
                )  # nvfp4 with a scale of the tensor
                if is_small(info.type, squares.rms) and not scaled:
                    small.append((info.name, info.type, squares.rms))
                progress.advance(info.n_bytes / 1e6)
    if small:
        verdict.notes.append(small_line(small))
    if sums is not None:
        verdict.problems += _checksums(verdict, sums)
    return verdict


def _layout(file: GgufFile) -> Iterator[tuple[str, str]]:
    """Check that data follow each other in the table's order, as llama.cpp demands, and that nothing follows the last
    tensor."""
    after = None
    for info in file.tensors.values():
        if after is not None and info.offset != after:
            yield info.name, f"its data begin at byte {info.offset} of {file.path.name}, expected {after}"
        after = padded(info.offset + info.n_bytes, file.alignment)
    if after is not None and file.size > after:
        yield file.path.name, f"{file.size - after} bytes follow the last tensor's data"


def _keys(model: GgufFile) -> Iterator[tuple[str, str]]:
    """Check the numbers that llama.cpp needs to run the model, and the keys of factors."""
    for name in ("block_count", "embedding_length"):
        if model.arch_number(name) < 1:
            yield f"{model.arch}.{name}", f"it is {model.arch_key(name)}, expected a positive number"
    n = model.arch_number("expert_count")
    if n and not 1 <= model.arch_most("expert_used_count") <= n:
        found = model.arch_key("expert_used_count")
        yield f"{model.arch}.expert_used_count", f"it is {found}, expected 1 to {n}"
    used = model.keys.get(f"{model.arch}.expert_used_count")
    if isinstance(used, Array):  # llama.cpp divides by it where there are experts
        experts = (re.match(r"blk\.(\d+)\.ffn_\w+_(exps|basis)\.", name) for name in model.tensors)
        for layer in sorted({int(found[1]) for found in experts if found}):
            if layer < len(used.head) and used.head[layer] == 0:
                yield f"{model.arch}.expert_used_count", f"it is 0 in layer {layer}, which has experts"
    if any(re.fullmatch(r"blk\.\d+\.ffn_\w+_basis\.weight", name) for name in model.tensors):
        activation = model.keys.get(names.key_activation(model.arch))
        if activation not in names.ACTIVATIONS:
            known = ", ".join(names.ACTIVATIONS)
            yield names.key_activation(model.arch), f"it is {activation!r}, expected one of {known}"


def _values(info: GgufTensor, squares: Squares) -> Iterator[str]:
    """What is wrong with a tensor's values: at most one line.  If the type has a smallest value, some rows of each
    piece are added to ``squares``."""
    kind = ggml.type_info(info.type)
    row_bytes = kind.row_bytes(info.shape[-1])
    step = max(1, CHUNK // row_bytes) * row_bytes
    with open(info.file, "rb") as file:
        file.seek(info.offset)
        for begin in range(0, info.n_bytes, step):
            data = np.frombuffer(file.read(min(step, info.n_bytes - begin)), np.uint8)
            if not ggml.is_valid(data, info.type):
                yield _where(data.reshape(-1, row_bytes), info, begin // row_bytes)
                return
            if info.type in LEAST:
                rows = data[: max(1, SAMPLE // info.shape[-1]) * row_bytes].reshape(-1, row_bytes)
                squares.add(torch.from_numpy(ggml.dequantize(rows, info.type, info.shape[-1], threads=1)))


def _where(rows: np.ndarray, info: GgufTensor, first: int) -> str:
    """Where the first value is that is not finite; ``rows`` begin with row ``first``."""
    values = ggml.dequantize(rows, info.type, info.shape[-1])
    wrong = np.argwhere(~np.isfinite(values))
    if not len(wrong):  # the scale of a block whose values are all zero
        return f"a block's scale is not finite, in rows {first} to {first + len(rows) - 1}"
    row, column = wrong[0]
    return f"value {values[row, column]} at row {first + row}, column {column}"


def _checksums(verdict: Verdict, sums: dict[str, str]) -> Iterator[tuple[str, str]]:
    for file in verdict.files:
        found = verdict.sums[file.name] = sha256(file)
        expected = sums.get(file.name)
        if expected is None:
            yield file.name, "the list of checksums does not name it"
        elif expected != found:
            yield file.name, f"its sha256 is {found}, expected {expected}"


def read_sums(path: Path) -> dict[str, str]:
    """What ``sha256sum`` prints: file name (without directories) -> checksum.  UsageError for another text."""
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read: {e}") from e
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if match is None:
            raise UsageError(f"{path}: line {number} is not as sha256sum writes it: CHECKSUM  NAME")
        found[Path(match[2]).name] = match[1].lower()
    return found
