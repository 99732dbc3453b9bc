#!/usr/bin/env bash
# A Qwen3-MoE that runs in float32 stops in bfloat16 where the experts' width is no multiple of eight.
#
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: without an option transformers multiplies experts by torch._grouped_mm, which wants rows of whole 16 bytes: 8 values in
#   bfloat16, 4 in float32. With experts of 36 the same model answers in float32, in bfloat16 it raises "strides should be multiple of
#   16 bytes". experts_implementation="eager" (and "batched_mm") runs in either. Nothing falls back.
# Matters: small and pruned mixtures, and test models, come in such widths; calibration is run in bfloat16.
# Output seen:
#   width 36: default (grouped_mm) float32 runs, bfloat16 RuntimeError; eager float32 runs, bfloat16 runs
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$work"
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def end(dtype, **options):
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    sizes |= dict(moe_intermediate_size=36, num_experts=8, num_experts_per_tok=2, vocab_size=32)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **options)).to(dtype).eval()
    try:
        with torch.no_grad():
            model(torch.arange(16)[None])
        return "runs", model.config._experts_implementation
    except RuntimeError as e:
        assert "multiple of 16 bytes" in str(e), e
        return "RuntimeError", model.config._experts_implementation


default = [end(dtype) for dtype in (torch.float32, torch.bfloat16)]
eager = [end(dtype, experts_implementation="eager")[0] for dtype in (torch.float32, torch.bfloat16)]
print(f"width 36: default ({default[0][1]}) float32 {default[0][0]}, bfloat16 {default[1][0]}; "
      f"eager float32 {eager[0]}, bfloat16 {eager[1]}")
assert default == [("runs", "grouped_mm"), ("RuntimeError", "grouped_mm")] and eager == ["runs", "runs"]
PYTHON
