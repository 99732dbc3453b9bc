"""The final report of compress: the result beside the original and plain files of about its size."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mobe_gguf.compress.pipeline import Result
from mobe_gguf.compress.wishes import MOBE, PLAIN
from mobe_gguf.core.files import describe_size
from mobe_gguf.core.progress import duration
from mobe_gguf.evaluate.report import with_error

#: Labels of our rows.
LABELS = {PLAIN: "plain, rounded by moments", MOBE: "MoBE, rounded by moments"}


def page(result: Result) -> RenderableType:
    """The table, why this file was chosen, and how to run it; fits 100 columns."""
    parts: list[RenderableType] = []
    if result.rows:
        parts += [table(result), Text(), Text(comparison(result))]
    parts.append(Text(f"{result.out}: the {_kind(result)} file; {result.why}."))
    if result.card:
        parts.append(Text(result.card))
    parts.append(Text("Time: " + ", ".join(f"{n} {duration(s)}" for n, s in result.seconds.items())))
    parts.append(Text(run_line(result)))
    return Group(*parts)


def _kind(result: Result) -> str:
    return {PLAIN: "plain", MOBE: "factorized"}.get(result.kind, f"plain {result.kind}, llama-quantize's")


def run_line(result: Result) -> str:
    """How to run the file."""
    needs = " (it needs the llama.cpp of mobe-gguf build)" if result.kind == MOBE else ""
    return f"To run it{needs}:\n  llama-cli -m {result.out}"


def table(result: Result) -> Table:
    """The original first, then all files by decreasing size."""
    out = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
    out.add_column("file", overflow="fold")
    for column in ("size", "KL divergence", "top-1", "perplexity", "tokens/s"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_row(
        "original, 16 bits",
        describe_size(result.original),
        "",
        "",
        f"{result.perplexity:.3f}",
        _speed(result, "original"),
    )
    for name, row in sorted(result.rows.items(), key=lambda item: -item[1].facts.n_bytes):
        d = row.divergence
        label = LABELS.get(name, f"{name}, llama-quantize with imatrix")
        out.add_row(
            Text(label + (" <- OUT" if name == result.kind else "")),
            describe_size(row.facts.n_bytes),
            with_error(d.kl),
            f"{d.top1.value:.1%}",
            f"{d.perplexity.value:.3f}",
            _speed(result, name),
            style="bold" if name == result.kind else None,
        )
    return out


def _speed(result: Result, name: str) -> str:
    return f"{result.speeds[name]:.1f}" if name in result.speeds else ""


def comparison(result: Result) -> str:
    """Compare the result's KL divergence and speed with each rival of its size or up to a tenth larger."""
    ours = result.rows[result.kind]
    size, kl = ours.facts.n_bytes, ours.divergence.kl.value
    others = {name: row for name, row in result.rows.items() if name not in (*LABELS, result.kind)}
    near = {name: row.divergence.kl.value for name, row in others.items() if row.facts.n_bytes >= 0.98 * size}
    if not near:
        return "No plain file of llama-quantize's is of this size."
    better = ", ".join(name for name, value in near.items() if value <= kl)
    best = min(near, key=lambda name: near[name])
    said = f"KL divergence {kl / near[best]:.2f} times that of the best ({best})"
    if better:
        return f"Of {len(near)} plain files of this size or up to a tenth larger, {better} have less KL divergence; {said}."
    return (
        f"Less KL divergence than all {len(near)} plain files of this size or up to a tenth larger; {said}."
    )


def as_json(result: Result) -> dict[str, Any]:
    """The same as numbers."""
    return {
        "out": str(result.out),
        "kind": result.kind,
        "why": result.why,
        "card": result.card,
        "seconds": result.seconds,
        "original": {
            "bytes": result.original,
            "perplexity": result.perplexity,
            "tokens_per_second": result.speeds.get("original"),
        },
        "files": [
            {
                "name": name,
                "bytes": row.facts.n_bytes,
                "kl": row.divergence.kl.value,
                "kl_error": row.divergence.kl.error,
                "top1": row.divergence.top1.value,
                "perplexity": row.divergence.perplexity.value,
                "tokens_per_second": result.speeds[name],
            }
            for name, row in result.rows.items()
        ],
    }
