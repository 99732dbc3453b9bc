"""Rounding factors as their GGUF file will round them: through ggml's own encoders, in the types that export takes.

A fit that knows of the rounding (``--for TYPE``) sees rounded bases from a certain step on, gradients passing straight
through (Bengio et al. 2013), and what it ends with are values that export's encoder leaves as they are.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from mobe_gguf.core.errors import UsageError
from mobe_gguf.quant.recipe import BLOCK, ENCODER_NEEDS, FALLBACK, NEED_IMATRIX, fitting_type, parse_type
from mobe_gguf.runtime import ggml

#: How often values are encoded until they stay.  Legacy types stay at once; k-quants choose scales by search and wander
#: three times at most, except where float16 is too coarse for q6_k's scales (values around 1e-3), where 5e-6 of the square
#: goes on changing.  q3_k's error on normal values grows from 0.0227 to 0.0237 on the way, the others' by less than a
#: hundredth of it.  Encoding settled values with an imatrix does not move them either.
REPEATS = 10


def rounded(x: torch.Tensor, type_name: str, transposed: bool = False) -> torch.Tensor:
    """``x`` ``[..., row]`` encoded as ``type_name`` and decoded: float32, same device.

    ``transposed``: the file's rows are the columns of ``x``'s matrices, as down's are where it is fitted.
    """
    if transposed:
        return rounded(x.transpose(-1, -2), type_name).transpose(-1, -2).contiguous()
    values = x.to("cpu", torch.float32).contiguous().numpy()
    threads = torch.get_num_threads()  # this unit's share
    data = ggml.quantize(values, type_name, name="a factor", threads=threads)
    return torch.from_numpy(ggml.dequantize(data, type_name, values.shape[-1], threads=threads)).to(x.device)


def settled(x: torch.Tensor, type_name: str, transposed: bool = False) -> torch.Tensor:
    """``x`` rounded until rounding changes nothing more, or REPEATS times."""
    for _ in range(REPEATS):
        before, x = x, rounded(x, type_name, transposed)
        if torch.equal(before, x):
            break
    return x


@cache
def noise(type_name: str) -> float:
    """Relative squared error of the type on normal values."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32))
    weights = np.ones(256, np.float32) if ggml.type_info(type_name).requires_imatrix else None
    data = ggml.quantize(x.numpy(), type_name, weights, name="noise", threads=1)
    y = torch.from_numpy(ggml.dequantize(data, type_name, 256, threads=1))
    return float((x - y).square().sum() / x.square().sum())


def resolve(option: str, name: str, row: int) -> str:
    """The type that export gives rows of ``row`` values where ``name`` is asked for.

    UsageError for a type that is unknown, has no fallback, or that ggml cannot encode without an importance matrix.
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
