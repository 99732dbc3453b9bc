#!/usr/bin/env bash
# The balance loss of a bfloat16 Qwen3-MoE counts other experts than the tokens were sent to.
#
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: Qwen3MoeTopKRouter takes the softmax of its bfloat16 logits in float32 and the top k of that.
#   load_balancing_loss_func is given the same logits, takes their softmax in bfloat16 and the top k of that again: probabilities
#   that differed are now equal or the order of topk decides. Of 4096 tokens some get another set of eight, and the loss's counts
#   are not the experts' loads. In float32 both agree.
# Matters: expert loads that are read off the auxiliary loss are off, more so the more experts there are.
# Output seen:
#   128 experts, 8 used: other experts for 18 of 4096 tokens; in float32 for 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$work"
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter, load_balancing_loss_func

n, k, tokens = 128, 8, 4096
config = Qwen3MoeConfig(hidden_size=256, num_experts=n, num_experts_per_tok=k, norm_topk_prob=True)
torch.manual_seed(0)
router = Qwen3MoeTopKRouter(config)
torch.nn.init.normal_(router.weight, std=1 / 16)
x = torch.randn(tokens, 256)


def counted(logits):
    """The experts that the loss counts: what its own call of topk gives."""
    seen = []
    topk = torch.topk
    torch.topk = lambda *a, **b: seen.append(topk(*a, **b)) or seen[-1]
    try:
        load_balancing_loss_func((logits,), n, k)
    finally:
        torch.topk = topk
    return seen[0].indices


differ = []
for dtype in (torch.bfloat16, torch.float32):
    logits, _, used = router.to(dtype)(x.to(dtype))
    differ.append(int((used.sort(-1).values != counted(logits).sort(-1).values).any(-1).sum()))
print(f"{n} experts, {k} used: other experts for {differ[0]} of {tokens} tokens; in float32 for {differ[1]}")
assert differ[0] > 5 and differ[1] == 0
PYTHON
