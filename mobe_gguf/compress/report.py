"""What compress ends with: the result beside plain files of about its size."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mobe_gguf.compress.pipeline import Result
from mobe_gguf.core.files import describe_size

#: What the rows are called: ours, by what they are.
LABELS = {"plain": "plain, rounded by moments", "mobe": "MoBE, rounded by moments"}


def page(result: Result) -> RenderableType:
    """Table, why, and how to run it; fits 100 columns."""
    parts: list[RenderableType] = []
    if result.rows:
        parts += [_table(result), Text()]
    parts.append(
        Text(f"{result.out}: the {'factorized' if result.kind == 'mobe' else 'plain'} file; {result.why}.")
    )
    parts.append(
        Text("Time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items()))
    )
    parts.append(Text(f"To run it:\n  llama-cli -m {result.out}"))
    return Group(*parts)


def _table(result: Result) -> Table:
    table = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("file", overflow="fold")
    for column in ("size", "KL divergence", "top-1", "perplexity", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in sorted(result.rows, key=lambda row: row.facts.n_bytes):
        name = result.names[row.facts.path.name]
        ours = name in LABELS
        table.add_row(
            Text(
                LABELS.get(name, f"{name}, llama-quantize's with imatrix")
                + (" <- OUT" if name == result.kind else "")
            ),
            describe_size(row.facts.n_bytes),
            f"{row.divergence.kl.value:.5f} ± {row.divergence.kl.error:.5f}",
            f"{row.divergence.top1.value:.1%}",
            f"{row.divergence.perplexity.value:.3f}",
            f"{result.speeds[name]:.1f}",
            style="bold" if ours else None,
        )
    return table


def as_json(result: Result) -> dict[str, Any]:
    """The same as numbers."""
    return {
        "out": str(result.out),
        "kind": result.kind,
        "why": result.why,
        "seconds": result.seconds,
        "files": [
            {
                "name": result.names[row.facts.path.name],
                "bytes": row.facts.n_bytes,
                "kl": row.divergence.kl.value,
                "kl_error": row.divergence.kl.error,
                "top1": row.divergence.top1.value,
                "perplexity": row.divergence.perplexity.value,
                "tokens_per_second": result.speeds[result.names[row.facts.path.name]],
            }
            for row in result.rows
        ],
    }
