"""Llama-4's experts for a layer-by-layer run: transformers' class runs all experts on all tokens, most of them on zeros.

The router's score multiplies an expert's input there, not its output.  :class:`ScaledExperts` computes the same from each
token's experts alone, and is called as every other family's experts are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ScaledExperts(nn.Module):
    """``down(act(gate(w x)) * up(w x))`` summed over a token's experts; the tensors of transformers' ``of``."""

    has_gate, has_bias, is_concatenated, is_transposed = True, False, True, True
    #: The weights belong to the inputs.
    scales_inputs = True

    def __init__(self, of: Any):
        super().__init__()
        self.num_experts, self.act_fn = of.num_experts, of.act_fn
        self.gate_up_proj, self.down_proj = of.gate_up_proj, of.down_proj

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x ``[T, d]``, each token's experts ``index`` ``[T, k]`` and their ``weights``; returns ``[T, d]``."""
        out = torch.zeros_like(x)
        for e in index.unique().tolist():
            rows, which = torch.where(index == e)
            hidden = self._apply_gate((x[rows] * weights[rows, which, None]) @ self.gate_up_proj[e])
            out.index_add_(0, rows, hidden @ self.down_proj[e])
        return out


def route_sparsely(model: nn.Module) -> None:
    """Make all MoE blocks of Llama-4 in ``model`` call :class:`ScaledExperts`."""
    for block in model.modules():
        if type(block).__name__ == "Llama4TextMoe":
            block.experts = ScaledExperts(block.experts)
            block.forward = _forward.__get__(block)


def _forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``Llama4TextMoe.forward`` computes."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, logits = self.router(x)
    top, index = logits.topk(self.top_k, dim=1)
    weights = top.float().sigmoid().to(x)
    return self.shared_expert(x) + self.experts(x, index, weights), logits
