"""Second moments of the experts' inputs, out of a llama-imatrix file.

llama-imatrix (GGUF format, the default since mid-2025) writes for each weight the sum of the squares of its input
channels and the number of rows it saw: ``blk.L.ffn_gate_exps.weight.in_sum2`` ``[n, d]``, ``.counts`` ``[n, 1]``.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import sha256
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.models.gguf_source import merged_name


def smoothed(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean squares of each expert's inputs times its share of the uses; sums ``[n, ..., d]``, counts ``[n, ..., 1]``.

    Every expert gets PRIOR of the average expert's rows besides, with the average input.
    """
    mean = sums.sum(0, keepdims=True) / counts.sum()
    return (sums + PRIOR * counts.mean() * mean) / counts.sum()


class Imatrix:
    """A GGUF imatrix file; MobeError if it is missing, of the old ``.dat`` format or damaged."""

    def __init__(self, path: Path):
        from mobe_gguf.export.imatrix import ImatrixFile  # which needs smoothed()

        self.path = path
        self._file = ImatrixFile(str(path))

    @cached_property
    def checksum(self) -> str:
        """sha256 of the file."""
        return sha256(self.path)

    def weight(self, layer: int, projection: str, n: int, d: int) -> torch.Tensor:
        """``[n, 1, d]`` mean squares of the inputs of a layer's gate or up (down: d is its p), weighted by how often each expert is used.

        MobeError if the file lacks the layer or is of another model.
        """
        stem, merged = names.transform_name(layer, projection), merged_name(layer)
        if (
            stem not in self._file.names and merged in self._file.names
        ):  # of a model with gate and up in one tensor
            stem = merged
        entry = self._file.entry(stem)
        if entry is None:
            raise MobeError(
                f"{self.path}: no tensor {stem}.in_sum2; the imatrix is of another model or not of a MoE"
            )
        sums, counts = entry.sums.astype(np.float64), entry.counts.astype(np.float64)
        if sums.size != n * d or counts.size != n:
            raise MobeError(
                f"{self.path}: {stem} has {sums.size} sums and {counts.size} counts, expected {n} x {d} and {n}. "
                "The imatrix is of another model."
            )
        sums, counts = sums.reshape(n, 1, d), counts.reshape(n, 1, 1)
        if counts.sum() <= 0:
            raise MobeError(f"{self.path}: {stem} holds no usable data (no rows counted)")
        return torch.from_numpy(smoothed(sums, counts))

    def inputs(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``(sums of squares, rows counted)`` of the input channels of GGUF tensor ``name``, float64, as they are stored;
        None if the file has none.
        """
        entry = self._file.entry(name)
        if entry is None or not entry.counts.any():
            return None
        return torch.from_numpy(entry.sums.astype(np.float64)), torch.from_numpy(
            entry.counts.astype(np.float64)
        )
