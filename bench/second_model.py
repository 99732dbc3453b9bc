"""Train a second small model to measure on: another family and other text than the shipped model's.

    python bench/second_model.py --out DIR [--steps N]

A DeepSeek-V2: latent attention, a dense layer, then 3 layers with a shared expert and 16 routed ones, 3 of them used by each token;
12.6 M parameters. It learns from code, documentation, dialogue and mathematics of models/calibration, with the shipped tokenizer, less the
last tenth of each file. 350 steps, six minutes of one thread, give a perplexity of 45 on that tenth (random weights: 590), 1,500 steps,
half an hour, one of 28.5. DIR then holds model/ (a Hugging Face directory in bfloat16), calibration.txt (of the text that it
learned) and heldout.txt. Same seed and threads, same model. It is for measurements alone.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerBase
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts, DeepseekV2TopkRouter

from mobe_gguf.core import resources

MODELS = resources.path("models")
sys.path.insert(0, str(MODELS))
import fast_moe  # noqa: E402

SOURCES = ("code", "documentation", "dialogue", "mathematics")
#: Shares of each file held out, and of what is learned that calibrates.
HELD, CALIBRATES = 0.1, 0.07
#: Characters of the pieces that a text is mixed from.
PIECE = 2000
LENGTH, ROWS = 256, 8
RATE, WARM_UP, DECAY, BALANCE = 2e-3, 0.03, 0.1, 0.02


def config(tokenizer: PreTrainedTokenizerBase) -> DeepseekV2Config:
    """Rows of 256 throughout, so that every type's blocks fit, those of 128 and of 256 weights alike."""
    end = tokenizer.eos_token_id
    return DeepseekV2Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=4, first_k_dense_replace=1,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=32,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=16, num_experts_per_tok=3, n_shared_experts=1,
        moe_intermediate_size=256, n_group=1, topk_group=1, topk_method="greedy", norm_topk_prob=False,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=end, pad_token_id=end, tie_word_embeddings=False,
    )  # fmt: skip


def texts(seed: int) -> tuple[str, str, str]:
    """What is learned, a part of it to calibrate by, and what is held out; pieces of all sources, mixed."""
    learned: list[str] = []
    held: list[str] = []
    for source in SOURCES:
        whole = (MODELS / "calibration" / f"{source}.txt").read_text(encoding="utf-8")
        cut = round(len(whole) * (1 - HELD))
        for part, into in ((whole[:cut], learned), (whole[cut:], held)):
            into += [part[i : i + PIECE] for i in range(0, len(part), PIECE)]
    mixer = random.Random(seed)
    mixer.shuffle(learned)
    mixer.shuffle(held)
    return "\n\n".join(learned), "\n\n".join(learned[: round(len(learned) * CALIBRATES)]), "\n\n".join(held)


def faster(model: DeepseekV2ForCausalLM) -> list[torch.Tensor]:
    """Let the experts run sorted by token (models/fast_moe.py); returns where each layer's balance loss will be."""
    losses: list[torch.Tensor] = []

    def balance(router: DeepseekV2TopkRouter, _: object, out: tuple[torch.Tensor, ...]) -> None:
        share = torch.bincount(out[2].reshape(-1), minlength=router.num_experts) / out[2].numel()
        losses.append(router.num_experts * (share * out[0].softmax(-1).mean(0)).sum())

    for module in model.modules():
        if isinstance(module, DeepseekV2Experts):
            module.forward = types.MethodType(fast_moe._experts, module)
        if isinstance(module, DeepseekV2TopkRouter):
            module.register_forward_hook(balance)
    return losses


def rate(progress: float) -> float:
    """Warm-up, then a cosine down to a thirtieth."""
    return RATE * min((progress + 1e-3) / WARM_UP, 0.515 + 0.485 * math.cos(math.pi * progress))


def train(
    tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int
) -> DeepseekV2ForCausalLM:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = DeepseekV2ForCausalLM(config(tokenizer))
    losses = faster(model)
    groups = [
        {
            "params": [p for p in model.parameters() if (p.ndim > 1) == decayed],
            "weight_decay": DECAY * decayed,
        }
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    began = time.monotonic()
    for step in range(steps):
        starts = rng.integers(len(tokens) - LENGTH - 1, size=ROWS)
        rows = torch.from_numpy(np.stack([tokens[s : s + LENGTH + 1] for s in starts]))
        for group in optimizer.param_groups:
            group["lr"] = rate(step / steps)
        losses.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        (loss + BALANCE * torch.stack(losses).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step + 1 == steps:
            left = (time.monotonic() - began) / (step + 1) * (steps - step - 1)
            print(f"step {step} of {steps}, loss {loss.item():.3f}, {left / 60:.1f} min left", flush=True)
    return model


@torch.no_grad()
def perplexity(
    model: DeepseekV2ForCausalLM, tokens: list[int], window: int = 512, windows: int = 24
) -> float:
    """Of transformers' own forward, over the first windows."""
    rows = torch.tensor(tokens[: windows * window]).view(-1, window)
    sums = [
        F.cross_entropy(model(row[None], use_cache=False).logits[0, :-1].float(), row[1:], reduction="sum")
        for row in rows
    ]
    return math.exp(float(sum(sums)) / rows[:, 1:].numel())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    learned, calibrates, held = texts(arguments.seed)
    (arguments.out / "calibration.txt").write_text(calibrates, encoding="utf-8")
    (arguments.out / "heldout.txt").write_text(held, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-moe")
    tokens = np.array(tokenizer(learned)["input_ids"])
    print(f"{len(tokens):,} tokens to learn")
    model = train(tokens, tokenizer, arguments.steps, arguments.seed)
    folder = arguments.out / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, text in (("of the held-out text", held), ("of the calibration text", calibrates)):
        print(f"perplexity {name} {perplexity(saved, tokenizer(text)['input_ids']):.2f}")


if __name__ == "__main__":
    main()
