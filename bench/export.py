"""Export of a checkpoint of any size: peak memory and throughput, beside llama-quantize's on the same bytes.

    python bench/export.py --gb 60 --sparse                     constant memory: a checkpoint of sparse files
    python bench/export.py --gb 4 --quants q4_k,q8_0,bf16       throughput: random numbers, against llama-quantize

A MoBE checkpoint of Qwen3-235B's shapes (n 128, d 4096, p = r = 1536, m 32) in bf16, with as many layers as --gb holds,
is written to --dir.  Sparse files read as zeros and take no disk space.  To check the memory, run it in a control group
with a memory limit (which also counts pages of files).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.core.errors import run_program
from mobe_gguf.core.progress import console

N, D, P, M = 128, 4096, 1536, 32
HEADS, KV_HEADS, HEAD_DIM = 64, 4, 128

#: Bytes of random numbers, which are written repeatedly.
PATTERN = 64 << 20


def layer_tensors(layer: int) -> dict[str, tuple[int, ...]]:
    block = f"model.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{block}.input_layernorm.weight": (D,),
        f"{block}.post_attention_layernorm.weight": (D,),
        f"{block}.self_attn.q_norm.weight": (HEAD_DIM,),
        f"{block}.self_attn.k_norm.weight": (HEAD_DIM,),
        f"{block}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, D),
        f"{block}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, D),
        f"{block}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, D),
        f"{block}.self_attn.o_proj.weight": (D, HEADS * HEAD_DIM),
        f"{block}.mlp.gate.weight": (N, D),
    }
    for projection in ("gate", "up"):
        shapes |= {f"{block}.mlp.B_{projection}": (M, P, D), f"{block}.mlp.W_{projection}": (N, M)}
        shapes |= {f"{block}.mlp.experts.{e}.{projection}_proj.weight": (P, P) for e in range(N)}
    shapes |= {f"{block}.mlp.experts.{e}.down_proj.weight": (D, P) for e in range(N)}
    return shapes


def make(target: Path, size: float, sparse: bool) -> int:
    """Write the checkpoint; returns the bytes of its tensors."""
    tiny = resources.path("models") / "tiny-moe"
    target.mkdir(parents=True)
    config = json.loads((tiny / "config.json").read_text())
    per_layer = sum(2 * int(np.prod(shape)) for shape in layer_tensors(0).values())
    layers = max(1, round(size * 1e9 / per_layer))
    config |= {
        "hidden_size": D, "moe_intermediate_size": P, "intermediate_size": P, "num_experts": N, "num_local_experts": N,
        "num_experts_per_tok": 8, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_B": M, "activation": "tanh",
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny / name, target / name)
    shards = [layer_tensors(i) for i in range(layers)]
    shards.append({"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)})
    noise = np.random.default_rng(0).standard_normal(PATTERN // 4, dtype=np.float32) * 0.02
    pattern = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes() * 2
    weight_map, total = {}, 0
    for i, shapes in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for tensor, shape in shapes.items():
            n_bytes = 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n_bytes]}
            weight_map[tensor] = name
            at += n_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(target / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                file.truncate(file.tell() + at)
            else:
                for begin in range(0, at, len(pattern)):
                    file.write(pattern[: at - begin])
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def timed(command: list[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak resident megabytes (pages of files included) of a program."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed ({status})")
    return time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--sparse", action="store_true", help="holes instead of numbers, and no rival")
    parser.add_argument("--quants", default="q4_k")
    parser.add_argument("--no-refit", action="store_true", help="as export's: A is not solved again")
    parser.add_argument("--dir", type=Path, default=Path("export-bench"), help="emptied at the end")
    options = parser.parse_args()
    quantize = str(runtime.tool("llama-quantize"))
    ours = [str(Path(sys.executable).with_name("mobe-gguf")), "export"]
    extra = ["--no-card", *["--no-refit"] * options.no_refit]
    if options.dir.exists():
        sys.exit(f"{options.dir} exists: name another --dir, it is deleted at the end")
    try:
        console.print(f"writing {options.gb:g} GB to {options.dir}")
        total = make(options.dir / "model", options.gb, options.sparse)
        table = Table(title=f"a checkpoint of {total / 1e9:.1f} GB in bf16{', all holes' * options.sparse}")
        for column in ("program", "type", "seconds", "CPU s", "MB/s of bf16", "peak MB", "file GB"):
            table.add_column(column, justify="right" if column != "program" else "left")
        out, reference = options.dir / "out.gguf", options.dir / "reference.gguf"

        def row(program: str, quant: str, command: list[str]) -> None:
            console.print(f"{program} {quant}")
            seconds, cpu, peak = timed(command)
            table.add_row(
                program, quant, f"{seconds:.0f}", f"{cpu:.0f}", f"{total / 1e6 / seconds:.0f}", f"{peak:.0f}",
                f"{out.stat().st_size / 1e9:.2f}",
            )  # fmt: skip
            out.unlink()

        if not options.sparse:
            command = [*ours, str(options.dir / "model"), str(reference), "--quant", "bf16", "--no-card"]
            subprocess.run(command, check=True, capture_output=True)
        for quant in options.quants.split(","):
            row(
                "mobe-gguf export",
                quant,
                [*ours, str(options.dir / "model"), str(out), "--quant", quant, *extra],
            )
            if not options.sparse:
                row("llama-quantize", quant, [quantize, str(reference), str(out), quant])
        Console(width=110 if not sys.stdout.isatty() else None).print(table)
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)


if __name__ == "__main__":
    run_program(main)
