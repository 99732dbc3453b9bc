"""Small GGUF files made of numbers alone: no Hugging Face model, no exporter, the same bytes on every machine.

    file = qwen3moe()                       # or llama(): an ordinary model
    factorize(file, rank=32, n_basis=4)     # gate and up experts become random factors
    file.tensors["blk.0.ffn_up_basis.mix"] = ...    # break it
    file.write(path)

The values come from PCG64's raw output, which numpy never changes, and not from numpy's distributions, which it may.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mobe_gguf.core import names

D, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2
FF, EXPERTS, USED, FF_EXP = 96, 8, 2, 48

#: Merges of the tokenizer, beside one token a byte and the end of text.
MERGES = ("Ġ t", "h e", "Ġt he", "i n", "a n", "an d", "Ġ and", "e r")


@dataclass
class GgufFile:
    """``keys`` and ``tensors`` in the order of the file; arrays in C order, so the last axis is ggml's ne0."""

    arch: str
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 over keys and tensors, whatever the layout of the file."""
        parts = [self.arch, repr(self.keys)]
        parts += [f"{n} {a.dtype} {a.shape} {a.tobytes().hex()}" for n, a in self.tensors.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def write(self, path: Path) -> Path:
        """Write the file as it stands, sense or nonsense; returns ``path``."""
        import gguf

        writer = gguf.GGUFWriter(path, self.arch)
        for key, value in self.keys.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
            else:
                writer.add_array(key, value)
        for name, array in self.tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def uniform(seed: int, *shape: int, std: float = 1.0) -> np.ndarray:
    """float32 ``shape``, evenly distributed with standard deviation ``std``."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((raw >> 40) / 2.0**23 - 1.0).reshape(shape).astype(np.float32) * np.float32(std * 3**0.5)


def llama() -> GgufFile:
    """A dense model of the architecture ``llama``."""
    file = _transformer("llama")
    file.keys["llama.feed_forward_length"] = FF
    file.keys["llama.rope.dimension_count"] = HEAD_DIM
    for layer in range(LAYERS):
        for i, (name, rows, columns) in enumerate((("gate", FF, D), ("up", FF, D), ("down", D, FF))):
            weight = uniform(1000 + 10 * layer + i, rows, columns, std=columns**-0.5)
            file.tensors[f"blk.{layer}.ffn_{name}.weight"] = weight
    return file


def qwen3moe() -> GgufFile:
    """A mixture of experts of the architecture ``qwen3moe``."""
    file = _transformer("qwen3moe")
    file.keys |= {
        "qwen3moe.feed_forward_length": FF,
        "qwen3moe.expert_feed_forward_length": FF_EXP,
        "qwen3moe.expert_count": EXPERTS,
        "qwen3moe.expert_used_count": USED,
    }
    for layer in range(LAYERS):
        block, seed = f"blk.{layer}", 2000 + 10 * layer
        file.tensors[f"{block}.attn_q_norm.weight"] = 1 + uniform(seed, HEAD_DIM, std=0.1)
        file.tensors[f"{block}.attn_k_norm.weight"] = 1 + uniform(seed + 1, HEAD_DIM, std=0.1)
        file.tensors[f"{block}.ffn_gate_inp.weight"] = uniform(seed + 2, EXPERTS, D, std=D**-0.5)
        for i, (name, rows, columns) in enumerate(
            (("gate", FF_EXP, D), ("up", FF_EXP, D), ("down", D, FF_EXP))
        ):
            weight = uniform(seed + 3 + i, EXPERTS, rows, columns, std=columns**-0.5)
            file.tensors[f"{block}.ffn_{name}_exps.weight"] = weight
    return file


def factorize(
    file: GgufFile,
    *,
    rank: int = 32,
    n_basis: int = 4,
    n_group: int = 1,
    activation: str = "tanh",
    by_row: bool = False,
    projections: tuple[str, ...] = names.PROJECTIONS,
) -> GgufFile:
    """Replace experts of all layers by random factors, and set the keys; returns ``file``."""
    for layer in range(LAYERS):
        for projection in projections:
            seed, down = 3000 + 10 * layer + 3 * names.ALL_PROJECTIONS.index(projection), projection == "down"
            transform, basis = ((rank, FF_EXP), (D, rank)) if down else ((FF_EXP, rank), (rank, D))
            mix_shape = (EXPERTS, n_basis // n_group) + (basis[:1] if by_row else ())
            file.tensors |= {
                names.transform_name(layer, projection): uniform(seed, EXPERTS, *transform, std=0.05),
                names.basis_name(layer, projection): uniform(seed + 1, n_basis, *basis),
                names.mix_name(layer, projection): uniform(seed + 2, *mix_shape, std=n_basis**-0.5),
            }
    file.keys |= {
        names.key_version(file.arch): names.MOBE_VERSION + ("down" in projections),
        names.key_activation(file.arch): activation,
        names.key_group_count(file.arch): n_group,
    }
    return file


def _transformer(arch: str) -> GgufFile:
    """Everything but the feed-forward blocks."""
    file = GgufFile(arch)
    tokens = [*_byte_symbols(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    file.keys = {
        "general.name": f"small {arch}",
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": D,
        f"{arch}.block_count": LAYERS,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": HEAD_DIM,
        f"{arch}.attention.value_length": HEAD_DIM,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    shapes = {
        "token_embd.weight": (len(tokens), D),
        "output.weight": (len(tokens), D),
        "output_norm.weight": (D,),
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {
            f"{block}.attn_norm.weight": (D,),
            f"{block}.ffn_norm.weight": (D,),
            f"{block}.attn_q.weight": (HEADS * HEAD_DIM, D),
            f"{block}.attn_k.weight": (KV_HEADS * HEAD_DIM, D),
            f"{block}.attn_v.weight": (KV_HEADS * HEAD_DIM, D),
            f"{block}.attn_output.weight": (D, HEADS * HEAD_DIM),
        }
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            file.tensors[name] = 1 + uniform(seed, *shape, std=0.1)
        else:
            file.tensors[name] = uniform(seed, *shape, std=1.0 if "embd" in name else shape[1] ** -0.5)
    return file


def _byte_symbols() -> list[str]:
    """GPT-2's printable character for each byte, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
