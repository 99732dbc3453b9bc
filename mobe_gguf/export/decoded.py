"""Factors as they are read back from a file."""

from __future__ import annotations

import numpy as np
import torch

from mobe_gguf.quant.rounding.rounder import Rounder
from mobe_gguf.runtime import ggml


def decoded(
    x: torch.Tensor, type_name: str, weights: np.ndarray | None, name: str
) -> tuple[np.ndarray, torch.Tensor]:
    """The bytes of ``x`` ``[..., row]`` in ``type_name``, and its values when read back, float32."""
    values = x.to(torch.float32).contiguous().numpy()
    data = ggml.quantize(values, type_name, weights, name=name)
    return data, torch.from_numpy(ggml.dequantize(data, type_name, values.shape[-1]))


def each_decoded(
    stack: torch.Tensor, type_name: str, weights: np.ndarray | None, name: str, first: int = 0
) -> tuple[list[np.ndarray], torch.Tensor]:
    """:func:`decoded` for each matrix of ``stack``, with its own row of ``weights``; ``first``: number of the first
    expert."""
    pairs = [
        decoded(x, type_name, None if weights is None else weights[i], f"{name}, expert {first + i}")
        for i, x in enumerate(stack)
    ]
    return [data for data, _ in pairs], torch.stack([values for _, values in pairs])


def rounded(
    stack: torch.Tensor, zm: torch.Tensor, type_name: str, name: str, first: int = 0
) -> tuple[list[np.ndarray], torch.Tensor]:
    """:func:`each_decoded` with codes chosen by the second moments of what A multiplies, ``zm zm^T``."""
    found = []
    for i, (a, z) in enumerate(zip(stack, zm, strict=True)):
        gram = z @ z.T
        if not gram.diagonal().sum() > 0:  # the expert's Z is zero: any A will do
            gram = torch.eye(len(gram))
        found.append(Rounder(gram).encode(a, type_name, f"{name}, expert {first + i}")[0])
    values = [torch.from_numpy(ggml.dequantize(data, type_name, stack.shape[-1])) for data in found]
    return found, torch.stack(values)
