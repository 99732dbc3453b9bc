"""The methods: what each needs and produces.  Other modules ask a :class:`Method` and do not compare names.

This module does not import torch, so that the command line can list methods quickly; ``baselines`` computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.names import ALL_PROJECTIONS, PROJECTIONS


@dataclass(frozen=True)
class Method:
    """One way to write experts ``[n, p, d]`` in fewer parameters.

    ``fitted``: the solver fits it in steps, with a chosen number, rank and form of bases.  Otherwise it has a closed form, with
    ``fixed(n, p, d)`` parameters plus ``each(n, p, d)`` for each rank, up to rank ``most(p, d)``; the decomposition takes
    ``memory(p, d)`` bytes, and n experts have ``bases(n)`` bases.  ``is_factors``: the result is stored as factors; otherwise
    as the resulting matrices, an ordinary model.  ``projections``: those that it supports.  ``quant``: the default type for
    the next step, export.
    """

    name: str
    fitted: bool = False
    is_factors: bool = True
    projections: tuple[str, ...] = PROJECTIONS
    quant: str = "f16"
    fixed: Callable[[int, int, int], int] = lambda n, p, d: 0
    each: Callable[[int, int, int], int] = lambda n, p, d: 0
    most: Callable[[int, int], int] = lambda p, d: min(p, d)
    memory: Callable[[int, int], int] = lambda p, d: 0
    bases: Callable[[int], int] = lambda n: 1


MOBE = Method("mobe", fitted=True, projections=ALL_PROJECTIONS, quant="q4_k")

#: Alpha is the identity; each rank of each expert has one row of A and one of B.
SVD = Method("svd", fixed=lambda n, p, d: n * n, each=lambda n, p, d: n * (p + d), bases=lambda n: n)

#: Alpha is all ones; a row of B serves all experts.  A Gram matrix of d x d is decomposed.
MOLAE = Method(
    "molae",
    fixed=lambda n, p, d: n,
    each=lambda n, p, d: n * p + d,
    most=lambda p, d: d,
    memory=lambda p, d: 8 * 3 * d * d,
)

#: The shared base; each rank of each expert has one row of U and one of V.
D2MOE = Method("d2moe", is_factors=False, fixed=lambda n, p, d: p * d, each=lambda n, p, d: n * (p + d))

METHODS = {method.name: method for method in (MOBE, SVD, MOLAE, D2MOE)}


def method_named(name: str) -> Method:
    """The method called ``name``; UsageError if there is none."""
    if name not in METHODS:
        raise UsageError(f"--method {name}: unknown; expected one of {', '.join(METHODS)}")
    return METHODS[name]
