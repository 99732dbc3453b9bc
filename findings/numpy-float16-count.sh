#!/usr/bin/env bash
# numpy's float16 sum over the first axis stops growing at 2048; the same values laid out column by column sum right.
#
# Versions: numpy 2.4.6; torch 2.13.0 (CPU) for comparison.
# Behaviour: np.sum adds float16 in float32 where the reduced axis is contiguous, and in float16 where it is not: then
#   2048 + 1 = 2048. So x.sum(axis=0) of a C-ordered array and of a copy of it in Fortran order differ by a factor of two here.
#   np.einsum("te->e") does as the first, x.mean(axis=0) counts in float32 and is right, torch is right in either layout.
# Matters: which expert each of 4096 tokens uses is a [tokens, experts] array of ones and zeros; its column sums are how often
#   experts are used, which weigh an importance matrix or a balance loss.
# Output seen:
#   tokens 4096; axis 0: C order 2048.0, Fortran order 4096.0; einsum 2048.0; 4096 * mean 4096.0; torch 4096.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/env/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import torch

tokens, experts = 4096, 64
used = np.zeros((tokens, experts), np.float16)
used[:, 0] = 1  # every token uses expert 0, and one other
used[np.arange(tokens), 1 + np.arange(tokens) % 63] = 1
c, f = float(used.sum(axis=0)[0]), float(np.asfortranarray(used).sum(axis=0)[0])
e, m = float(np.einsum("te->e", used)[0]), tokens * float(used.mean(axis=0)[0])
t = float(torch.from_numpy(used).sum(0)[0])
print(f"tokens {tokens}; axis 0: C order {c}, Fortran order {f}; einsum {e}; {tokens} * mean {m}; torch {t}")
assert (c, f, e, m, t) == (2048, 4096, 2048, 4096, 4096)
PYTHON
