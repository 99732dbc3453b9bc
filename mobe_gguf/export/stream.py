"""How much an error of each tensor counts, from second moments alone: its share of the residual stream.

    share(l) = E|what the sublayer adds|^2 / ( E|embedding|^2 + sum over all sublayers up to it of E|what they add|^2 )

A file of moments has the mean squares of each matrix's inputs.  From these follows ``E|W x|^2 = sum_c |W[:, c]|^2 E
x_c^2`` for the matrices that write into the stream: attention's output, and ``ffn_down`` of experts, shared experts and
dense layers.  Additions are taken as uncorrelated.  Matrices before these (gate, up, q, k, v) have the share of their
sublayer's writer. ``models/residual.py`` computes the same from an importance matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from mobe_gguf.export.source import Tensor
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.residual import ROWS, TRUST

#: Matrices that write a sublayer's result into the stream, in their order in a layer: GGUF names without ``blk.N.`` and
#: ``.weight``.
ATTENTION = ("attn_output", "ssm_out", "linear_attn_out")
FEED_FORWARD = ("ffn_down", "ffn_down_exps", "ffn_down_shexp")

#: KL divergence per relative error of a matrix's outputs and root of its share, relative to that of ``ffn_up``.
#: Measured on the shipped model (docs/quantization.md).  Other matrices before attention's output count as q.
COUNTS = {
    "ffn_gate": 2.0,
    "ffn_up": 1.0,
    "ffn_down": 2.0,
    "attn_k": 3.0,
    **dict.fromkeys(ATTENTION, 4.0),
}
OTHERS_COUNT = 2.0
#: The same for the output matrix, whose share is 1, and for tied embeddings.
OUTPUT_COUNTS = 65.0


def counted(tensors: Mapping[str, Tensor], moments: Moments) -> dict[str, float] | None:
    """How much a relative error of each tensor's outputs counts, by name; only for tensors whose place in the model is
    known.

    None if the moments do not say how large inputs are (format version 1).  Reads the writing matrices once, in pieces.
    """
    layers: dict[int, dict[str, float]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if found and found[2] in (*ATTENTION, *FEED_FORWARD) and name in moments:
            if (size := written(tensor, moments)) is None:
                return None
            layers.setdefault(int(found[1]), {})[found[2]] = size
    stream = _embedding(tensors)
    shares: dict[tuple[int, str], float] = {}
    for layer, sizes in sorted(layers.items()):
        for part, writers in (("attn", ATTENTION), ("ffn", FEED_FORWARD)):
            added = sum(sizes.get(writer, 0.0) for writer in writers)
            stream += added
            for writer in writers:
                if writer in sizes:
                    shares[layer, writer] = sizes[writer] / stream if stream > 0 else 0.0
            shares[layer, part] = added / stream if stream > 0 else 0.0
    return {name: weight for name in tensors if (weight := _weight(name, shares)) is not None}


def _weight(name: str, shares: Mapping[tuple[int, str], float]) -> float | None:
    if name in ("output.weight", "token_embd.weight"):
        return OUTPUT_COUNTS
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None:
        return None
    layer, stem = int(found[1]), found[2]
    if not stem.startswith("ffn_"):
        share, counts = shares.get((layer, "attn")), COUNTS.get(stem, OTHERS_COUNT)
    else:
        kind = next((end for end in ("_exps", "_shexp") if stem.endswith(end)), "")
        if stem.endswith("_basis"):
            kind, stem = "_exps", stem.removesuffix("_basis")
        share, counts = (
            shares.get((layer, f"ffn_down{kind}")),
            COUNTS.get(stem.removesuffix(kind), OTHERS_COUNT),
        )
    return None if share is None else float(share**TRUST) * counts


def written(tensor: Tensor, moments: Moments) -> float | None:
    """Mean square of what a matrix, or a stack of experts' matrices, adds to the stream for a token; None if not
    known."""
    scale, roots = moments.scale(tensor.name), moments.find(tensor.name)
    if scale is None or roots is None:
        return None
    squares, total, e = roots.channels()[:, 0], 0.0, 0
    for piece in tensor.source.pieces():
        for w in piece.reshape(-1, *tensor.source.shape[-2:]):
            total += float(w.double().square().sum(0) @ squares[e if len(squares) > 1 else 0])
            e += 1
    return scale * total


def _embedding(tensors: Mapping[str, Tensor]) -> float:
    """Mean square of a token's embedding, from some rows of the vocabulary; 0 if there is no such tensor."""
    tensor = tensors.get("token_embd.weight")
    if tensor is None:
        return 0.0
    rows: torch.Tensor = next(iter(tensor.source.pieces())).reshape(-1, tensor.source.shape[-1])
    return float(rows[:: max(1, len(rows) // ROWS)][:ROWS].double().square().sum(1).mean())
