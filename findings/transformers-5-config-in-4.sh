#!/usr/bin/env bash
# A mixture saved by transformers 5 loads in transformers 4 without a complaint and with another rotary base.
#
# Versions: written by transformers 5.24.0, read by transformers 4.57.3; torch 2.13.0 (CPU).
# Behaviour: 5 writes the base of the rotary embedding as rope_parameters.rope_theta alone; 4 knows rope_theta beside it and takes
#   the family's default where it is missing, 10000. OLMoE: all tensors are found, no key is missing, no warning, other logits. Of
#   Qwen3-MoE the same happens to the number of experts (5 writes num_local_experts alone), which 4 takes for 128 and then stops at,
#   for the router has other rows.
# Matters: requirements often allow both (>=4.57,<6); a model that was saved under the one is measured under the other.
# Output seen:
#   5.24.0 wrote rope_theta 5000000.0, 8 experts
#   olmoe in 4.57.3: rope_theta 10000.0, 0 keys missing, largest difference of logits 0.18
#   qwen3_moe in 4.57.3: rope_theta 10000.0, num_experts 128
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$work"
cat > run.py <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = torch.arange(40)[None] % 32
SIZES = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
SIZES |= dict(intermediate_size=64, num_experts=8, num_experts_per_tok=2, eos_token_id=1)
if transformers.__version__.startswith("5"):
    rope = {"rope_theta": 5e6, "rope_type": "default"}
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(rope_parameters=rope, **SIZES)).eval()
    model.save_pretrained("olmoe")
    torch.save(model(TOKENS).logits.detach(), "logits.pt")
    transformers.Qwen3MoeConfig(rope_parameters=rope, **SIZES).save_pretrained("qwen3_moe")
    print(f"{transformers.__version__} wrote rope_theta {rope['rope_theta']}, 8 experts")
    sys.exit()
model, info = AutoModelForCausalLM.from_pretrained("olmoe", output_loading_info=True)
missing = len(info["missing_keys"]) + len(info["unexpected_keys"]) + len(info["mismatched_keys"])
apart = float((model.eval()(TOKENS).logits - torch.load("logits.pt", weights_only=True)).abs().max())
theta = model.config.rope_theta
print(f"olmoe in {transformers.__version__}: rope_theta {theta}, {missing} keys missing, largest difference of logits {apart:.2f}")
qwen = AutoConfig.from_pretrained("qwen3_moe")
print(f"qwen3_moe in {transformers.__version__}: rope_theta {qwen.rope_theta}, num_experts {qwen.num_experts}")
assert (theta, missing) == (10000, 0) and apart > 0.01 and (qwen.rope_theta, qwen.num_experts) == (10000, 128)
PYTHON
"$work/env/bin/python" -W ignore run.py
"$work/env/bin/pip" install --quiet transformers==4.57.3
"$work/env/bin/python" -W ignore run.py
