"""Files of llama-imatrix in GGUF, its default format since mid-2025.

For each weight ``W`` they hold the sum of squares of each input channel, ``W.in_sum2`` ``[matrices, row]``, and the number
of inputs, ``W.counts`` ``[matrices, 1]``.  If the patched ``llama-imatrix`` ran a MoBE model, the experts' inputs are under
the name of the mix, see ``native/ggml_mobe/mobe-imatrix.h``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import sha256
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.core.names import transform_name
from mobe_gguf.core.tensors import is_basis, merged_name
from mobe_gguf.formats.gguf import Array, GgufFile, read_gguf

SUMS, COUNTS = ".in_sum2", ".counts"

#: Gate and up of a block have the same inputs; some files have an entry for only one of them.
_TWIN = re.compile(r"ffn_(gate|up)(?=(_exps|_shexp)?\.weight$)")


def smoothed(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean squares of each expert's inputs times the expert's share of all uses; sums ``[n, ..., d]``, counts ``[n, ..., 1]``.

    Every expert gets PRIOR times the average expert's rows in addition, with the average input.
    """
    mean = sums.sum(0, keepdims=True) / counts.sum()
    return (sums + PRIOR * counts.mean() * mean) / counts.sum()


@dataclass(frozen=True)
class Statistics:
    """A file's entry for one weight: float32 sums ``[matrices, row]`` and counts ``[matrices, 1]``."""

    sums: np.ndarray
    counts: np.ndarray

    def means(self) -> np.ndarray:
        """Mean squares as llama-quantize's ``load_imatrix`` computes them.  A matrix without inputs, or with zeros only,
        weighs all columns alike."""
        seen = (self.counts > 0) & self.sums.any(axis=1, keepdims=True)
        return np.where(seen, self.sums / np.where(seen, self.counts, 1), np.float32(1)).astype(np.float32)


class ImatrixFile:
    """One file of llama-imatrix; MobeError if it is something else, in the old format, or damaged."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path = os.fspath(path)
        if not Path(path).is_file():
            raise MobeError(
                f"{path}: no such file. Make one with:\n  llama-imatrix -m model.gguf -f text.txt -o {path}"
            )
        if Path(path).suffix == ".safetensors":
            raise MobeError(f"{path}: not a file of llama-imatrix; second moments are given with --moments")
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise MobeError(
                    f"{path}: not a GGUF file. The old .dat format of llama-imatrix does not say how often each expert "
                    "was used, also when it is converted. Collect it again:\n  llama-imatrix -m model.gguf -f text.txt -o imatrix.gguf"
                )
        self._file: GgufFile = read_gguf(path)
        #: Notes for the user about the entries that were requested.
        self.notes: list[str] = []
        self.names = {name.removesuffix(SUMS) for name in self._file.tensors if name.endswith(SUMS)}
        if not self.names:
            raise MobeError(
                f"{path}: holds no tensor *{SUMS}, so it is not an importance matrix. Make one with:\n"
                "  llama-imatrix -m model.gguf -f text.txt -o imatrix.gguf"
            )

    @cached_property
    def of_mobe(self) -> bool:
        """Whether the file was collected on a MoBE model."""
        return any(is_basis(name) for name in self.names)

    @cached_property
    def checksum(self) -> str:
        """sha256 of the file."""
        return sha256(Path(self.path))

    @property
    def label(self) -> str:
        return Path(self.path).name

    def entry(self, name: str) -> Statistics | None:
        """The entry of the weight ``name``, None if there is none; MobeError if it is damaged."""
        if name not in self.names:
            name = _TWIN.sub(lambda found: "ffn_up" if found[0] == "ffn_gate" else "ffn_gate", name)
        if name not in self.names:
            return None
        sums, counts = (self._values(name + suffix) for suffix in (SUMS, COUNTS))
        if sums.size % counts.size:
            raise self._broken(name, f"{sums.size} sums do not divide by {counts.size} counts")
        return Statistics(sums.reshape(counts.size, -1), np.rint(counts).reshape(-1, 1))

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

    def weight(self, layer: int, projection: str, n: int, d: int) -> torch.Tensor:
        """``[n, 1, d]`` mean squares of the inputs of a layer's gate or up, weighted by how often each expert is used.
        For down, d is the experts' p.

        MobeError if the file lacks the layer or belongs to another model.
        """
        stem, merged = transform_name(layer, projection), merged_name(layer)
        if stem not in self.names and merged in self.names:  # the model has gate and up in one tensor
            stem = merged
        entry = self.entry(stem)
        if entry is None:
            raise MobeError(
                f"{self.path}: no tensor {stem}.in_sum2; the imatrix is of another model or not of a MoE"
            )
        sums, counts = entry.sums.astype(np.float64), entry.counts.astype(np.float64)
        if counts.size == 1 < n and sums.size == n * d:
            raise MobeError(
                f"{self.path}: {stem} has one count for {n} experts: the file was converted from the old .dat format, which does "
                "not say how often each was used. Collect it again:\n  llama-imatrix -m model.gguf -f text.txt -o imatrix.gguf"
            )
        if sums.size != n * d or counts.size != n:
            raise MobeError(
                f"{self.path}: {stem} has {sums.size} sums and {counts.size} counts, expected {n} x {d} and {n}. "
                "The imatrix is of another model."
            )
        sums, counts = sums.reshape(n, 1, d), counts.reshape(n, 1, 1)
        if counts.sum() <= 0:
            self.notes.append(f"{self.path}: {stem}: no rows were counted; its inputs weigh all alike")
            return torch.ones(n, 1, d, dtype=torch.float64)
        return torch.from_numpy(smoothed(sums, counts))

    def inputs(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``(sums of squares, rows counted)`` of the input channels of GGUF tensor ``name``, as stored, in float64;
        None if the file has none.
        """
        entry = self.entry(name)
        if entry is None or not entry.counts.any():
            return None
        return torch.from_numpy(entry.sums.astype(np.float64)), torch.from_numpy(
            entry.counts.astype(np.float64)
        )

    def keys(self) -> dict[str, str | int]:
        """Metadata that llama-quantize writes about an imatrix (strings cut to 127 bytes, as there)."""
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
