"""Second moments of the experts' inputs, out of a llama-imatrix file.

llama-imatrix (GGUF format, the default since mid-2025) writes for each weight the sum of the squares of its input
channels and the number of rows it saw: ``blk.L.ffn_gate_exps.weight.in_sum2`` ``[n, d]``, ``.counts`` ``[n, 1]``.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mobe_gguf.errors import MobeError

#: Rows that every expert is taken to have seen beside its own, as a share of the average expert's, with the average
#: input: an expert that the calibration text never routed to still has to be kept in shape.
PRIOR = 0.1


class Imatrix:
    """A GGUF imatrix file; MobeError if it is missing, of the old ``.dat`` format or damaged."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise MobeError(
                f"{path}: no such file. Make one with:\n  llama-imatrix -m model.gguf -f text.txt -o {path}"
            )
        with open(path, "rb") as f:
            if f.read(4) != b"GGUF":
                raise MobeError(
                    f"{path}: not a GGUF file. The old .dat format of llama-imatrix is not read; convert it with:\n"
                    f"  llama-imatrix --in-file {path} -o imatrix.gguf"
                )
        from gguf import GGUFReader

        try:
            self._tensors = {t.name: t for t in GGUFReader(path).tensors}
        except (ValueError, IndexError, KeyError, OSError) as e:
            raise MobeError(f"{path}: truncated or corrupt GGUF file: {e}") from e

    @cached_property
    def checksum(self) -> str:
        """sha256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def weight(self, layer: int, projection: str, n: int, d: int) -> torch.Tensor:
        """``[n, 1, d]`` mean squares of the inputs of a layer's gate or up, weighted by how often each expert is used.

        MobeError if the file lacks the layer or is of another model.
        """
        stem = f"blk.{layer}.ffn_{projection}_exps.weight"
        sums, counts = self._array(f"{stem}.in_sum2"), self._array(f"{stem}.counts")
        if sums.size != n * d or counts.size != n:
            raise MobeError(
                f"{self.path}: {stem} has {sums.size} sums and {counts.size} counts, expected {n} x {d} and {n}. "
                "The imatrix is of another model."
            )
        sums, counts = sums.reshape(n, 1, d), counts.reshape(n, 1, 1)
        if not np.isfinite(sums).all() or counts.sum() <= 0:
            raise MobeError(f"{self.path}: {stem} holds no usable data (no rows counted, or not finite)")
        mean = sums.sum(0, keepdims=True) / counts.sum()
        return torch.from_numpy((sums + PRIOR * counts.mean() * mean) / counts.sum())

    def _array(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise MobeError(f"{self.path}: no tensor {name}; the imatrix is of another model or not of a MoE")
        return np.asarray(self._tensors[name].data, dtype=np.float64)
