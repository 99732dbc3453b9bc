"""Ling (BailingMoeForCausalLM) in torch, for transformers does not know it: the reference of its parity tests.

By the description of its repository: a Llama with ``query_key_value`` in one matrix, rotary halves, softmax routing
with the weights of the chosen experts normalized, shared experts added, the rows of ``lm_head`` normalized (over the
vocabulary) where config.json says ``norm_head``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def bailing_logits(model: Path, tokens: Sequence[int]) -> np.ndarray:
    """float32 [len(tokens), vocabulary] of the ordinary checkpoint ``model``, computed in float64."""
    config = json.loads((model / "config.json").read_text())
    w = {n: t.double() for file in sorted(model.glob("*.safetensors")) for n, t in load_file(file).items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    x = w["model.word_embeddings.weight"][torch.tensor(tokens)]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * w[f"{name}.weight"]
        )

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up, down = (w[f"{name}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    frequencies = config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(len(tokens))[:, None] * frequencies
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    future = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=torch.float64).triu(1)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        h = norm(x, f"{block}.input_layernorm")
        qkv = (h @ w[f"{block}.attention.query_key_value.weight"].T).view(len(tokens), -1, size)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + future
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[f"{block}.attention.dense.weight"].T
        h = norm(x, f"{block}.post_attention_layernorm")
        if layer < config["first_k_dense_replace"]:
            x = x + mlp(h, f"{block}.mlp")
            continue
        weights, chosen = (
            (h @ w[f"{block}.mlp.gate.weight"].T).softmax(-1).topk(config["num_experts_per_tok"])
        )
        if config["norm_topk_prob"]:
            weights = weights / weights.sum(-1, keepdim=True)
        y = mlp(h, f"{block}.mlp.shared_experts") if config["num_shared_experts"] else torch.zeros_like(h)
        for e in range(config["num_experts"]):
            share = (weights * (chosen == e)).sum(-1, keepdim=True)
            y = y + share * mlp(h, f"{block}.mlp.experts.{e}")
        x = x + y
    head = w["lm_head.weight"]
    if config.get("norm_head"):
        head = head / (head.norm(p=2, dim=0, keepdim=True) + 1e-7)
    return (norm(x, "model.norm") @ head.T).float().numpy()
