"""Experts that export stacks itself, of families whose class in llama.cpp's converter does not know all their forms.

The class does not see these tensors.  They are read as everywhere else in this package, one expert after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from mobe_gguf.core.names import transform_name
from mobe_gguf.export.source import Stacked, Tensor
from mobe_gguf.models.factors import ModelDirectory


def sources(checkpoint: ModelDirectory) -> set[str]:
    """The tensors that the converter's class must not see: none if it knows the family's experts."""
    return checkpoint.expert_names() if checkpoint.family.stacked_here else set()


def add(tensors: dict[str, Tensor], writer: Any, checkpoint: ModelDirectory) -> dict[str, Tensor]:
    """``tensors`` and the experts or their A's, which follow the other tensors of their layers.  ``writer``, a
    ``gguf.GGUFWriter``, is told of them."""
    if not checkpoint.family.stacked_here:
        return tensors
    behind: dict[int, list[Tensor]] = {}
    for layer in checkpoint.moe_layers:
        for projection in checkpoint.family.kinds:
            shape, read = _reader(checkpoint, layer, projection)
            name, source = transform_name(layer, projection), Stacked((checkpoint.n_expert, *shape), read)
            writer.add_tensor_info(name, source.shape, np.dtype(np.float32), 4 * math.prod(source.shape))
            behind.setdefault(layer, []).append(Tensor(name, source))
    last = {name.split(".")[1]: name for name in tensors if name.startswith("blk.")}
    ordered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ordered[name] = tensor
        layer_number = name.split(".")[1]
        if last.get(layer_number) == name:
            ordered |= {t.name: t for t in behind.get(int(layer_number), ())}
    return ordered


def _reader(
    checkpoint: ModelDirectory, layer: int, projection: str
) -> tuple[tuple[int, int], Callable[[int], torch.Tensor]]:
    """Shape of an expert's matrix or of its A, and what reads it."""
    factors = checkpoint.factors
    if factors is not None and factors.under_expert_names:
        of_layer = factors.layer(layer)
        if projection in of_layer.projections:
            return of_layer.transform_shape(projection), partial(of_layer.transform, projection)
    return checkpoint.expert_shape(layer, projection), partial(checkpoint.expert, layer, projection)
