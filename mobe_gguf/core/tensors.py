"""What the name of a GGUF tensor says of it, beside the names that this project gives (:mod:`names`)."""

from __future__ import annotations

import re


def merged_name(layer: int) -> str:
    """Gate and up of all experts in one tensor, ``[n, 2p, d]``, gate first."""
    return f"blk.{layer}.ffn_gate_up_exps.weight"


def is_basis(name: str) -> bool:
    return re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)_basis\.weight", name) is not None


def is_transform(name: str) -> bool:
    """True for the name that A has where the layer is factorized, and the experts' where it is not; see ``is_down``."""
    return re.fullmatch(r"blk\.\d+\.ffn_(gate|up)_exps\.weight", name) is not None


def is_down(name: str) -> bool:
    return re.fullmatch(r"blk\.\d+\.ffn_down_exps\.weight", name) is not None
