"""Reading tensors in pieces, the converter's lazy ones among them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError
from mobe_gguf.export.source import Lazy, Source, Stacked, Whole, chunks


def gathered(source: Source, limit: int) -> tuple[np.ndarray, list[int]]:
    """All rows, and the sizes of the chunks that they came in."""
    found = list(chunks(source, limit))
    assert [first for first, _ in found] == list(np.cumsum([0, *(len(c) for _, c in found)])[:-1])
    return np.concatenate([c.float().numpy() for _, c in found]), [len(c) for _, c in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_whole(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, 8).to(dtype)
    rows, sizes = gathered(Whole(tensor), limit=32)
    np.testing.assert_array_equal(rows, tensor.float().reshape(15, 8).numpy())
    assert sizes == [4, 4, 4, 3]


def test_a_vector_and_rows_longer_than_the_limit() -> None:
    rows, sizes = gathered(Whole(torch.arange(100.0)), limit=32)
    assert rows.shape == (1, 100) and sizes == [1]


def test_stacked_reads_one_at_a_time() -> None:
    read = []

    def slice_(i: int) -> torch.Tensor:
        read.append(i)
        return torch.full((2, 4), float(i))

    iterator = chunks(Stacked((3, 2, 4), slice_))
    for i in range(3):
        first, chunk = next(iterator)
        assert (first, chunk[0, 0], read) == (2 * i, i, list(range(i + 1)))


def test_a_source_that_gives_fewer_rows_than_it_says_is_told() -> None:
    with pytest.raises(MobeError, match="6 rows of 4 values gave 3 rows"):
        list(chunks(Stacked((3, 2, 4), lambda i: torch.zeros(1, 4))))


@pytest.fixture
def lazy() -> Any:
    """``lazy(tensor)``: a lazy tensor of the converter; ``lazy.evaluated`` counts how many were read."""
    runtime.use_conversion()
    import conversion.base

    class Counting:
        evaluated = 0

        def __call__(self, tensor: torch.Tensor) -> Any:
            def read(t: torch.Tensor) -> torch.Tensor:
                self.evaluated += 1
                return t

            cls = conversion.base.LazyTorchTensor
            return cls(meta=cls.eager_to_meta(tensor), args=(tensor,), func=read)

    return Counting()


def test_lazy_stack_is_read_slice_by_slice_and_keeps_nothing(lazy: Any) -> None:
    tensors = [torch.randn(4, 8).bfloat16() for _ in range(3)]
    node = torch.stack([lazy(t).to(torch.float32) for t in tensors], dim=0)
    source = Lazy(node)
    assert source.shape == (3, 4, 8) and lazy.evaluated == 0
    iterator = chunks(source)
    next(iterator)
    assert lazy.evaluated == 1
    list(iterator)
    rows, _ = gathered(source, 16)
    assert lazy.evaluated == 6  # read again, not remembered
    np.testing.assert_array_equal(rows, torch.stack(tensors).float().reshape(12, 8).numpy())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.stack([t[0], t[1]], dim=1),
        lambda t: t.transpose(0, 1),
        lambda t: t.reshape(2, 2, 24).swapaxes(1, 2).reshape(t.shape),
        lambda t: torch.split(t, [1, 3], dim=0)[1],
        lambda t: (t.float() * 2).to(torch.float16),
        lambda t: torch.cat([t, t], dim=0),
        lambda t: t.T,
    ],
)
def test_other_operations(change: Any, lazy: Any) -> None:
    tensor = torch.randn(4, 24)
    expected = change(tensor).float()
    rows, _ = gathered(Lazy(change(lazy(tensor))), 16)
    np.testing.assert_array_equal(rows, expected.reshape(-1, expected.shape[-1]).numpy())
