"""GGUF files of real shapes and random weights, for timing: an ordinary mixture of experts and its factorized twin.

    python bench/synthetic.py qwen3-30b --quant q4_k --layers 4 --out DIR     writes both, prints their sizes

All are of the architecture qwen3moe whatever the experts' shapes come from, with that model's number of heads of 128 and a
vocabulary of 4096 tokens without a tokenizer, so that the few layers weigh what they weigh in a whole model.  All experts of
a tensor are copies of one random matrix: what is timed does not depend on the values, and the file is written as fast as
the disk takes it.  The router is random, so routing is uniform: the worst case for a cache.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mobe_gguf import names, runtime
from mobe_gguf.export.recipe import fit
from mobe_gguf.runtime import ggml

VOCABULARY = 4096
HEAD_DIM = 128


@dataclass(frozen=True)
class Shape:
    """Of one layer; r = p, one group, tanh.  ``terms``: non-zero coefficients an expert, None for all."""

    n: int
    k: int
    d: int
    p: int
    m: int
    heads: int
    kv_heads: int
    activation: str = "tanh"
    terms: int | None = None

    def experts_used(self, tokens: int) -> float:
        """Different experts that ``tokens`` tokens together use, expected of even routing."""
        return self.n * (1 - (1 - self.k / self.n) ** tokens)

    def multiply_adds(self, factorized: bool, tokens: int = 1) -> float:
        """A token and layer, of the experts; with an activation each expert in use forms its own matrix, once."""
        k, d, p, m = self.k, self.d, self.p, self.m
        if not factorized:
            return 3 * k * p * d
        if self.activation == "none":
            project = m * p * d + k * m * p
        else:
            project = (self.experts_used(tokens) / tokens * (self.terms or m) + k) * p * d
        return k * p * d + 2 * (project + k * p * p)

    def weights_read(self, factorized: bool, tokens: int = 1) -> float:
        """A token and layer, of the experts."""
        d, p = self.d, self.p
        used = self.experts_used(tokens)
        if not factorized:
            return 3 * used * p * d / tokens
        bases = min(self.m, used * (self.terms or self.m))
        return (used * p * d + 2 * (used * p * p + bases * p * d)) / tokens


SHAPES = {
    "qwen3-30b": Shape(n=128, k=8, d=2048, p=768, m=32, heads=32, kv_heads=4),
    "deepseek-v2-lite": Shape(n=64, k=6, d=2048, p=1408, m=4, heads=16, kv_heads=16),
    "deepseek-v3": Shape(n=256, k=8, d=7168, p=2048, m=64, heads=56, kv_heads=8),
    # for trying a benchmark out
    "small": Shape(n=16, k=4, d=512, p=256, m=4, heads=4, kv_heads=2),
}


def write(path: Path, shape: Shape, quant: str, layers: int, factorized: bool) -> Path:
    """Write one model whose matrices are of the type ``quant``, or what llama-quantize takes instead for rows that it does not divide; returns ``path``.

    A file that is there is kept: its name has to stand for its contents.
    """
    if path.exists():
        return path
    runtime.use_conversion()
    import gguf

    arch = "qwen3moe"
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, arch)
    keys = {
        "context_length": 8192,
        "embedding_length": shape.d,
        "block_count": layers,
        "feed_forward_length": shape.p,
        "expert_feed_forward_length": shape.p,
        "expert_count": shape.n,
        "expert_used_count": shape.k,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "vocab_size": VOCABULARY,
    }
    for key, value in keys.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    if factorized:
        writer.add_uint32(names.key_version(arch), 1)
        writer.add_string(names.key_activation(arch), shape.activation)
        writer.add_uint32(names.key_group_count(arch), 1)
    tensors = list(_tensors(shape, quant, layers, factorized))
    for name, dims, type_name, _ in tensors:
        code = gguf.GGMLQuantizationType[type_name.upper()]
        info = ggml.type_info(type_name)
        size = int(np.prod(dims[:-1])) * info.row_bytes(dims[-1])
        writer.add_tensor_info(name, dims, np.dtype(np.float32), size, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out = writer.fout[0]
    for seed, (_, dims, type_name, scale) in enumerate(tensors):
        writer.write_padding(out, out.tell())
        matrix = _matrix(dims, type_name, scale, seed, shape).tobytes()
        for _ in range(dims[0] if len(dims) == 3 else 1):
            out.write(matrix)
        writer.write_padding(out, out.tell())
    writer.close()
    part.rename(path)
    return path


def _tensors(shape: Shape, quant: str, layers: int, factorized: bool):
    """``(name, dims with the row last, type, standard deviation)`` of every tensor."""
    n, d, p, m = shape.n, shape.d, shape.p, shape.m

    yield "token_embd.weight", (VOCABULARY, d), "q8_0", 1.0
    yield "output_norm.weight", (d,), "f32", None
    yield "output.weight", (VOCABULARY, d), "q8_0", d**-0.5
    for layer in range(layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (d,), "f32", None
        yield f"{block}.ffn_norm.weight", (d,), "f32", None
        yield f"{block}.attn_q_norm.weight", (HEAD_DIM,), "f32", None
        yield f"{block}.attn_k_norm.weight", (HEAD_DIM,), "f32", None
        q, kv = shape.heads * HEAD_DIM, shape.kv_heads * HEAD_DIM
        for name, rows, row in (("q", q, d), ("k", kv, d), ("v", kv, d), ("output", d, q)):
            yield f"{block}.attn_{name}.weight", (rows, row), fit(quant, row), row**-0.5
        yield f"{block}.ffn_gate_inp.weight", (n, d), "f32", d**-0.5
        for projection in names.PROJECTIONS:
            if projection == "down":
                continue
            if not factorized:
                yield f"{block}.ffn_{projection}_exps.weight", (n, p, d), fit(quant, d), d**-0.5
                continue
            yield names.transform_name(layer, projection), (n, p, p), fit(quant, p), (p * d) ** -0.5
            yield names.basis_name(layer, projection), (m, p, d), fit(quant, d), 1.0
            yield names.mix_name(layer, projection), (n, m), "f32", m**-0.5
        yield f"{block}.ffn_down_exps.weight", (n, d, p), fit(quant, p), p**-0.5


def _matrix(
    dims: tuple[int, ...], type_name: str, scale: float | None, seed: int, shape: Shape
) -> np.ndarray:
    """What one tensor, or one expert's or basis's share of it, consists of: bytes."""
    if scale is None:
        return np.ones(dims, np.float32)
    rng = np.random.default_rng(seed)
    rows = dims[-2:]
    values = rng.standard_normal(rows, dtype=np.float32) * np.float32(scale)
    if shape.terms is not None and type_name == "f32" and dims == (shape.n, shape.m):
        kept = np.argsort(rng.random(dims), axis=1)[:, : shape.terms]
        mask = np.zeros(dims, np.float32)
        np.put_along_axis(mask, kept, 1.0, axis=1)
        values *= mask
    if type_name == "f32":
        return values
    return ggml.quantize(values, type_name, name="random", imatrix=np.ones(rows[-1], np.float32))


def pair(directory: Path, name: str, quant: str, layers: int, **changes) -> tuple[Path, Path]:
    """The ordinary model and the factorized one, written if they are not there; ``changes``: fields of Shape."""
    shape = replace(SHAPES[name], **changes)
    stem = f"{name}-{layers}l-{quant}"
    suffix = "".join(
        f"-{key}-{value}" for key, value in changes.items() if value != getattr(SHAPES[name], key)
    )
    directory.mkdir(parents=True, exist_ok=True)
    return (
        write(directory / f"{stem}.gguf", shape, quant, layers, factorized=False),
        write(directory / f"{stem}-mobe{suffix}.gguf", shape, quant, layers, factorized=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--quant", default="q4_k")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--terms", type=int)
    parser.add_argument("--activation", choices=names.ACTIVATIONS, default="tanh")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    changes = {"terms": options.terms, "activation": options.activation}
    for path in pair(options.out, options.shape, options.quant, options.layers, **changes):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
