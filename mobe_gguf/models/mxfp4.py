"""MXFP4 in Hugging Face directories: gpt-oss is published with its experts in this type.

A fused tensor ``X`` of n matrices ``[rows, columns]`` is stored as two: ``X_blocks`` ``[n, rows, columns / 32, 16]``, two
values a byte, the lower half first, and ``X_scales`` ``[n, rows, columns / 32]``, exponents.  The matrices are not
transposed, even if the family's plain ones are.  (OCP Microscaling Formats 1.0; transformers, ``integrations/mxfp4.py``.)
"""

from __future__ import annotations

import torch

#: Values of a scale's block, and bytes that hold them.
BLOCK, BYTES = 32, 16
BLOCKS, SCALES = "_blocks", "_scales"

#: The values of E2M1, by their code.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def scales_of(blocks: str) -> str:
    """Name of the scales beside a tensor of blocks."""
    return blocks.removesuffix(BLOCKS) + SCALES


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the blocks of matrices ``[n, rows, columns]``."""
    return (*shape[:-1], shape[-1] // BLOCK, BYTES)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 ``[rows, columns]`` of one matrix; all values are exact in bfloat16, too."""
    values = torch.tensor(VALUES)
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
    return torch.ldexp(pairs.flatten(-2), scales.int().unsqueeze(-1) - 127).flatten(-2)
