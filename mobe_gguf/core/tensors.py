"""llama.cpp's own names of GGUF tensors; :mod:`names` has those of this project."""

from __future__ import annotations

import re


def merged_name(layer: int) -> str:
    """Name of the tensor with gate and up of all experts, ``[n, 2p, d]``, gate first."""
    return f"blk.{layer}.ffn_gate_up_exps.weight"


def is_basis(name: str) -> bool:
    return re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)_basis\.weight", name) is not None


def is_transform(name: str) -> bool:
    """True for the name of A in a factorized layer, which is the experts' name in an ordinary one; see ``is_down``."""
    return re.fullmatch(r"blk\.\d+\.ffn_(gate|up)_exps\.weight", name) is not None


def is_down(name: str) -> bool:
    return re.fullmatch(r"blk\.\d+\.ffn_down_exps\.weight", name) is not None
