"""The tensors of a directory of safetensors, opened lazily: headers now, values on demand.

If a shard is incomplete or lacks a tensor of the index, a :class:`MobeError` names the file or the tensor.  Nothing here
loads a pickle.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.safetensors import (
    DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    TensorInfo,
    read_header,
    read_tensor,
    read_weight_map,
)
from mobe_gguf.models.families import Family


class Tensors:
    """The tensors of the directory ``path``, of a model of ``family``.

    MobeError if a shard is missing or corrupt, or the index contradicts the shards.
    """

    def __init__(self, path: Path, family: Family):
        self.path = path
        self.family = family
        #: Notes for the user about the directory.
        self.notes: list[str] = []
        self._tensors = self._read_headers()
        self.family = family.renamed_by(self._tensors)

    @property
    def has_stale_index(self) -> bool:
        """Whether there is an index beside a single file that holds everything."""
        return (self.path / INDEX_NAME).exists() and (self.path / SINGLE_NAME).exists()

    def _read_headers(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        if (
            self.path / SINGLE_NAME
        ).exists():  # preferred to an index, as in transformers: the index may belong to an older version
            if self.has_stale_index:
                self.notes.append(
                    f"{SINGLE_NAME} is read, and {INDEX_NAME} beside it is not, as transformers does it"
                )
            return {name: info for name, info in read_header(self.path / SINGLE_NAME).items()}
        weight_map = read_weight_map(self.path / INDEX_NAME)
        for shard in sorted(set(weight_map.values())):
            if not (self.path / shard).is_file():
                promised = [name for name, s in weight_map.items() if s == shard]
                raise MobeError(
                    f"{self.path}: shard {shard} is missing, but {INDEX_NAME} says that it holds {len(promised)} "
                    f"tensors (the first is {promised[0]}). Download the model again; finished files are kept."
                )
            header = read_header(self.path / shard)
            for name in (n for n, s in weight_map.items() if s == shard):
                if name not in header:
                    raise MobeError(
                        f"{self.path}: {INDEX_NAME} says that tensor {name} is in {shard}, but it is not there. "
                        "Index and shards are from different versions of the model; download it again."
                    )
                tensors[name] = header[name]
        return tensors

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in the order of the index."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Header entry of a tensor; MobeError if there is none."""
        if name not in self._tensors:
            raise MobeError(f"{self.path}: tensor {name} is missing. Is the model complete, and of the family "
                            f"'{self.family.name}' as config.json says?")  # fmt: skip
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        info = self.info(name)
        if info.dtype not in DTYPES:
            raise MobeError(f"{self.path}: tensor {name} has type {info.dtype}, which is not supported")
        return DTYPES[info.dtype]

    def get(self, name: str) -> torch.Tensor:
        """The tensor as stored; its values are not checked."""
        info = self.info(name)
        try:
            return read_tensor(self.path / info.shard, info)
        except (OSError, ValueError) as e:
            raise MobeError(f"{self.path / info.shard}: cannot read tensor {name}: {e}") from e

    def get_row(self, name: str, row: int) -> torch.Tensor:
        """``tensor[row]`` along the first axis, read without the rest of the tensor."""
        info = self.info(name)
        try:
            return read_tensor(self.path / info.shard, info, row)
        except (OSError, ValueError) as e:
            raise MobeError(f"{self.path / info.shard}: cannot read tensor {name}: {e}") from e

    def expect_shape(self, name: str, expected: tuple[int, ...], because: str) -> None:
        """MobeError unless tensor ``name`` has the ``expected`` shape; ``because`` says where that comes from."""
        got = self.shape(name)
        if got != expected:
            raise MobeError(
                f"{self.path}: tensor {name} has shape {list(got)}, expected {list(expected)} ({because})"
            )

    def source_files(self) -> list[Path]:
        """All files from which the model is read.  Locks and GGUF files that programs write beside them do not count."""
        found = (path for path in self.path.iterdir() if path.is_file())
        return [path for path in found if not path.name.startswith(".") and path.suffix != ".gguf"]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN or Inf.  Checks minimum and maximum, which takes a CPU a tenth of torch.isfinite's time."""
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))
