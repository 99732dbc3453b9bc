"""The scale of a linear form's matrices, which can be moved between A and the mix.

Without an activation ``A (sum_j alpha_j B_j)`` is the same for ``c A`` and ``alpha / c``.  The fit leaves A small because the
bases are large: values around 1e-3 and below, the smaller the more rows the bases have.  There the float16 scales of k-quants
and iq4_xs become coarse (``quant/small``).  The mix is stored in float32 and has no such problem.
"""

from __future__ import annotations

import torch

#: Root mean square of an expert's A after :func:`balance`, within a factor of sqrt 2: that of ordinary weights.  It is far above
#: the size at which scales become coarse (2**-10), and small enough that the products with the bases stay within float16 on
#: devices that compute in it.
USUAL = 2.0**-5


def balance(transform: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Scale A ``[n, p, r]`` of a form without activation in place, to size :data:`USUAL`; returns the matching alpha
    ``[n, ...]``.

    Each expert's factor is a power of two, so all products stay the same, bit by bit.
    """
    size = torch.stack([a.float().square().mean().sqrt() for a in transform])
    factor = torch.exp2(torch.log2(USUAL / size).round())
    factor = torch.where((size > 0) & factor.isfinite(), factor, 1)
    transform.mul_(factor[:, None, None].to(transform.dtype))
    return mix / factor.view(-1, *(1,) * (mix.dim() - 1)).to(mix.dtype)
