"""All names that the parts of this project share: GGUF keys, tensor names, activations.

The C side (``native/ggml_mobe/ggml-mobe.h``) has the same strings; ``tests/core/test_names.py`` compares them.
"""

from __future__ import annotations

#: Versions of the GGUF layout that this package writes and the patched runtime accepts: 2 with bases of down, else 1.
MOBE_VERSION = 1
MOBE_VERSION_DOWN = 2

#: f in ``A . f(sum_j alpha_j B_j)``.  The position of a name is its number in the C operator.
ACTIVATIONS = ("none", "silu", "tanh")

#: The activations that the authors' training supports.
WAB_ACTIVATIONS = ("silu", "tanh")

#: Projections that the method's authors factorize, and so the default here.  ``families`` has their names in a checkpoint.
PROJECTIONS = ("gate", "up")

#: All projections that can be factorized.  Down has its bases on the output side: ``W_i ~ f(sum_j alpha_j B_j) . A_i``.
ALL_PROJECTIONS = (*PROJECTIONS, "down")


def key_version(arch: str) -> str:
    """GGUF key, u32."""
    return f"{arch}.mobe.version"


def key_activation(arch: str) -> str:
    """GGUF key, string: one of ACTIVATIONS."""
    return f"{arch}.mobe.activation"


def key_group_count(arch: str) -> str:
    """GGUF key, u32: groups of experts, each with its own bases."""
    return f"{arch}.mobe.group_count"


def transform_name(layer: int, projection: str) -> str:
    """A of all experts; ggml shape [r, p, n_expert], of down [p, r, n_expert]."""
    return f"blk.{layer}.ffn_{projection}_exps.weight"


def basis_name(layer: int, projection: str) -> str:
    """B of all groups; ggml shape [d, r, m], of down [r, d, m]."""
    return f"blk.{layer}.ffn_{projection}_basis.weight"


def mix_name(layer: int, projection: str) -> str:
    """alpha, F32; ggml shape [m/g, n_expert], or [r, m/g, n_expert] row by row (of down [d, m/g, n_expert])."""
    return f"blk.{layer}.ffn_{projection}_basis.mix"


def factor_names(layer: int, projection: str) -> tuple[str, str, str]:
    """The three tensors of a factorized projection: A, B and alpha."""
    return transform_name(layer, projection), basis_name(layer, projection), mix_name(layer, projection)
