"""How the values of a tensor become bytes of its type: the stage between choosing types and writing.

A :class:`Rounding` gives each tensor an :class:`Encoder`.  :class:`Nearest` is libggml's own rounding; another way of rounding is
another class that follows the protocol ``Rounding`` and is given to ``layout.lay_out``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mobe_gguf.export.imatrix import Importance
from mobe_gguf.export.source import Tensor
from mobe_gguf.models.tensors import all_finite
from mobe_gguf.runtime import ggml

#: ``(rows [n, row] of any float type, number of their matrix, their name for messages) -> bytes [n, bytes of a row]``.
#: It is called from several threads at once.
EncodeRows = Callable[[torch.Tensor, int, str], np.ndarray]


class Encoder(Protocol):
    """Encodes one tensor."""

    @property
    def by_matrix(self) -> bool:
        """Whether each matrix of the tensor is encoded differently; then no call gets rows of two matrices."""

    def open(self) -> EncodeRows:
        """Read what is needed for this tensor; it stays in memory until the tensor is written."""


class Rounding(Protocol):
    """Chooses the encoder of each tensor.

    Not used for what ``refit`` solves for (``refit.Solved``): that is encoded there, matrix by matrix.
    """

    @property
    def fingerprint(self) -> Hashable:
        """Differs whenever the files would differ; an interrupted export resumes only if it is the same."""

    def encoder(self, tensor: Tensor, type_name: str, importance: Importance | None) -> Encoder:
        """The encoder of ``tensor`` in the ggml type ``type_name``; ``importance``: weights of its columns, if they are
        known."""

    def said(self, name: str) -> str | None:
        """A remark on a tensor that has been written, None if there is none."""


@dataclass(frozen=True)
class NearestEncoder:
    """libggml's encoder of ``type``, the columns of each matrix weighed by its own ``importance``."""

    type: str
    importance: Importance | None

    @property
    def by_matrix(self) -> bool:
        return self.importance is not None

    def open(self) -> EncodeRows:
        weights = None if self.importance is None else self.importance.read()

        def encode(rows: torch.Tensor, matrix: int, name: str) -> np.ndarray:
            return encode_rows(rows, self.type, None if weights is None else weights[matrix], name)

        return encode


class Nearest:
    """Every tensor by libggml's own encoder."""

    fingerprint = None

    def encoder(self, tensor: Tensor, type_name: str, importance: Importance | None) -> Encoder:
        return NearestEncoder(type_name, importance)

    def said(self, name: str) -> str | None:
        return None


#: Types that GGUF stores as torch has them.
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def encode_rows(rows: torch.Tensor, type_name: str, weights: np.ndarray | None, name: str) -> np.ndarray:
    """Encode rows of any float type in ``type_name``; rows that have this type already are copied.

    MobeError names the value if one is NaN, Inf or too large.
    """
    if rows.dtype is PLAIN.get(type_name) and all_finite(rows):
        return rows.contiguous().view(torch.uint8).numpy()
    values = rows.to(torch.float32).contiguous().numpy()
    return ggml.quantize(values, type_name, weights, name=name, threads=1)
