"""Writing GGUF files tensor by tensor: header and sizes first, then the data in pieces, encoded as they come."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import FULL
from mobe_gguf.export.converter import Tensor
from mobe_gguf.export.imatrix import Importance
from mobe_gguf.export.source import chunks
from mobe_gguf.formats.gguf import ALIGNMENT, padded
from mobe_gguf.models.checkpoint import all_finite
from mobe_gguf.runtime import ggml


def stored_bytes(shape: Sequence[int], type_name: str, alignment: int = ALIGNMENT) -> int:
    """What a tensor takes in a file, with what it is padded by."""
    return padded(ggml.type_info(type_name).tensor_bytes(shape), alignment)


def head_bytes(writer: Any, alignment: int = ALIGNMENT) -> int:
    """What header, keys and tensor table of ``writer`` take, padded: they are written to a temporary file for that."""
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-") as directory:
        path = Path(directory) / "head"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return padded(path.stat().st_size, alignment)


@dataclass
class Encoded:
    """A tensor for ``GGUFWriter.write_tensor_data``: it asks for ``nbytes`` and calls ``tofile``."""

    tensor: Tensor
    type: str
    nbytes: int
    importance: Importance | None = None

    def tofile(self, file: IO[bytes]) -> None:
        written = sum(file.write(block) for block in encode(self.tensor, self.type, self.importance))
        assert written == self.nbytes, f"{self.tensor.name}: {written} bytes, {self.nbytes} were announced"


def encode(tensor: Tensor, type_name: str, importance: Importance | None = None) -> Iterator[memoryview]:
    """The bytes of ``tensor`` in ggml type ``type_name``, piece by piece, each matrix by its own ``importance``.

    libggml encodes outside Python's lock, so each core encodes a piece while the next is read; no more than one
    piece a core and one besides are in memory.  MobeError names the tensor if a value is NaN, Inf or too large.
    """
    workers = len(os.sched_getaffinity(0))
    weights, within = None, None
    if importance is not None:
        weights, within = importance.read(), tensor.source.shape[-2]
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[np.ndarray]] = deque()
        try:
            for first, chunk in chunks(tensor.source, within=within):
                name = f"tensor {tensor.name}, counted from its row {first}"
                row = weights[first // within] if weights is not None and within is not None else None
                pending.append(pool.submit(_encoded, chunk, type_name, row, name))
                if len(pending) > workers:
                    yield memoryview(pending.popleft().result()).cast("B")
            while pending:
                yield memoryview(pending.popleft().result()).cast("B")
        finally:
            pool.shutdown(cancel_futures=True)


#: Types that GGUF stores as torch has them.
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def _encoded(rows: torch.Tensor, type_name: str, weights: np.ndarray | None, name: str) -> np.ndarray:
    """Rows of any float type in ``type_name``: as they are, if they have it already."""
    if rows.dtype is PLAIN.get(type_name) and all_finite(rows):
        return rows.contiguous().view(torch.uint8).numpy()
    return ggml.quantize(
        rows.to(torch.float32).contiguous().numpy(), type_name, weights, name=name, threads=1
    )


def write_gguf(
    out: Path,
    writer: Any,
    tensors: list[Encoded],
    on_tensor: Callable[[Encoded], None],
    left: str = "nothing was written",
) -> None:
    """Write header, keys, tensor table (all in ``writer``) and the data of ``tensors`` to ``out``, atomically.

    MobeError if the disk fills up or goes away; nothing stays behind then.  ``left`` is what it says about that.
    """
    try:
        with atomic_path(out) as part:
            try:
                writer.write_header_to_file(part)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for tensor in tensors:
                    writer.write_tensor_data(tensor)
                    on_tensor(tensor)
            finally:
                writer.close()
    except OSError as e:
        if e.errno in FULL:
            raise MobeError(f"{out}: the disk is full; {left}. Make room or write elsewhere.") from e
        raise MobeError(f"{out}: cannot be written: {e.strerror or e}; {left}") from e
