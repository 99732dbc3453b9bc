#!/usr/bin/env bash
# torch rounds float64 twice on its way to float16, bfloat16 and float8: through float32. numpy rounds to float16 once.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6.
# Behaviour: a float64 a little above the middle between two float16 values becomes, by way of float32, the middle itself, which
#   then goes to the even neighbour: the wrong one. numpy's float64 -> float16 is right. So a scale that is computed in float64
#   differs in the last bit of its float16 by which library cast it.
# Matters: block scales of quantized tensors are float16 and often solved for in float64.
# Output seen:
#   1 + 2**-11 + 2**-40   numpy 1.0009765625   torch 1.0
#   1 + 2**-4 + 2**-40    float8_e4m3fn: torch 1.0, right is 1.125
#   wrong of 1000 values just beyond a middle: numpy 0, torch 500
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/env/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import torch

x = 1 + 2.0**-11 + 2.0**-40
by_numpy, by_torch = float(np.float16(x)), float(torch.tensor(x, dtype=torch.float64).half())
print("1 + 2**-11 + 2**-40   numpy", by_numpy, "  torch", by_torch)
y = float(torch.tensor(1 + 2.0**-4 + 2.0**-40, dtype=torch.float64).to(torch.float8_e4m3fn))
print("1 + 2**-4 + 2**-40    float8_e4m3fn: torch", y, ", right is 1.125")

steps = np.arange(1000, dtype=np.float64)
lower, upper = 1 + steps * 2.0**-10, 1 + (steps + 1) * 2.0**-10  # neighbours in float16
middle = (lower + upper) / 2 + 2.0**-40  # nearer to the upper one
wrong_numpy = int((middle.astype(np.float16).astype(np.float64) != upper).sum())
wrong_torch = int((torch.from_numpy(middle).half().double().numpy() != upper).sum())
print("wrong of 1000 values just beyond a middle: numpy", wrong_numpy, ", torch", wrong_torch)
assert (by_numpy, by_torch, y) == (1.0009765625, 1.0, 1.0)
assert wrong_numpy == 0 and wrong_torch == 500, wrong_torch
PYTHON
