#!/usr/bin/env bash
# gguf-py: asking for Arctic's tensor names takes a name away from every architecture that is asked for afterwards.
#
# Versions: gguf 0.19.0.
# Behaviour: get_tensor_name_map(arch, n) writes what is special about an architecture into a table of the class, which all
#   later maps are made of. Arctic has `residual_layernorm` where others have `post_attention_layernorm`, so after its map was made
#   Qwen3-MoE's no longer knows the latter; a map that was made before still does.
# Matters: a program that looks at several architectures in one process, or converts two models one after the other, stops at
#   a tensor that it mapped a moment ago.
# Output seen:
#   before: blk.0.ffn_norm; after Arctic's map was made: None
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet gguf==0.19.0
cd "$work"
"$work/env/bin/python" - <<'PYTHON'
from gguf import MODEL_ARCH, get_tensor_name_map

NAME = "model.layers.0.post_attention_layernorm"
before = get_tensor_name_map(MODEL_ARCH.QWEN3MOE, 2).get_name(NAME)
get_tensor_name_map(MODEL_ARCH.ARCTIC, 2)
after = get_tensor_name_map(MODEL_ARCH.QWEN3MOE, 2).get_name(NAME)
print(f"before: {before}; after Arctic's map was made: {after}")
assert before == "blk.0.ffn_norm" and after is None
PYTHON
