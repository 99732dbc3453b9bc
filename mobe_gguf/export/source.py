"""Where a tensor's values come from, read in pieces: memory holds a few million values, not a tensor.

A source has a ``shape`` (torch's order); :func:`chunks` yields its rows in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mobe_gguf.core.errors import MobeError

#: Values converted and encoded at a time (4 MiB of float32).  It is small because every core holds two such pieces.
CHUNK = 1 << 20


class Source(Protocol):
    """Values of one tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def pieces(self) -> Iterator[torch.Tensor]:
        """Tensors of any float type; flattened and put one after the other, they are the whole tensor."""


@dataclass
class Tensor:
    """A tensor of the file: its name, and where its values come from.  ``forced``: the ggml type that it must have, if any."""

    name: str
    source: Source
    forced: str | None = None


@dataclass(frozen=True)
class Whole:
    """A tensor that is in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def pieces(self) -> Iterator[torch.Tensor]:
        yield self.tensor


@dataclass(frozen=True)
class Stacked:
    """``shape[0]`` slices, each read only when it is needed: ``read(i)`` has shape ``shape[1:]``."""

    shape: tuple[int, ...]
    read: Callable[[int], torch.Tensor]

    def pieces(self) -> Iterator[torch.Tensor]:
        for i in range(self.shape[0]):
            yield self.read(i)


@dataclass(frozen=True)
class Lazy:
    """A lazy tensor of llama.cpp's converter (``LazyTorchTensor``), evaluated without keeping what it computes.

    The converter's own ``to_eager`` stores every intermediate result in the graph.  For one stack of experts these are
    all experts in float32, twice, until the tensor is written.  Here a stack along the first axis is
    evaluated slice by slice, and a tensor that is only read and converted stays a view of the mapped file.
    """

    node: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node.shape)

    def pieces(self) -> Iterator[torch.Tensor]:
        yield from _pieces(self.node)


def _pieces(node: Any) -> Iterator[torch.Tensor]:
    if is_cast(node):  # the chunks are converted later, one at a time
        yield from _pieces(node._args[0])
    elif (
        node._data is None
        and node._func is torch.stack
        and node._kwargs.get("dim", 0) == 0
        and len(node._args) == 1
    ):
        for slice_node in node._args[0]:
            yield from _pieces(slice_node)
    else:
        yield evaluate(node)


def is_cast(node: Any) -> bool:
    """True for a conversion to float32 from a narrower float type, as :func:`cast` marks them."""
    return (
        getattr(node, "_func", None) is cast
        and node.dtype == torch.float32
        and node._args[0].dtype in WIDENED
    )


#: Conversion from these types to float32 is exact, so it can be done later.
WIDENED = (torch.float32, torch.bfloat16, torch.float16)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``, as a function that :func:`is_cast` recognizes in a graph."""
    return tensor.to(dtype)


def evaluate(node: Any) -> Any:
    """The value of a lazy tensor (or of the lists and tuples that hold some); nothing is stored in the graph."""
    if isinstance(node, (list, tuple)):
        return type(node)(evaluate(item) for item in node)
    if not hasattr(node, "_func"):
        return node
    if node._data is not None:
        return node._data
    return node._func(*evaluate(node._args), **node._kwargs)


def chunks(
    source: Source, limit: int = CHUNK, within: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of ``source`` in order, ``[rows, row length]`` of any float type, about ``limit`` values at a time.

    Each chunk comes with the number of its first row.  ``within``: rows of a matrix; no chunk holds rows of two
    matrices.
    """
    row = source.shape[-1]
    step = max(1, limit // row)
    total = 0
    for piece in source.pieces():
        rows = piece.reshape(-1, row)
        start, n = 0, rows.shape[0]
        while start < n:
            stop = min(start + step, n)
            if within is not None:
                stop = min(stop, start + within - (total + start) % within)
            yield total + start, rows[start:stop]
            start = stop
        total += n
    expected = math.prod(source.shape[:-1])
    if total != expected:
        raise MobeError(
            f"a tensor of {expected} rows of {row} values gave {total} rows; its file changed or is damaged"
        )
