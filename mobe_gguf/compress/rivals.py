"""Rivals of the result: plain files of about the same size, made by llama-quantize with an importance matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.progress import bar
from mobe_gguf.evaluate import tool
from mobe_gguf.plan.forms import plain_form
from mobe_gguf.plan.layout import Layout

#: llama-quantize's mixtures.
QUANTS = (
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s",
    "iq3_xs", "iq3_xxs", "q2_k", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
)  # fmt: skip
#: By decreasing size: ``--quant`` values for all tensors except experts, if a size is asked for.
LADDER = (
    "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "iq3_s", "iq3_xxs", "q2_k", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m",
)  # fmt: skip
#: How much larger than the result a rival may be.
LARGER = 1.10
#: How many smaller rivals are made, the largest ones first.
SMALLER = 1
#: The importance matrix is gathered from at least this many chunks, and from this many tokens per expert on average.
#: Measured on the shipped model with 32 chunks and with all 180, KL divergence on 24 chunks: q3_k_m 0.0068 and 0.0068,
#: iq3_s 0.0103 and 0.0104, q2_k 0.0236 and 0.0237, each ± 2 %.
LEAST_CHUNKS, LEAST_TOKENS = 64, 2000
#: Bytes of text per token, to take a part of each file.
TOKEN_BYTES = 4
#: More layers than any model has.
ALL = "999"
#: Tokens for measuring speed, the least and the largest number of runs, and the seconds for a file that more runs may take.
TOKENS, RUNS, MOST_RUNS, ENOUGH = 64, 3, 25, 0.5


@dataclass(frozen=True)
class Rival:
    """A plain file; ``name`` as llama-quantize calls the mixture."""

    name: str
    path: Path


def around(layout: Layout, size: int) -> list[str]:
    """All mixtures whose file is up to LARGER times ``size``, and the next smaller ones, by decreasing size."""
    sizes = {quant: plain_form(layout, quant).n_bytes for quant in QUANTS}
    by_size = sorted(QUANTS, key=lambda quant: -sizes[quant])
    larger = [quant for quant in by_size if size < sizes[quant] <= size * LARGER]
    chosen = larger + [quant for quant in by_size if sizes[quant] <= size][:SMALLER]
    return chosen or [min(sizes, key=lambda quant: abs(sizes[quant] - size))]


def enough_chunks(layout: Layout, ctx: int) -> int:
    """Chunks of ``ctx`` tokens that an importance matrix of the model needs."""
    tokens = LEAST_TOKENS * layout.n_expert / max(1, layout.n_expert_used)
    return max(LEAST_CHUNKS, math.ceil(tokens / ctx))


def imatrix(
    original: Path,
    texts: Sequence[Path],
    out: Path,
    ctx: int,
    chunks: int,
    threads: int | None,
    placement: Sequence[str] = (),
) -> None:
    """Run llama-imatrix over ``chunks`` chunks of the plain texts; MobeError if there is none, or it fails."""
    plain = [path for path in texts if path.suffix != ".jsonl"]
    if not plain:
        raise MobeError(
            "rivals need an importance matrix, and llama-imatrix reads plain text alone: give one --text that is no .jsonl, or "
            "--no-rivals"
        )
    joined = out.with_name("imatrix.txt")
    with atomic_path(joined) as part, open(part, "wb") as file:
        share = min(1.0, chunks * ctx * TOKEN_BYTES / max(1, sum(path.stat().st_size for path in plain)))
        for path in plain:
            content = path.read_bytes()
            file.write(content[: math.ceil(share * len(content))] + b"\n")
    more = (
        "-c",
        str(ctx),
        "--chunks",
        str(chunks),
        "--no-ppl",
        *(() if threads is None else ("-t", str(threads))),
        *placement,
    )
    with bar("imatrix", 1, quiet=True) as progress, atomic_path(out) as part:
        _run(part, "llama-imatrix", "-m", str(original), "-f", str(joined), "-o", str(part), *more)
        progress.advance()


def write(original: Path, out: Path, quant: str, imatrix_file: Path) -> None:
    """Run llama-quantize on the original with the importance matrix; MobeError if it fails."""
    with atomic_path(out) as part:
        options = ("--allow-requantize", "--imatrix", str(imatrix_file))
        _run(part, "llama-quantize", *options, str(original), str(part), quant.upper())


def _run(part: Path, name: str, *arguments: str) -> None:
    """Run a program that writes ``part``; MobeError if it fails, or writes nothing."""
    done = tool.run(name, *arguments)
    if not part.is_file() or part.stat().st_size == 0:
        raise done.failure(f"{name} {' '.join(arguments)} wrote nothing:")


def speed(path: Path, threads: int | None, placement: Sequence[str] = ()) -> float:
    """Tokens per second of generation, from one run of llama-bench; MobeError if it gives none."""
    arguments: tuple[str, ...] = ("-m", str(path), "-p", "0", "-n", str(TOKENS), "-r", "1", "-o", "json")
    arguments += () if threads is None else ("-t", str(threads))
    done = tool.run("llama-bench", *arguments, *_for_bench(placement))
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return float(found[0]["avg_ts"])
    except (ValueError, LookupError, TypeError) as e:
        raise done.failure(f"llama-bench -m {path} gave no speed:") from e


def _for_bench(placement: Sequence[str]) -> list[str]:
    """llama.cpp's options that say where weights go in llama-bench's spelling: it takes numbers alone."""
    given = iter(placement)
    found = []
    for option in given:
        if option == "--cpu-moe":
            found += ["-ncmoe", ALL]
            continue
        value = next(given)
        if value != "auto":  # its default
            found += [{"--n-cpu-moe": "-ncmoe"}.get(option, option), ALL if value == "all" else value]
    return found
