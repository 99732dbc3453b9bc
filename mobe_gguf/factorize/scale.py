"""Where the size of a linear form's matrices lies: in A or in the mix, which may share it out as they like.

Without an activation ``A (sum_j alpha_j B_j)`` is the same for ``c A`` and ``alpha / c``.  The fit leaves A as small as its bases
are large: of values around 1e-3 and below, where the float16 scales of k-quants and iq4_xs become coarse (``quant/small``), and the
more rows the bases have the smaller.  The mix is stored in float32, which has no such trouble.
"""

from __future__ import annotations

import torch

#: Root mean square of an expert's A after :func:`balance`, to a factor of sqrt 2: that of ordinary weights, far above where
#: scales become coarse (2**-10), and small enough that what the bases put out stays in float16 on devices that compute in it.
USUAL = 2.0**-5


def balance(transform: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Scale A ``[n, p, r]`` of a form without activation in place, to :data:`USUAL` size; the alpha ``[n, ...]`` that belongs to it.

    Factors are powers of two, one an expert, so that all products are what they were, bit by bit.
    """
    size = torch.stack([a.float().square().mean().sqrt() for a in transform])
    factor = torch.exp2(torch.log2(USUAL / size).round())
    factor = torch.where((size > 0) & factor.isfinite(), factor, 1)
    transform.mul_(factor[:, None, None].to(transform.dtype))
    return mix / factor.view(-1, *(1,) * (mix.dim() - 1)).to(mix.dtype)
