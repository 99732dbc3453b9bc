"""Small whole files of every kind of factors, and how they are damaged."""

from __future__ import annotations

import functools
import random
import re
import struct

from export.test_gguf_kinds import by_layer
from parity.gguf_files import GgufFile, factorize, qwen3moe

from mobe_gguf.core.names import ALL_PROJECTIONS

#: Numbers that break arithmetic.
NASTY = (0, 1, 2, 31, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def whole() -> dict[str, GgufFile]:
    """Small files of every kind of factors."""
    return {
        "ordinary": qwen3moe(),
        "scalar": factorize(qwen3moe()),
        "by row": factorize(qwen3moe(), by_row=True),
        "groups": factorize(qwen3moe(), n_group=2),
        "linear": factorize(qwen3moe(), activation="none"),
        "down": factorize(qwen3moe(), projections=ALL_PROJECTIONS),
        "wide": factorize(qwen3moe(), activation="none", rank=56, n_basis=2, projections=ALL_PROJECTIONS),
        "mixed": mixed(),
        "by layer": by_layer(),
    }


def mixed() -> GgufFile:
    """Factors in one layer alone."""
    file, plain = factorize(qwen3moe()), qwen3moe()
    others = {name: values for name, values in file.tensors.items() if not name.startswith("blk.0.")}
    file.tensors = others | {n: v for n, v in plain.tensors.items() if n.startswith("blk.0.")}
    return file


NAMES = re.compile(rb"_basis\.weight|_basis\.mix|_exps\.weight|\.mobe\.|expert_count|expert_used_count")


@functools.cache
def _places(content: bytes, end: int) -> list[int]:
    """Where names of the factors and counts are."""
    return [found.start() for found in NAMES.finditer(content, 0, end + 20) if found.start() < end]


def damaged(content: bytes, end: int, rng: random.Random) -> bytes:
    """``content`` with its head, which ends at ``end``, changed somehow."""
    kind = rng.random()
    if kind < 0.15:
        return content[: rng.choice((rng.randrange(len(content)), rng.randrange(end)))]
    changed = bytearray(content)
    if kind < 0.55:
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(end)] = rng.randrange(256)
    elif kind < 0.8:
        form, size = rng.choice((("<I", 4), ("<Q", 8)))
        at = rng.randrange(end - size)
        struct.pack_into(form, changed, at, rng.choice(NASTY) % (1 << 8 * size))
    else:  # where numbers of the factors are: behind their names
        places = _places(content, end)
        if places:
            at = min(end - 8, rng.choice(places) + rng.randint(8, 60))
            struct.pack_into("<Q", changed, at, rng.choice((*NASTY, *range(3, 130, 7))))
    return bytes(changed)
