"""Write GGUF files tensor by tensor: first the header and tensor table, then the data, encoded in pieces."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import FULL
from mobe_gguf.export.encoder import Encoder, NearestEncoder
from mobe_gguf.export.imatrix import Importance
from mobe_gguf.export.source import Tensor, chunks
from mobe_gguf.formats.gguf import ALIGNMENT, padded
from mobe_gguf.models.gguf_source import StoredTensor
from mobe_gguf.models.tensors import all_finite
from mobe_gguf.quant.small import Squares
from mobe_gguf.runtime import ggml


class Head(Protocol):
    """Writes one file: header, keys and tensor table, then the tensors (``gguf.GGUFWriter`` is one)."""

    def write_header_to_file(self, path: Path | None = None) -> None: ...

    def write_kv_data_to_file(self) -> None: ...

    def write_ti_data_to_file(self) -> None: ...

    def write_tensor_data(self, tensor: Any) -> None: ...

    def close(self) -> None: ...


def stored_bytes(shape: Sequence[int], type_name: str, alignment: int = ALIGNMENT) -> int:
    """Bytes of a tensor in a file, padding included."""
    return padded(ggml.type_info(type_name).tensor_bytes(shape), alignment)


def head_bytes(writer: Head, alignment: int = ALIGNMENT) -> int:
    """Bytes of header, keys and tensor table of ``writer``, padded; they are written to a temporary file to find
    out."""
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-") as directory:
        path = Path(directory) / "head"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return padded(path.stat().st_size, alignment)


@dataclass
class Encoded:
    """A tensor for ``GGUFWriter.write_tensor_data``, which reads ``nbytes`` and calls ``tofile``.

    ``importance``: weights of its columns.  ``encoder``: what makes its bytes, libggml's own encoder if None.
    ``squares``: squares of the encoded values, known after writing.
    """

    tensor: Tensor
    type: str
    nbytes: int
    importance: Importance | None = None
    encoder: Encoder | None = field(default=None, kw_only=True)
    squares: Squares = field(default_factory=Squares, kw_only=True)

    def tofile(self, file: IO[bytes]) -> None:
        """Write the tensor's bytes.  MobeError as :func:`encode`."""
        encoder = self.encoder or NearestEncoder(self.type, self.importance)
        self.squares = Squares()
        self.check(sum(file.write(block) for block in encode(self.tensor, encoder, self.type, self.squares)))

    def check(self, written: int) -> None:
        """MobeError if ``written`` differs from the bytes in the tensor table: all that follows would be misread."""
        if written != self.nbytes:
            raise MobeError(
                f"tensor {self.tensor.name}: {written} bytes were written, {self.nbytes} are needed for {self.type}"
            )


class Copied(Encoded):
    """A tensor that passes through as a GGUF file stores it."""

    def tofile(self, file: IO[bytes]) -> None:
        source = self.tensor.source
        if not isinstance(source, StoredTensor):
            raise TypeError(f"{self.tensor.name}: only what is stored in a GGUF file can be copied")
        self.check(sum(file.write(block) for block in _valid_blocks(source)))


def _valid_blocks(source: StoredTensor) -> Iterator[bytes]:
    """The bytes of ``source``; MobeError if they hold a value or a scale that is not finite."""
    for block in source.blocks():
        if not ggml.is_valid(np.frombuffer(block, np.uint8), source.type):
            raise MobeError(
                f"{source.file}: tensor {source.name} holds values that are NaN or Inf. The file is damaged; see where:\n"
                f"  mobe-gguf verify {source.file}"
            )
        yield block


def encode(
    tensor: Tensor, encoder: Encoder, type_name: str, squares: Squares | None = None
) -> Iterator[memoryview]:
    """The bytes of ``tensor`` in the ggml type ``type_name``, piece by piece; the values' squares are added to
    ``squares``.

    Values are checked here for all encoders: most would silently turn a NaN into a valid block.

    libggml encodes without Python's lock, so each core encodes a piece while the next is read.  At most one piece per
    core and one more are in memory.  MobeError names the tensor if a value is NaN, Inf or too large.
    """
    workers = len(os.sched_getaffinity(0))
    run = encoder.open()
    within = tensor.source.shape[-2] if encoder.by_matrix else None
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[np.ndarray]] = deque()
        try:
            for first, chunk in chunks(tensor.source, within=within):
                name = f"tensor {tensor.name}, counted from its row {first}"
                if not all_finite(chunk):
                    ggml.check_values(chunk.float().reshape(-1, chunk.shape[-1]).numpy(), type_name, name)
                if squares is not None:
                    squares.add(chunk)
                pending.append(pool.submit(run, chunk, first // within if within else 0, name))
                if len(pending) > workers:
                    yield pending.popleft().result().data.cast("B")
            while pending:
                yield pending.popleft().result().data.cast("B")
        finally:
            pool.shutdown(cancel_futures=True)


def write_gguf(
    out: Path,
    writer: Head,
    tensors: list[Encoded],
    on_tensor: Callable[[Encoded], None],
    left: str = "nothing was written",
) -> None:
    """Write header, keys, tensor table (all in ``writer``) and the data of ``tensors`` to ``out``, atomically.

    MobeError if the disk fills up or goes away; nothing is left behind then.  ``left``: what the message says about
    that.
    """
    try:
        with atomic_path(out) as part:
            write_into(part, writer, tensors, on_tensor)
    except OSError as e:
        raise not_written(out, e, left) from e


def write_into(
    part: Path,
    writer: Head,
    tensors: Sequence[Encoded],
    on_tensor: Callable[[Encoded], None],
    wrap: Any = None,
) -> None:
    """Write header, keys, tensor table and data to ``part``.  ``wrap``: makes of each tensor what the writer is given."""
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor if wrap is None else wrap(tensor))
            on_tensor(tensor)
    finally:
        writer.close()


def not_written(out: Path, e: OSError, left: str) -> MobeError:
    """The error for a file that could not be written; ``left``: what the message says about finished work."""
    if e.errno in FULL:
        return MobeError(f"{out}: the disk is full; {left}. Make room or write elsewhere.")
    return MobeError(f"{out}: cannot be written: {e.strerror or e}; {left}")
