"""Ways to round gate and up in each codebook type: error in the metric of their inputs' second moments, KL divergence
and time.

    python bench/codebooks.py MOMENTS [--model DIR] [--text FILE] [--chunks N] [--types iq1_s,...]

``stock`` is libggml with each expert's own mean squares as the importance matrix, ``feedback`` is only the pass with
error feedback, ``descent`` is what export does.  All other tensors are unchanged.  KL divergence is from the model
itself, on the second halves of chunks of 512 tokens, by transformers.  Times are CPU times on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobe_gguf.core import resources
from mobe_gguf.export.rounding import matrix
from mobe_gguf.formats.moments import Moments
from mobe_gguf.quant.rounding.codebook import round_matrices
from mobe_gguf.quant.rounding.codebook_blocks import CODEBOOKS
from mobe_gguf.quant.rounding.rounder import Rounder
from mobe_gguf.runtime import ggml

CONTEXT = 512

#: ``(w [rows, n], the expert's moments, type) -> bytes``
Method = Callable[[torch.Tensor, Rounder, str], np.ndarray]


def stock(w: torch.Tensor, rounder: Rounder, type_name: str) -> np.ndarray:
    return ggml.quantize(w.numpy(), type_name, rounder.diagonal, threads=1)


def feedback(w: torch.Tensor, rounder: Rounder, type_name: str) -> np.ndarray:
    return round_matrices(w[None], rounder.problem.s, type_name, factor=rounder.factor, sweeps=0).data[0]


def descent(w: torch.Tensor, rounder: Rounder, type_name: str) -> np.ndarray:
    return rounder.encode(w, type_name)[0]


METHODS: tuple[Method, ...] = (stock, feedback, descent)


class Bench:
    """The model, the moments of its experts' inputs, and its predictions on the text."""

    def __init__(self, model: Path, moments: Path, text: Path, chunks: int):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
        chunks = min(chunks, len(ids) // CONTEXT)
        self.ids = ids[: chunks * CONTEXT].view(chunks, CONTEXT)
        self.layers = [layer.mlp.experts for layer in self.model.model.layers]
        self.original = [layer.gate_up_proj.data.clone() for layer in self.layers]
        file = Moments(moments)
        self.rounders = []
        for number in range(len(self.layers)):
            roots = file.find(f"blk.{number}.ffn_gate_exps.weight")
            if roots is None:
                raise SystemExit(f"{moments}: knows no inputs of layer {number}'s experts")
            self.rounders.append([Rounder(matrix(roots, e)) for e in range(len(roots.root))])
        self.expected = self.log_probabilities()

    @torch.no_grad()
    def log_probabilities(self) -> torch.Tensor:
        parts = [self.model(part).logits[:, CONTEXT // 2 : -1] for part in self.ids.split(8)]
        return torch.cat([part.float().log_softmax(-1) for part in parts])

    def measure(self, method: Method, type_name: str) -> tuple[float, float, float]:
        """Mean relative error of the matrices in their metric, KL divergence, and seconds."""
        errors, seconds = [], 0.0
        for layer, original, rounders in zip(self.layers, self.original, self.rounders, strict=True):
            for e, rounder in enumerate(rounders):
                w = original[e].contiguous()
                start = time.process_time()
                data = method(w, rounder, type_name)
                seconds += time.process_time() - start
                q = torch.from_numpy(ggml.dequantize(data, type_name, w.shape[-1], threads=1))
                layer.gate_up_proj.data[e] = q
                problem = rounder.problem.of_rows(w[None])
                errors.append(float(problem.cost(q[None]).sum() / problem.size().sum()))
        found = self.log_probabilities()
        kl = float((self.expected.exp() * (self.expected - found)).sum(-1).mean())
        return sum(errors) / len(errors), kl, seconds


def main() -> None:
    models = resources.path("models")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("moments", type=Path, help="file of `mobe-gguf moments`")
    parser.add_argument("--model", type=Path, default=models / "tiny-moe", help="Hugging Face directory")
    parser.add_argument("--text", type=Path, default=models / "heldout.txt")
    parser.add_argument("--chunks", type=int, default=24, help="of the text  [default: 24]")
    parser.add_argument("--types", default=",".join(CODEBOOKS), help="[default: all]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.model, options.moments, options.text, options.chunks)
    print("| type | bits | method | relative error | KL divergence | seconds |\n|---|---|---|---|---|---|")
    for name in options.types.split(","):
        ggml.quantize(np.ones((1, 256), np.float32), name, np.ones(256, np.float32))  # makes its tables
        for method in METHODS:
            error, kl, seconds = bench.measure(method, name)
            bits = ggml.type_info(name).bits
            print(
                f"| {name} | {bits:.2f} | {method.__name__} | {error:.4f} | {kl:.4f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
