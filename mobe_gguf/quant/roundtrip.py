"""Rounding factors as export will: with ggml's own encoders, in the same types.

With ``--for TYPE`` the fit uses rounded bases from a certain step on, with straight-through gradients (Bengio et al. 2013).
Export's encoder then leaves the resulting values unchanged.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from mobe_gguf.core.errors import UsageError
from mobe_gguf.quant.recipe import BLOCK, ENCODER_NEEDS, FALLBACK, NEED_IMATRIX, fitting_type, parse_type
from mobe_gguf.runtime import ggml

#: How often values are encoded, at most, until they no longer change.  Legacy types do not change after the first time.
#: k-quants search for scales and change at most three times.  The exception is q6_k at values around 1e-3, where float16 is
#: too coarse for its scales: 5e-6 of the square keeps changing.  The repetition raises q3_k's error on normal values from
#: 0.0227 to 0.0237, and the others' by less than a hundredth.  Encoding settled values with an imatrix does not change them.
REPEATS = 10


def rounded(x: torch.Tensor, type_name: str, transposed: bool = False) -> torch.Tensor:
    """``x`` ``[..., row]`` encoded as ``type_name`` and decoded: float32, same device.

    ``transposed``: the file's rows are the columns of ``x``'s matrices, as in the fit of down.
    """
    if transposed:
        return rounded(x.transpose(-1, -2), type_name).transpose(-1, -2).contiguous()
    values = x.to("cpu", torch.float32).contiguous().numpy()
    threads = torch.get_num_threads()  # threads of this unit
    data = ggml.quantize(values, type_name, name="a factor", threads=threads)
    return torch.from_numpy(ggml.dequantize(data, type_name, values.shape[-1], threads=threads)).to(x.device)


def settled(x: torch.Tensor, type_name: str, transposed: bool = False) -> torch.Tensor:
    """``x`` rounded until it no longer changes, at most REPEATS times."""
    for _ in range(REPEATS):
        before, x = x, rounded(x, type_name, transposed)
        if torch.equal(before, x):
            break
    return x


@cache
def noise(type_name: str) -> float:
    """Relative squared error of the type on normally distributed values."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32))
    weights = np.ones(256, np.float32) if ggml.type_info(type_name).requires_imatrix else None
    data = ggml.quantize(x.numpy(), type_name, weights, name="noise", threads=1)
    y = torch.from_numpy(ggml.dequantize(data, type_name, 256, threads=1))
    return float((x - y).square().sum() / x.square().sum())


def resolve(option: str, name: str, row: int) -> str:
    """The type that export gives rows of ``row`` values when the user asks for ``name``.

    UsageError for a type that is unknown, has no fallback, or cannot be encoded by ggml without an importance matrix.
    """
    name = parse_type(option, name)
    if row % BLOCK[name] and BLOCK[name] > 32 and name not in FALLBACK:
        raise UsageError(
            f"{option} {name}: rows of {row} are no whole blocks of {BLOCK[name]}, and llama.cpp defines no type to "
            "take instead. Choose another, for instance q4_0."
        )
    fitting = fitting_type(name, row)
    if fitting in (*NEED_IMATRIX, *ENCODER_NEEDS):
        raise UsageError(
            f"{option} {name}: this type is encoded with an importance matrix of the factors, and there is none before "
            "they are fitted. Choose a k-quant or iq4_xs."
        )
    return fitting
