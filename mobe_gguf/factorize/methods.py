"""The methods: what each needs and makes.  All else in the package asks a :class:`Method` and compares no names.

No torch here, so that the command line can list them at once; ``baselines`` has what computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.names import ALL_PROJECTIONS, PROJECTIONS


@dataclass(frozen=True)
class Method:
    """One way to write experts ``[n, p, d]`` in fewer parameters.

    ``fitted``: by the solver's steps, with bases of a number, rank and form that are chosen; otherwise in closed form, with
    ``fixed(n, p, d)`` parameters and ``each(n, p, d)`` for each rank, up to ``most(p, d)``; the decomposition takes
    ``memory(p, d)`` bytes.  ``bases(n)``: how many bases n experts then have.  ``is_factors``: the result is stored as factors, and
    not as the matrices that they stand for, an ordinary model.  ``projections``: what it takes.  ``quant``: what the next step
    exports it in, if nothing says otherwise.
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

#: Alpha is an identity; a row of A and one of B for each rank of each expert.
SVD = Method("svd", fixed=lambda n, p, d: n * n, each=lambda n, p, d: n * (p + d), bases=lambda n: n)

#: Alpha is all ones; a row of B serves all experts.  A Gram matrix of d x d is decomposed.
MOLAE = Method(
    "molae",
    fixed=lambda n, p, d: n,
    each=lambda n, p, d: n * p + d,
    most=lambda p, d: d,
    memory=lambda p, d: 8 * 3 * d * d,
)

#: The shared base, and a row of U and one of V for each rank of each expert.
D2MOE = Method("d2moe", is_factors=False, fixed=lambda n, p, d: p * d, each=lambda n, p, d: n * (p + d))

METHODS = {method.name: method for method in (MOBE, SVD, MOLAE, D2MOE)}


def method_named(name: str) -> Method:
    """UsageError if there is none of that name."""
    if name not in METHODS:
        raise UsageError(f"--method {name}: unknown; expected one of {', '.join(METHODS)}")
    return METHODS[name]
