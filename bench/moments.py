"""Gathering moments for a model of any size: peak memory and time, compared with the plain forward pass.

    python bench/moments.py --dir DIR                                  DeepSeek-V3's layer shapes in FP8, one MoE layer: memory
    python bench/moments.py --dir DIR --shape qwen3-30b --forward      a layer of Qwen3-30B: time against its own forward pass
    python bench/moments.py --dir DIR --group 6G                       in a control group of that much memory (version 1, root)

The checkpoint is written to --dir and kept there for the next run.  All its matrices are pieces of the same random
numbers (FP8 with block scales, or bf16).  The peak counts the process's own pages; the system can take back those of
mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np

from mobe_gguf.core import resources
from mobe_gguf.core.errors import run_program

MLA = dict(
    first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_group=8, topk_group=4, n_shared_experts=1, routed_scaling_factor=2.5, scoring_func="sigmoid", norm_topk_prob=True,
)  # fmt: skip

SHAPES = {
    "deepseek-v3": dict(
        model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], hidden_size=7168, intermediate_size=18432,
        moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8, num_attention_heads=128,
        num_key_value_heads=128, num_hidden_layers=2, **MLA,
    ),
    "qwen3-30b": dict(
        model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_hidden_layers=1, norm_topk_prob=True,
    ),
    "small": dict(
        model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], hidden_size=1024, intermediate_size=1024,
        moe_intermediate_size=512, num_experts=32, num_experts_per_tok=4, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, num_hidden_layers=4, norm_topk_prob=True,
    ),
}  # fmt: skip


def make(path: Path, shape: dict, fp8: bool) -> int:
    """Write the checkpoint if it is not there; returns the bytes of its tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mobe_gguf.calibrate.skeleton import _NoWeights
    from mobe_gguf.models.families import family_of

    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors").stat().st_size
    tiny = resources.path("models") / "tiny-moe"
    path.mkdir(parents=True)
    config = json.loads((tiny / "config.json").read_text())
    keep = (
        "vocab_size",
        "rms_norm_eps",
        "hidden_act",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "rope_theta",
    )
    config = {k: config[k] for k in keep} | shape | {"dtype": "bfloat16", "max_position_embeddings": 4096}
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, path / name)
    family = family_of(config)
    with _NoWeights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            layer = int(name.split(".")[2])
            for e in range(family.n_expert(config)):
                for projection in ("gate", "up", "down"):
                    p, d = family.n_ff_exp(config), family.n_embd(config)
                    rows = (d, p) if projection == "down" else (p, d)
                    shapes[family.expert_weight(layer, e, projection)] = rows
        elif "mlp.experts.down_proj" not in name:
            shapes[name] = tuple(tensor.shape)
    noise = np.random.default_rng(0).standard_normal(16 << 20, dtype=np.float32)
    patterns = {
        "BF16": (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
        "F8_E4M3": torch.from_numpy(noise * 100).to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes(),
    }
    header, at, pieces = {}, 0, []
    scaled: dict[np.float32, bytes] = {}

    def add(name: str, dtype: str, shape: tuple[int, ...], pattern: bytes) -> None:
        nonlocal at
        n_bytes = int(np.prod(shape)) * {"BF16": 2, "F8_E4M3": 1, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n_bytes]}
        pieces.append((pattern, n_bytes))
        at += n_bytes

    for name, s in sorted(shapes.items(), key=lambda x: "norm" in x[0] or "bias" in x[0]):
        small = len(s) == 1 or "mlp.gate.weight" in name or "embed" in name or "lm_head" in name
        scale = np.float32(1 if len(s) == 1 else s[-1] ** -0.5)
        if len(s) == 1:
            values = np.zeros(s, np.float32) if "bias" in name else np.ones(s, np.float32)
            add(name, "F32", s, values.tobytes())
        elif fp8 and not small:
            add(name, "F8_E4M3", s, patterns["F8_E4M3"])
            blocks = tuple(-(-x // 128) for x in s)
            add(f"{name}_scale_inv", "F32", blocks, np.full(blocks, scale / 100, np.float32).tobytes())
        else:
            by = np.float32(1 if "embed" in name else scale)
            if by not in scaled:
                scaled[by] = ((noise * by).view(np.uint32) >> 16).astype(np.uint16).tobytes()
            add(name, "BF16", s, scaled[by])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for pattern, n_bytes in pieces:
            for begin in range(0, n_bytes, len(pattern)):
                file.write(pattern[: n_bytes - begin])
    return at


def own() -> int:
    """Bytes of the process's own pages."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def enter(limit: str) -> Path:
    """Put this process into a new control group with that much memory, file pages included."""
    from mobe_gguf.core.files import parse_size

    group = Path("/sys/fs/cgroup/memory") / f"moments-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(parse_size(limit, "--group")))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return group


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="deepseek-v3")
    parser.add_argument("--experts", type=int, help="instead of the shape's own")
    parser.add_argument("--memory", default="4G")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--rank", type=int, help="instead of --keep 0.999")
    parser.add_argument("--forward", action="store_true", help="time transformers' own forward pass, too")
    parser.add_argument("--group", help="limit of a control group that the process is put in")
    parser.add_argument("--make", action="store_true", help="write the checkpoint only")
    parser.add_argument("--dir", type=Path, default=Path("moments-bench"))
    options = parser.parse_args()
    import torch

    from mobe_gguf.calibrate.moments import collect
    from mobe_gguf.core.files import parse_size

    shape = dict(SHAPES[options.shape])
    if options.experts:
        shape["n_routed_experts" if "n_routed_experts" in shape else "num_experts"] = options.experts
    model = options.dir / f"{options.shape}-{options.experts or 'all'}"
    size = make(model, shape, fp8=options.shape == "deepseek-v3")
    if options.make:
        return
    group = enter(options.group) if options.group else None
    text, out = resources.path("models") / "calibration.txt", options.dir / "moments.safetensors"
    shutil.rmtree(f"{out}.work", ignore_errors=True)
    if options.forward:
        from transformers import AutoModelForCausalLM

        from mobe_gguf.calibrate.text import read_tokens

        whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        ids = read_tokens(model, [text], 512, options.chunks, 1024)
        begin = time.process_time()
        with torch.inference_mode():
            for batch in ids.split(8):
                whole(batch, use_cache=False)
        print(f"plain forward pass: {time.process_time() - begin:.1f} CPU seconds")
        del whole
    before, peak, done = own(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin, wall = time.process_time(), time.monotonic()
    try:
        collect(
            model,
            text,
            out,
            chunks=options.chunks,
            rank=options.rank,
            memory=parse_size(options.memory, "--memory"),
        )
    finally:
        done.set()
        watcher.join()
    print(
        f"{size / 1e9:.2f} GB in the file, {options.chunks * 512} tokens, --memory {options.memory}: {(peak[0] - before) / 1e9:.2f} GB "
        f"at the peak beside {before / 1e9:.2f} of torch and the package, {time.process_time() - begin:.0f} CPU seconds, "
        f"{time.monotonic() - wall:.0f} s",
        file=sys.stderr,
    )
    if group is not None:
        most, failed = (
            (group / name).read_text().strip() for name in ("memory.max_usage_in_bytes", "memory.failcnt")
        )
        print(
            f"control group of {options.group}: {int(most) / 1e9:.2f} GB at most with file pages, limit met {failed} times",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_program(main)
