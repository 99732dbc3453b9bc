#!/usr/bin/env bash
# transformers reads a mixture's GGUF file without the key for the experts' width: only files of the default width load.
#
# Versions: transformers 5.24.0, gguf 0.19.0, torch 2.13.0 (CPU).
# Behaviour: of the keys of a qwen3moe file, expert_feed_forward_length (which every converter writes) is not among those that
#   from_pretrained(gguf_file=...) maps; config.moe_intermediate_size stays Qwen3MoeConfig's default, 768, Qwen3-30B-A3B's own. A file
#   with experts of 768 loads; one with any other width, all else being equal, ends in "size mismatch". Of qwen2moe (default 1408)
#   the shared expert's width stays its default too.
# Matters: a sound file of Qwen3-235B-A22B (1536) looks damaged, and what worked on one model of a family does not on the next.
# Output seen:
#   width in the file 768: config 768, loaded
#   width in the file 32: config 768, RuntimeError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate
cd "$work"
"$work/env/bin/python" -W ignore - <<'PYTHON'
import os

import gguf
import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM

os.makedirs("model")


def write(width, n=4, d=64, head=16, vocabulary=8):
    w = gguf.GGUFWriter("model/m.gguf", "qwen3moe")
    w.add_block_count(1), w.add_context_length(64), w.add_embedding_length(d), w.add_feed_forward_length(128)
    w.add_head_count(4), w.add_head_count_kv(2), w.add_key_length(head), w.add_value_length(head)
    w.add_layer_norm_rms_eps(1e-6), w.add_rope_freq_base(1e6), w.add_vocab_size(vocabulary)
    w.add_expert_count(n), w.add_expert_used_count(2), w.add_expert_feed_forward_length(width)
    w.add_tokenizer_model("gpt2"), w.add_token_list([f"t{i}" for i in range(vocabulary)])
    w.add_token_merges(["t 0"]), w.add_token_types([1] * vocabulary)
    shapes = {"token_embd": (vocabulary, d), "output": (vocabulary, d), "output_norm": (d,)}
    block = {"attn_norm": (d,), "ffn_norm": (d,), "attn_q_norm": (head,), "attn_k_norm": (head,)}
    block |= {"attn_q": (4 * head, d), "attn_k": (2 * head, d), "attn_v": (2 * head, d), "attn_output": (d, 4 * head)}
    block |= {"ffn_gate_inp": (n, d), "ffn_gate_exps": (n, width, d), "ffn_up_exps": (n, width, d)}
    block |= {"ffn_down_exps": (n, d, width)}
    for name, shape in {**shapes, **{f"blk.0.{k}": s for k, s in block.items()}}.items():
        w.add_tensor(f"{name}.weight", np.full(shape, 0.01, np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


found = []
for width in (768, 32):
    write(width)
    in_config = AutoConfig.from_pretrained("model", gguf_file="m.gguf").moe_intermediate_size
    try:
        AutoModelForCausalLM.from_pretrained("model", gguf_file="m.gguf")
        end = "loaded"
    except RuntimeError:
        end = "RuntimeError"
    print(f"width in the file {width}: config {in_config}, {end}")
    found.append((in_config, end))
assert found == [(768, "loaded"), (768, "RuntimeError")]
PYTHON
