"""Importance of each column of each matrix, from llama-imatrix files, for the encoders.

For a weight ``W`` a file holds the sums of the squares of its input's channels, ``W.in_sum2`` ``[matrices, row]``, and
the number of inputs, ``W.counts`` ``[matrices, 1]``.  llama-quantize weighs the columns of each expert's matrix by
their quotient, or by 1 if nothing was counted.  So does export.

Two kinds of file can be used for a MoBE model:

- A file of the MoBE model itself (from the patched ``llama-imatrix``) has everything: the inputs of A and, under the
  name of the basis, ``sum_uses mix[j,e]^2 x^2`` (``native/ggml_mobe/mobe-imatrix.h``).
- A file of the original model has all tensors that are not factorized.  For the bases the same sum is made from its
  entry for the experts, ``sum_e mix[j,e]^2 in_sum2[e]``.  The inputs of A are computed from that entry through the
  bases (``refit``).  For down, A multiplies the experts' input.  The bases of down multiply A times that input,
  computed as if its channels were independent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.sides import side
from mobe_gguf.core.tensors import is_basis, is_transform, merged_name
from mobe_gguf.export.source import Tensor
from mobe_gguf.formats.gguf import number_of
from mobe_gguf.formats.imatrix import ImatrixFile, Statistics, smoothed
from mobe_gguf.quant.mixture import layer_of
from mobe_gguf.quant.recipe import FLOATS, Choice, requires_imatrix


@dataclass(frozen=True)
class Importance:
    """Weights of one tensor's columns: ``read()`` gives float32 ``[matrices, row]``; ``origin`` names their file."""

    origin: str
    read: Callable[[], np.ndarray]


class Imatrix:
    """Several files.  Those of MoBE models come first: they were made with the model that is written."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]]):
        self.files = sorted((ImatrixFile(os.fspath(path)) for path in paths), key=lambda f: not f.of_mobe)

    def keys(self) -> dict[str, str | int]:
        """Metadata for the GGUF file, about the first file only: llama.cpp's keys have room for one."""
        return self.files[0].keys() if self.files else {}

    def find(self, tensors: Mapping[str, Tensor], name: str) -> Importance | None:
        """Weights for the tensor ``name``, one of a model's ``tensors``; None if no file has any.

        MobeError if their number is wrong: the file is of another model.
        """
        shape = tensors[name].source.shape
        factorized = is_transform(name) and name.replace("_exps.", "_basis.") in tensors
        wanted = (shape[-3] if len(shape) > 2 else 1, shape[-1])
        for file in self.files:
            if factorized and not file.of_mobe:
                continue  # the file has this name, too, but for x and not for the inputs of A
            stem = name if factorized else _stem_of_inputs(file, name)
            entry = file.entry(stem)
            if entry is None:
                continue
            if entry.sums.size == wanted[0] * wanted[1]:
                return Importance(file.label, partial(_means, file, stem, wanted))
            if name != "token_embd.weight":
                raise _other_model(file, name, entry, wanted)
        return self._through_mix(tensors, name) if is_basis(name) else None

    def inputs(self, layer: int, projection: str, n: int, d: int) -> tuple[str, torch.Tensor] | None:
        """The name of a file, and its second moments ``[n, 1, d]`` of the inputs of a factorized projection's experts.

        For the metric of ``factorize``: weighted by how often each expert is used.  None if no file has them.
        """
        experts, mix = names.transform_name(layer, projection), names.mix_name(layer, projection)
        for file in self.files:
            stems = [mix] if file.of_mobe else [experts, merged_name(layer)]
            if side(projection).output:
                stems = [experts]  # for down these are the inputs of A
            name = next((stem for stem in stems if stem in file.names), None)
            entry = None if name is None else file.entry(name)
            if name is None or entry is None or not entry.counts.any() or not entry.sums.any():
                continue
            if entry.sums.shape != (n, d):
                raise _other_model(file, name, entry, (n, d))
            moments = smoothed(entry.sums.astype(np.float64), entry.counts)
            return file.label, torch.from_numpy(moments)[:, None]
        return None

    def _through_mix(self, tensors: Mapping[str, Tensor], name: str) -> Importance | None:
        mix_name = name.replace(".weight", ".mix")
        for file in self.files:
            experts = name.replace("_basis.", "_exps.")
            if experts not in file.names and "_down_" not in name:  # gate and up were one tensor
                experts = merged_name(layer_of(name))
            entry = None if file.of_mobe else file.entry(experts)
            if entry is None:
                continue
            n_basis, _, columns = tensors[name].source.shape
            transform = tensors[experts] if "_down_" in name else None
            wanted = (tensors[mix_name].source.shape[0], transform.source.shape[-1] if transform else columns)
            if entry.sums.shape != wanted:
                raise _other_model(file, experts, entry, wanted)
            read = partial(_basis_weights, file, experts, tensors[mix_name], n_basis, transform)
            return Importance(
                f"{file.label} (experts' inputs, by {'A and ' if transform else ''}the mix)", read
            )
        return None


def _stem_of_inputs(file: ImatrixFile, name: str) -> str:
    """Name of the statistics of a matrix's inputs.  For multiplied-out experts and a file of their factors it is the
    mix: under the experts' own name such a file has the inputs of A."""
    mix = name.replace("_exps.weight", "_basis.mix")
    return mix if file.of_mobe and "_down_" not in name and mix in file.names else name


def _means(file: ImatrixFile, name: str, shape: tuple[int, int]) -> np.ndarray:
    entry = file.entry(name)
    assert entry is not None
    return entry.means().reshape(shape)


def _basis_weights(
    file: ImatrixFile, experts: str, mix: Tensor, n_basis: int, transform: Tensor | None
) -> np.ndarray:
    """``[m, d]``: mean of ``sum_e mix[j,e]^2 x^2`` over the counted inputs; e runs over the experts of j's group.

    With a ``transform``, ``[m, r]``: x is A times the experts' input h, its squares are ``sum_c A[r,c]^2 h[c]^2``.
    """
    entry = file.entry(experts)
    assert entry is not None
    values = torch.cat(list(mix.source.pieces())).double().numpy()
    squares = np.square(values)  # [n, m/g], or [n, m/g, r]: the mean over rows
    squares = squares.mean(-1) if squares.ndim == 3 else squares
    n_group = n_basis // squares.shape[1]
    squares = squares.reshape(n_group, -1, squares.shape[1])
    sums = entry.sums.astype(np.float64)
    if transform is not None:
        sums = _through(transform, sums)
    sums = sums.reshape(n_group, squares.shape[1], -1)
    weights = np.einsum("gej,ged->gjd", squares, sums).reshape(n_basis, -1)
    return Statistics(weights.astype(np.float32), np.full((n_basis, 1), max(1.0, entry.counts.sum()))).means()


def _through(transform: Tensor, sums: np.ndarray) -> np.ndarray:
    """``[n, r]``: sums of squares of ``A_e h``, for A ``[n, r, p]`` and sums ``[n, p]`` of squares of h; reads one A at
    a time."""
    _, r, p = transform.source.shape
    matrices = (a for piece in transform.source.pieces() for a in piece.reshape(-1, r, p))
    return np.stack([a.double().square().numpy() @ s for a, s in zip(matrices, sums, strict=True)])


def _other_model(file: ImatrixFile, name: str, entry: Statistics, wanted: tuple[int, int]) -> MobeError:
    return MobeError(
        f"{file.path}: {name} has {entry.sums.shape[0]} x {entry.sums.shape[1]} values, expected {wanted[0]} x {wanted[1]}. "
        "The importance matrix is of another model; make one of this model with:\n"
        f"  llama-imatrix -m model.gguf -f text.txt -o {file.path}"
    )


def importances(
    imatrix: Imatrix, tensors: Mapping[str, Tensor], choices: Mapping[str, Choice]
) -> dict[str, Importance]:
    """Weights for the quantized tensors, as far as files have them."""
    if not imatrix.files:
        return {}
    found = {n: imatrix.find(tensors, n) for n, choice in choices.items() if choice.type not in FLOATS}
    return {name: importance for name, importance in found.items() if importance is not None}


def remarks(imatrix: Imatrix, choices: Mapping[str, Choice]) -> list[str]:
    """Warnings about entries that llama-imatrix left out silently, with exit code 0.

    From batches of fewer than 16 tokens it counts experts only: with ``-ub 8`` dense matrices have no entry at all.
    Experts that no token of the text chose have sums of zero.
    """
    lines = []
    dense = [
        name
        for name, choice in choices.items()
        if choice.type not in FLOATS and re.match(r"blk\.\d+\.(?!.*(_exps|_basis)\.)", name)
    ]
    if imatrix.files and dense and not any(name in file.names for file in imatrix.files for name in dense):
        lines.append(
            f"{', '.join(file.label for file in imatrix.files)} knows nothing of {dense[0]} and {len(dense) - 1} more dense matrices, "
            "whose columns weigh alike: llama-imatrix counts them in batches of 16 tokens or more alone. Make it again without -b and -ub"
        )
    for file in imatrix.files:
        unseen = {name: _unseen(file, name) for name in file.names if "_exps." in name}
        total = sum(unseen.values())
        if total:
            most = max(unseen, key=lambda name: unseen[name])
            lines.append(
                f"{file.label}: {total} matrices of experts were used by no token of its text, {unseen[most]} of them in {most}; their "
                "columns weigh alike. A longer text reaches more"
            )
    return lines


def _unseen(file: ImatrixFile, name: str) -> int:
    """Number of matrices for which nothing was counted."""
    entry = file.entry(name)
    return 0 if entry is None else int((entry.counts == 0).sum())


def without(found: Mapping[str, Importance], choices: Mapping[str, Choice], quant: str) -> list[str]:
    """Tensors whose types need weights but which have none in ``found``."""
    return [n for n, choice in choices.items() if n not in found and requires_imatrix(n, choice.type, quant)]


def of_prediction(
    missing: Iterable[str], tensors: Mapping[str, Tensor], keys: Mapping[str, Any], arch: str
) -> dict[str, Importance]:
    """Weights that are all alike, for those ``missing`` that belong to layers of multi-token prediction: no text runs through
    these, so no file has anything of them."""
    first = number_of(keys, f"{arch}.block_count", 0) - number_of(keys, f"{arch}.nextn_predict_layers", 0)

    def ones(name: str) -> np.ndarray:
        shape = tensors[name].source.shape
        return np.ones((shape[-3] if len(shape) > 2 else 1, shape[-1]), np.float32)

    origin = "none (multi-token prediction: all columns weigh alike)"
    return {name: Importance(origin, partial(ones, name)) for name in missing if layer_of(name) >= first > 0}


def missing_message(
    imatrix: Imatrix, missing: list[str], choices: Mapping[str, Choice], tensors: Mapping[str, Tensor]
) -> str:
    """The error message if types need weights that no file has."""
    first = missing[0]
    others = f" (and {len(missing) - 1} more tensors)" if len(missing) > 1 else ""
    text = f"tensor {first}{others}: type {choices[first].type} needs an importance matrix, and "
    if not imatrix.files:
        text += "no --imatrix was given. "
    else:
        text += f"{', '.join(f.path for f in imatrix.files)} has nothing that fits it. "
        if not is_transform(first) and not is_basis(first):
            text += "If llama-imatrix collects nothing of it, give it another type (--tensor-type). "
    what = "the MoBE model" if any(is_basis(name) for name in tensors) else "the model"
    return (
        f"{text}Make one of {what} and give it with --imatrix:\n"
        "  mobe-gguf export MODEL f16.gguf --quant f16\n"
        "  llama-imatrix -m f16.gguf -f calibration.txt -o imatrix.gguf"
    )
