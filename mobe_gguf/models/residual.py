"""How much of the model hangs on each layer's routed experts: what weighs the errors of units against each other.

    weight(l) = E|routed_l|^2 / ( |embedding|^2 + sum over layers up to l of E|attention|^2 + E|feed-forward|^2 )

that is the share of the residual stream behind layer l that its routed experts made.  All out of a llama-imatrix file and the
weights themselves: ``E|W x|^2 = sum_c |W[:, c]|^2 E x_c^2``, channels taken as uncorrelated, what is added to the stream too,
and the experts of a token as pulling the same way.

On the shipped model, each unit alone at 3 of 24 bases, KL divergence per error of the outputs was, gate of layers 0 to 3,
0.080, 0.016, 0.018, 0.029 (up: 0.069, 0.010, 0.011, 0.017); these weights are 0.99, 0.22, 0.25, 0.41.  Errors themselves are
much the same in all units, so it is the weights that decide; see TRUST for what is made of them.
"""

from __future__ import annotations

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.imatrix import ImatrixFile
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.gguf_source import GgufModel, Stored
from mobe_gguf.models.original import Original

#: Matrices that write to the residual stream, beside the routed experts: end of a Hugging Face name -> GGUF name.
WRITERS = {
    "self_attn.o_proj.weight": "attn_output",
    "attention.dense.weight": "attn_output",
    "mlp.down_proj.weight": "ffn_down",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp",
}
EMBEDDINGS = ("model.embed_tokens.weight", "model.word_embeddings.weight", "token_embd.weight")

#: Weights are the shares to this power: half way between their word and none at all.  KL divergence of the shipped model at 62.5 %
#: of gate and up (150 steps): the same bases everywhere 0.0052, power 1 0.0057, power 1/2 0.0050.  Together, the errors of
#: its first layer count less than alone.
TRUST = 0.5

#: Rows of the embedding that its mean square is taken from.
ROWS = 1024


def layer_shares(model: Original, imatrix: ImatrixFile, layers: tuple[int, ...]) -> dict[int, float] | None:
    """Weight of each of ``layers``; None if the imatrix has no inputs of a layer's down projections.

    Reads all down projections up to the last of them, an expert at a time.
    """
    stream, shares = _embedding(model), {}
    for layer in range(max(layers) + 1):
        stream += _others(model, imatrix, layer)
        if layer not in model.moe_layers:
            continue
        routed = _routed(model, imatrix, layer)
        if routed is None:
            return None
        stream += routed
        shares[layer] = routed / stream
    return {layer: shares[layer] for layer in layers}


def _routed(model: Original, imatrix: ImatrixFile, layer: int) -> float | None:
    """Mean square of what the routed experts add for a token, the router's weights summing to one (times its scale)."""
    found = imatrix.inputs(f"blk.{layer}.ffn_down_exps.weight")
    if found is None or found[0].numel() != model.n_expert * model.n_ff_exp:
        return None
    sums, counts = found[0].view(model.n_expert, -1), float(found[1].sum())
    total = sum(
        float(model.expert(layer, "down", e).double().square().sum(0) @ sums[e])
        for e in range(model.n_expert)
    )
    if isinstance(model, GgufModel):
        scale = model.file.arch_key("expert_weights_scale") or 1.0
    else:
        scale = model.config.get("routed_scaling_factor") or 1.0
    if not isinstance(scale, (int, float)):
        raise MobeError(f"{model.path}: what scales the experts' weights must be a number, got {scale!r}")
    return total / counts * scale**2


def _others(model: Original, imatrix: ImatrixFile, layer: int) -> float:
    """The same of attention, dense and shared feed-forward of a layer; what is not known counts as nothing."""
    total = 0.0
    for name, stem in _writers(model, layer):
        found = imatrix.inputs(f"{stem}.weight")
        w = _matrix(model, name)
        if found is not None and found[0].numel() == w.shape[1]:
            total += float(w.double().square().sum(0) @ found[0].flatten()) / float(found[1].sum())
    return total


def _writers(model: Original, layer: int) -> list[tuple[str, str]]:
    """``(the model's name, GGUF stem)`` of the matrices of WRITERS that the layer has."""
    if isinstance(model, GgufModel):
        stems = {f"blk.{layer}.{stem}" for stem in WRITERS.values()}
        return [(f"{stem}.weight", stem) for stem in sorted(stems) if f"{stem}.weight" in model.file.tensors]
    assert isinstance(model, Checkpoint)
    names = ((f"model.layers.{layer}.{end}", f"blk.{layer}.{stem}") for end, stem in WRITERS.items())
    return [(name, stem) for name, stem in names if name in model]


def _matrix(model: Original, name: str) -> torch.Tensor:
    if isinstance(model, GgufModel):
        return Stored.of(model.file.tensors[name]).matrix(0)
    assert isinstance(model, Checkpoint)
    return model.matrix(name)


def _embedding(model: Original) -> float:
    """Mean square norm of a token's embedding, over some rows of the vocabulary; 0 if there is no such tensor."""
    if isinstance(model, GgufModel):
        info = model.file.tensors.get(EMBEDDINGS[-1])
        rows = None if info is None else next(Stored.of(info).pieces())
    else:
        assert isinstance(model, Checkpoint)
        name = next((n for n in EMBEDDINGS if n in model), None)
        n = model.shape(name)[0] if name else 0
        rows = (
            torch.stack([model.get_row(name, i).float() for i in range(0, n, max(1, n // ROWS))])
            if name
            else None
        )
    return 0.0 if rows is None else float(rows.double().square().sum(1).mean())
