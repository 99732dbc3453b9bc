"""GGUF files of real shapes and random weights, for timing: an ordinary mixture of experts and its factorized twin.

    python bench/synthetic.py qwen3-30b --quant q4_k --layers 4 --out DIR     writes both, prints their sizes

All files have the architecture qwen3moe, whatever model the shapes are from, with that model's number of heads (of size
128) and a vocabulary of 4096 tokens, so that the few layers have the same weight as in a whole model.  All experts of a
tensor are copies of one random matrix: times do not depend on the values, and the file is written as fast as the disk
allows.  The router is random.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mobe_gguf import runtime
from mobe_gguf.core import names
from mobe_gguf.core.errors import run_program
from mobe_gguf.export.factors import add_mobe_keys
from mobe_gguf.quant.recipe import fitting_type
from mobe_gguf.runtime import ggml

VOCABULARY = 4096
HEAD_DIM = 128

#: Scale of what layers add to a token's vector.  It stays nearly the embedding, so tokens and their experts differ as
#: much in the last layer as in the first.  With 1, eight tokens use 50 of 128 experts in the first layer and 35 in the
#: sixth.
SMALL = 0.1


#: Rows of an expert or a basis that are drawn and encoded; the others are copies of these.
ROWS = 128


@dataclass(frozen=True)
class Work:
    """The work of one layer's experts for one token, by kind (see peaks.py).

    ``moved``: bytes of weights.  The others are counts of numbers or multiply-adds.
    """

    moved: float
    mix: float = 0.0
    evaluate: float = 0.0
    project: float = 0.0
    prompt: float = 0.0
    multiply: float = 0.0

    @property
    def multiply_adds(self) -> float:
        return self.mix + self.project + self.prompt + self.multiply


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer; one group, tanh.  ``rank``: rows of a basis, None for p.  ``terms``: non-zero coefficients
    per expert, None for all.  ``down``: whether down is factorized, too.  ``experts``: type of the ordinary model's
    experts, None for that of the other matrices."""

    n: int
    k: int
    d: int
    p: int
    m: int
    heads: int
    kv_heads: int
    activation: str = "tanh"
    terms: int | None = None
    down: bool = False
    rank: int | None = None
    experts: str | None = None

    @property
    def r(self) -> int:
        return self.rank or self.p

    @property
    def projections(self) -> int:
        """Number of factorized projections."""
        return 2 + self.down

    @property
    def own(self) -> int:
        """Weights of one expert of a factorized model: A's, and an ordinary down."""
        return self.projections * self.p * self.r + (not self.down) * self.p * self.d

    def own_bytes(self, quant: str) -> float:
        """Bytes of those; rows of gate's and up's A have length r, those of the others p."""
        gate_and_up = 2 * self.p * self.r
        return gate_and_up * size(quant, self.r) + (self.own - gate_and_up) * size(quant, self.p)

    def basis_bytes(self, quant: str) -> float:
        """Bytes of one basis of each projection; rows of down's bases have length r."""
        return self.r * self.d * (2 * size(quant, self.d) + self.down * size(quant, self.r))

    def experts_used(self, tokens: int) -> float:
        """Expected number of different experts that ``tokens`` tokens use together, with even routing."""
        return self.n * (1 - (1 - self.k / self.n) ** tokens)

    def bases_used(self, experts: float) -> float:
        """Expected number of different bases that ``experts`` experts mix, with terms chosen at random."""
        return self.m * (1 - (1 - (self.terms or self.m) / self.m) ** experts)

    def work(self, factorized: bool, quant: str, tokens: int = 1) -> Work:
        """Work of one token when ``tokens`` are computed at once; they share what is read and the formed matrices."""
        k, d, p, m = self.k, self.d, self.p, self.m
        each, used = p * d, self.experts_used(tokens)
        long, short = size(quant, d), size(quant, p)
        if not factorized:
            return Work((2 * used * each * long + used * each * short) / tokens, multiply=3 * k * each)
        own, basis, count = used * self.own_bytes(quant) / tokens, self.basis_bytes(quant), self.projections
        each = self.r * d
        if self.activation == "none":  # each basis once for all experts
            project = count * (m * each + k * m * self.r)
            return Work(m * basis / tokens + own, multiply=k * self.own + project)
        prompt = is_prompt(tokens, k, used)
        return Work(
            moved=self.bases_used(used) * basis / tokens + own,
            mix=count * used / tokens * (self.terms or m) * each,
            evaluate=count * used / tokens * each,
            project=0 if prompt else count * k * each,
            prompt=count * k * each if prompt else 0,
            multiply=k * self.own,
        )


def is_prompt(tokens: int, k: int, used: float) -> bool:
    """Whether a call with ``used`` experts, ``k`` for each token, is computed as a prompt (mobe-cpu.c's rule)."""
    return tokens >= 4 and 2 * k * tokens >= 3 * used


def size(quant: str, row: int) -> float:
    """Bytes per number in rows of length ``row``, in ``quant`` or the type that replaces it."""
    return ggml.type_info(fitting_type(quant, row)).bits / 8


SHAPES = {
    "qwen3-30b": Shape(n=128, k=8, d=2048, p=768, m=32, heads=32, kv_heads=4),
    "deepseek-v2-lite": Shape(n=64, k=6, d=2048, p=1408, m=4, heads=16, kv_heads=16),
    "deepseek-v3": Shape(n=256, k=8, d=7168, p=2048, m=64, heads=56, kv_heads=8),
    # a quarter of the experts: a token costs the same, and the file fits beside another in memory
    "deepseek-v3-64": Shape(n=64, k=8, d=7168, p=2048, m=64, heads=56, kv_heads=8),
    # for trying a benchmark out
    "small": Shape(n=16, k=4, d=512, p=256, m=4, heads=4, kv_heads=2),
}


#: Few wide bases without an activation: the fields of a Shape at which gate and up keep about 62.5 % of their parameters.
WIDE = {
    "qwen3-30b": {"activation": "none", "m": 2, "rank": 1280},
    "deepseek-v2-lite": {"activation": "none", "m": 2, "rank": 1280},
    "deepseek-v3": {"activation": "none", "m": 2, "rank": 4352},
    "deepseek-v3-64": {"activation": "none", "m": 2, "rank": 4352},
    "small": {"activation": "none", "m": 2, "rank": 256},
}

#: Types of fewer bits, for an ordinary file of a factorized one's size; largest first.
SMALLER = ("q4_k", "iq4_xs", "q3_k", "iq3_s", "iq3_xxs", "q2_k", "iq2_s", "iq2_xs", "iq2_xxs")


def fewer_bits(file: Path, plain: Path, quant: str) -> str:
    """The type in which the plain model's size is nearest to that of ``file``."""
    bits = ggml.type_info(quant).bits * file.stat().st_size / plain.stat().st_size
    return min(SMALLER, key=lambda name: abs(ggml.type_info(name).bits - bits))


def write(path: Path, shape: Shape, quant: str, layers: int, factorized: bool) -> Path:
    """Write one model with matrices of the type ``quant``; returns ``path``.

    For rows that are no multiple of the type's block, llama-quantize's replacement is taken.  An existing file is kept,
    so its name must identify its contents.
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
    _add_tokenizer(writer, gguf.TokenType)
    if factorized:
        version = names.MOBE_VERSION_DOWN if shape.down else names.MOBE_VERSION
        add_mobe_keys(writer, arch, version, shape.activation, groups=1)
    tensors = list(_tensors(shape, quant, layers, factorized))
    for name, dims, type_name, _ in tensors:
        code = gguf.GGMLQuantizationType[type_name.upper()]
        n_bytes = ggml.type_info(type_name).tensor_bytes(dims)
        writer.add_tensor_info(name, dims, np.dtype(np.float32), n_bytes, raw_dtype=code)
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


def _add_tokenizer(writer, kinds) -> None:
    """Add meaningless tokens, because llama-server must write what it generates as text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    rest = VOCABULARY - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"w{i}" for i in range(rest))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([*types, *[kinds.NORMAL] * rest])


def _tensors(shape: Shape, quant: str, layers: int, factorized: bool):
    """``(name, dims with the row last, type, standard deviation)`` of every tensor."""
    n, d, p, m, r = shape.n, shape.d, shape.p, shape.m, shape.r

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
            scale = row**-0.5 * (SMALL if name == "output" else 1)
            yield f"{block}.attn_{name}.weight", (rows, row), fitting_type(quant, row), scale
        yield f"{block}.ffn_gate_inp.weight", (n, d), "f32", d**-0.5
        for projection in names.PROJECTIONS:
            if not factorized:
                kind = fitting_type(shape.experts or quant, d)
                yield f"{block}.ffn_{projection}_exps.weight", (n, p, d), kind, d**-0.5
                continue
            yield names.transform_name(layer, projection), (n, p, r), fitting_type(quant, r), (r * d) ** -0.5
            yield names.basis_name(layer, projection), (m, r, d), fitting_type(quant, d), 1.0
            yield names.mix_name(layer, projection), (n, m), "f32", m**-0.5
        if factorized and shape.down:
            yield (
                names.transform_name(layer, "down"),
                (n, r, p),
                fitting_type(quant, p),
                SMALL * (p * r) ** -0.5,
            )
            yield names.basis_name(layer, "down"), (m, d, r), fitting_type(quant, r), 1.0
            yield names.mix_name(layer, "down"), (n, m), "f32", m**-0.5
            continue
        kind = fitting_type((not factorized and shape.experts) or quant, p)
        yield f"{block}.ffn_down_exps.weight", (n, d, p), kind, SMALL * p**-0.5


def _matrix(
    dims: tuple[int, ...], type_name: str, scale: float | None, seed: int, shape: Shape
) -> np.ndarray:
    """The bytes of one tensor, or of one expert or basis in it."""
    if scale is None:
        return np.ones(dims, np.float32)
    rng = np.random.default_rng(seed)
    rows = dims[-2:]
    drawn = min(rows[0], ROWS) if len(dims) == 3 and rows[0] % ROWS == 0 else rows[0]
    values = rng.standard_normal((drawn, rows[1]), dtype=np.float32) * np.float32(scale)
    if shape.terms is not None and type_name == "f32" and dims == (shape.n, shape.m):
        kept = np.argsort(rng.random(dims), axis=1)[:, : shape.terms]
        mask = np.zeros(dims, np.float32)
        np.put_along_axis(mask, kept, 1.0, axis=1)
        values *= mask
    if type_name == "f32":
        return values
    encoded = ggml.quantize(values, type_name, name="random", imatrix=np.ones(rows[-1], np.float32))
    return np.tile(encoded, (rows[0] // drawn, 1)) if drawn < rows[0] else encoded


def plain(directory: Path, name: str, quant: str, layers: int, experts: str | None = None) -> Path:
    """The ordinary model, written if it is not there; ``experts``: another type for its experts."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (f"{name}-{layers}l-{quant}" + (f"-experts-{experts}" if experts else "") + ".gguf")
    return write(path, replace(SHAPES[name], experts=experts), quant, layers, factorized=False)


def pair(directory: Path, name: str, quant: str, layers: int, **changes) -> tuple[Path, Path]:
    """The ordinary model and the factorized one, written if they are not there; ``changes``: fields of Shape."""
    shape = replace(SHAPES[name], **changes)
    suffix = "".join(
        f"-{key}" if value is True else f"-{key}-{value}"
        for key, value in changes.items()
        if value != getattr(SHAPES[name], key)
    )
    ordinary = plain(directory, name, quant, layers)
    path = directory / f"{name}-{layers}l-{quant}-mobe{suffix}.gguf"
    return ordinary, write(path, shape, quant, layers, factorized=True)


def rest(directory: Path, name: str, quant: str, layers: int) -> Path:
    """The ordinary model with one small expert per token: its time is that of attention, norms and output."""
    directory.mkdir(parents=True, exist_ok=True)
    shape = replace(SHAPES[name], n=2, k=1, p=256)
    return write(directory / f"{name}-{layers}l-{quant}-rest.gguf", shape, quant, layers, factorized=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--quant", default="q4_k")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--terms", type=int)
    parser.add_argument("--bases", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--activation", choices=names.ACTIVATIONS, default="tanh")
    parser.add_argument("--down", action="store_true", help="factorize down too")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    changes = {
        "terms": options.terms, "activation": options.activation, "down": options.down, "rank": options.rank,
        "m": options.bases or SHAPES[options.shape].m,
    }  # fmt: skip
    for path in pair(options.out, options.shape, options.quant, options.layers, **changes):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program(main)
