"""Plain files of about the same size, as llama-quantize makes them with an importance matrix: what a result has to beat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError
from mobe_gguf.evaluate import tool
from mobe_gguf.export import ExportOptions, ExportRequest, Recipe, write_model
from mobe_gguf.plan.forms import plain_form
from mobe_gguf.plan.layout import Layout

#: Plain types by falling size: rivals, and what gives all but the experts its type where a size is asked for.
QUANTS = (
    "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "iq3_s", "iq3_xxs", "q2_k", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m",
)  # fmt: skip
#: How much larger than the result a rival may be.
LARGER = 1.10
#: Tokens that the speed is measured on, and runs.
TOKENS, RUNS = 64, 3


@dataclass(frozen=True)
class Rival:
    """A plain file; ``name`` as llama-quantize calls the mixture."""

    name: str
    path: Path


def around(layout: Layout, size: int) -> list[str]:
    """The types whose file is up to LARGER as large, and the next smaller: at most three."""
    sizes = {quant: plain_form(layout, quant).n_bytes for quant in QUANTS}
    larger = [quant for quant in QUANTS if size < sizes[quant] <= size * LARGER]
    smaller = [quant for quant in QUANTS if sizes[quant] <= size]
    chosen = larger[-2:] + smaller[: 3 - len(larger[-2:])]
    return chosen or [min(sizes, key=lambda quant: abs(sizes[quant] - size))]


def imatrix(original: Path, texts: Sequence[Path], out: Path, ctx: int, chunks: int | None) -> None:
    """llama-imatrix over the first text that is plain; MobeError if it fails."""
    text = next((path for path in texts if path.suffix != ".jsonl"), None)
    if text is None:
        raise MobeError(
            "rivals need an importance matrix, and llama-imatrix reads plain text alone: give one --text that is no .jsonl, or --no-rivals"
        )
    more = ("-c", str(ctx), *(() if chunks is None else ("--chunks", str(chunks))))
    with atomic_path(out) as part:
        done = tool.run("llama-imatrix", "-m", str(original), "-f", str(text), "-o", str(part), *more)
        if not part.is_file() or part.stat().st_size == 0:
            raise done.failure(f"llama-imatrix -m {original} wrote nothing:")


def write(model: Path, out: Path, quant: str, imatrix_file: Path) -> None:
    """What llama-quantize makes of the model: the same types, chosen and encoded by the importance matrix."""
    options = ExportOptions(dense=True, allow_dense=True, quiet=True)
    write_model(ExportRequest(model, out, Recipe(quant, imatrix=(str(imatrix_file),)), options))


def speed(path: Path, threads: int | None) -> float:
    """Tokens a second of writing, by llama-bench; MobeError if it gives none."""
    arguments: tuple[str, ...] = (
        "-m",
        str(path),
        "-p",
        "0",
        "-n",
        str(TOKENS),
        "-r",
        str(RUNS),
        "-o",
        "json",
    )
    arguments += () if threads is None else ("-t", str(threads))
    done = tool.run("llama-bench", *arguments)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return float(found[0]["avg_ts"])
    except (ValueError, LookupError, TypeError) as e:
        raise done.failure(f"llama-bench -m {path} gave no speed:") from e
