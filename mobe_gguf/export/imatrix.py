"""Importance of each column of each matrix, out of llama-imatrix files, for the encoders.

A file holds for a weight ``W`` the sums of the squares of its input's channels, ``W.in_sum2`` ``[matrices, row]``, and
the number of inputs, ``W.counts`` ``[matrices, 1]``: their quotient, 1 where nothing was counted, is what llama-quantize
weighs the columns of each expert's matrix by, and so does export.

Two kinds of file serve a MoBE model, each where it fits:

- one of the MoBE model itself (the patched ``llama-imatrix``) knows everything: what A multiplies, and under the name of
  the basis ``sum_uses mix[j,e]^2 x^2`` (``native/ggml_mobe/mobe-imatrix.h``);
- one of the original model knows all that is not factorized; for the bases the same sum is made of its entry for
  the experts, ``sum_e mix[j,e]^2 in_sum2[e]``.  Of A's input it knows nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from mobe_gguf.errors import MobeError
from mobe_gguf.export.converter import Tensor
from mobe_gguf.export.recipe import FLOATS, Choice, is_basis, is_transform, requires_imatrix
from mobe_gguf.gguf_file import Array, GgufFile, read_gguf

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """Weights of one tensor's columns: ``read()`` gives float32 ``[matrices, row]``; ``origin`` says from where."""

    origin: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """What a file holds of one weight: float32 sums ``[matrices, row]`` and counts ``[matrices, 1]``."""

    sums: np.ndarray
    counts: np.ndarray

    def means(self) -> np.ndarray:
        """As llama-quantize's ``load_imatrix`` divides; a matrix that saw nothing, or only zeros, weighs all alike."""
        seen = (self.counts > 0) & self.sums.any(axis=1, keepdims=True)
        return np.where(seen, self.sums / np.where(seen, self.counts, 1), np.float32(1)).astype(np.float32)


class ImatrixFile:
    """One file of llama-imatrix; MobeError if it is none, of the old format, or damaged."""

    def __init__(self, path: str):
        self.path = path
        if not Path(path).is_file():
            raise MobeError(
                f"{path}: no such file. Make one with:\n  llama-imatrix -m model.gguf -f text.txt -o {path}"
            )
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise MobeError(
                    f"{path}: not a GGUF file. The old .dat format of llama-imatrix does not say how often each expert "
                    f"was used and is not read; convert it with:\n  llama-imatrix --in-file {path} -o imatrix.gguf"
                )
        self._file: GgufFile = read_gguf(path)
        self.names = {name.removesuffix(SUMS) for name in self._file.tensors if name.endswith(SUMS)}
        if not self.names:
            raise MobeError(
                f"{path}: holds no tensor *{SUMS}, so it is not an importance matrix. Make one with:\n"
                "  llama-imatrix -m model.gguf -f text.txt -o imatrix.gguf"
            )

    @cached_property
    def of_mobe(self) -> bool:
        """Whether it was collected on a MoBE model."""
        return any(is_basis(name) for name in self.names)

    @property
    def label(self) -> str:
        return Path(self.path).name

    def entry(self, name: str) -> Entry | None:
        """The entry of the weight ``name``, None if there is none; MobeError if it is damaged."""
        if name not in self.names:
            return None
        sums, counts = (self._values(name + suffix) for suffix in (SUMS, COUNTS))
        if sums.size % counts.size:
            raise self._broken(name, f"{sums.size} sums do not divide by {counts.size} counts")
        return Entry(sums.reshape(counts.size, -1), np.rint(counts).reshape(-1, 1))

    def _values(self, name: str) -> np.ndarray:
        info = self._file.tensors.get(name)
        if info is None or info.type != "f32":
            raise self._broken(name, "missing" if info is None else f"type {info.type}, expected f32")
        values = np.fromfile(self.path, np.float32, info.n_bytes // 4, offset=info.offset)
        if not np.isfinite(values).all() or (values < 0).any():
            raise self._broken(name, "holds values that are negative or not finite")
        return values

    def _broken(self, name: str, why: str) -> MobeError:
        return MobeError(f"{self.path}: {name}: {why}. Make the file again with llama-imatrix.")

    def keys(self) -> dict[str, str | int]:
        """Metadata that llama-quantize writes of it (strings cut to 127 bytes, as there)."""
        datasets = self._file.keys.get("imatrix.datasets")
        chunks = self._file.keys.get("imatrix.chunk_count", 0)
        keys: dict[str, str | int] = {"quantize.imatrix.file": _cut(self.path)}
        if isinstance(datasets, Array) and datasets.head:
            keys["quantize.imatrix.dataset"] = _cut(str(datasets.head[0]))
        keys["quantize.imatrix.entries_count"] = len(self.names)
        if isinstance(chunks, int) and chunks > 0:
            keys["quantize.imatrix.chunks_count"] = chunks
        return keys


def _cut(text: str) -> str:
    return text.encode()[:127].decode(errors="ignore")


class Imatrix:
    """Several files, those of MoBE models first: their statistics are those of the model that is written."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]]):
        self.files = sorted((ImatrixFile(os.fspath(path)) for path in paths), key=lambda f: not f.of_mobe)

    def keys(self) -> dict[str, str | int]:
        """Metadata for the GGUF file: of the first file, for llama.cpp's keys have room for one."""
        return self.files[0].keys() if self.files else {}

    def find(self, tensors: Mapping[str, Tensor], name: str) -> Importance | None:
        """Weights for the tensor ``name`` of ``tensors``, which are a model's; None if no file has any.

        MobeError if a file has them in another number: it is of another model.
        """
        shape = tensors[name].source.shape
        factorized = is_transform(name) and name.replace("_exps.", "_basis.") in tensors
        wanted = (shape[-3] if len(shape) > 2 else 1, shape[-1])
        for file in self.files:
            if factorized and not file.of_mobe:
                continue  # it has this name too, but for x, not for what A multiplies
            entry = file.entry(name)
            if entry is None:
                continue
            if entry.sums.size == wanted[0] * wanted[1]:
                return Importance(file.label, partial(_means, file, name, wanted))
            if name != "token_embd.weight":
                raise _other_model(file, name, entry, wanted)
        return self._through_mix(tensors, name) if is_basis(name) else None

    def _through_mix(self, tensors: Mapping[str, Tensor], name: str) -> Importance | None:
        experts, mix_name = name.replace("_basis.", "_exps."), name.replace(".weight", ".mix")
        for file in self.files:
            entry = None if file.of_mobe else file.entry(experts)
            if entry is None:
                continue
            wanted = (tensors[mix_name].source.shape[0], tensors[name].source.shape[-1])
            if entry.sums.shape != wanted:
                raise _other_model(file, experts, entry, wanted)
            n_basis = tensors[name].source.shape[0]
            read = partial(_basis_weights, file, experts, tensors[mix_name], n_basis)
            return Importance(f"{file.label} (experts' inputs, by the mix)", read)
        return None


def _means(file: ImatrixFile, name: str, shape: tuple[int, int]) -> np.ndarray:
    entry = file.entry(name)
    assert entry is not None
    return entry.means().reshape(shape)


def _basis_weights(file: ImatrixFile, experts: str, mix: Tensor, n_basis: int) -> np.ndarray:
    """``[m, d]``: mean over the inputs counted of ``sum_e mix[j,e]^2 x^2``, e over the experts of j's group."""
    entry = file.entry(experts)
    assert entry is not None
    values = torch.cat(list(mix.source.pieces())).double().numpy()
    squares = np.square(values)  # [n, m/g], or [n, m/g, r]: the mean over rows
    squares = squares.mean(-1) if squares.ndim == 3 else squares
    n_group = n_basis // squares.shape[1]
    squares = squares.reshape(n_group, -1, squares.shape[1])
    sums = entry.sums.astype(np.float64).reshape(n_group, squares.shape[1], -1)
    weights = np.einsum("gej,ged->gjd", squares, sums).reshape(n_basis, -1)
    return Entry(weights.astype(np.float32), np.full((n_basis, 1), max(1.0, entry.counts.sum()))).means()


def _other_model(file: ImatrixFile, name: str, entry: Entry, wanted: tuple[int, int]) -> MobeError:
    return MobeError(
        f"{file.path}: {name} has {entry.sums.shape[0]} x {entry.sums.shape[1]} values, expected {wanted[0]} x {wanted[1]}. "
        "The importance matrix is of another model; make one of this model with:\n"
        f"  llama-imatrix -m model.gguf -f text.txt -o {file.path}"
    )


def importances(
    imatrix: Imatrix, tensors: Mapping[str, Tensor], choices: Mapping[str, Choice]
) -> dict[str, Importance]:
    """Weights for the tensors that are quantized, as far as there are some; each is read once, so that no damage is
    found later."""
    if not imatrix.files:
        return {}
    found = {n: imatrix.find(tensors, n) for n, choice in choices.items() if choice.type not in FLOATS}
    return {name: importance for name, importance in found.items() if importance is not None}


def without(found: Mapping[str, Importance], choices: Mapping[str, Choice], quant: str) -> list[str]:
    """Tensors whose types need weights and that have none in ``found``."""
    return [n for n, choice in choices.items() if n not in found and requires_imatrix(n, choice.type, quant)]


def missing_message(
    imatrix: Imatrix, missing: list[str], choices: Mapping[str, Choice], tensors: Mapping[str, Tensor]
) -> str:
    """What a user whose types need weights that are not there is told."""
    first = missing[0]
    others = f" (and {len(missing) - 1} more tensors)" if len(missing) > 1 else ""
    text = f"tensor {first}{others}: type {choices[first].type} needs an importance matrix, and "
    if not imatrix.files:
        text += "no --imatrix was given. "
    else:
        text += f"{', '.join(f.path for f in imatrix.files)} has nothing that fits it. "
        if is_transform(first) and not any(f.of_mobe for f in imatrix.files):
            text += "That is of the original model, which does not know what A multiplies. "
        elif not is_transform(first) and not is_basis(first):
            text += "If llama-imatrix collects nothing of it, give it another type (--tensor-type). "
    what = "the MoBE model" if any(is_basis(name) for name in tensors) else "the model"
    return (
        f"{text}Make one of {what} and give it with --imatrix:\n"
        "  mobe-gguf export MODEL f16.gguf --quant f16\n"
        "  llama-imatrix -m f16.gguf -f calibration.txt -o imatrix.gguf"
    )
