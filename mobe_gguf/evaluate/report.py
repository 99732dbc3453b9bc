"""Rows as a table and as JSON."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mobe_gguf.evaluate.facts import Facts
from mobe_gguf.evaluate.measure import EvalSettings, Row
from mobe_gguf.evaluate.parse import Estimate

#: Digits of a KL divergence.  A file against itself has up to 1e-6 (the shipped model, see ``measure.FIXED``), so a
#: sixth digit means nothing.
FLOOR_DIGITS = 5


#: Columns to leave out if the table is too wide, in this order.
DISPENSABLE = ("99 %", "median", "Δp", "ratio", "top-1")


def table(
    reference: Facts, rows: Sequence[Row], text: Path, settings: EvalSettings, width: int | None = None
) -> RenderableType:
    """The reference first, then the files in the given order.  Names are never cut: if the table is wider than
    ``width``, some columns of numbers are left out."""
    names = short_names([reference.path, *(row.facts.path for row in rows)])
    unit, name = (
        (1e9, "GB") if max(f.n_bytes for f in (reference, *(r.facts for r in rows))) >= 1e10 else (1e6, "MB")
    )
    first = rows[0].divergence.reference.value if rows else math.nan
    lines = [_cells(reference, None, unit) | {"PPL": f"{first:.3f}"}]
    lines += [_cells(row.facts, row, unit) for row in rows]
    columns = [c for c in lines[-1] if c != "form" or any(row.facts.factorized for row in rows)]
    for column in DISPENSABLE:
        if width is None or _width(names, lines, columns) <= width:
            break
        columns.remove(column)
    out = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
    out.add_column("file", no_wrap=True, overflow="fold")
    for column in columns:
        title = name if column == "size" else column
        out.add_column(title, justify="left" if column == "form" else "right", no_wrap=True)
    for line, label, facts in zip(lines, names, (reference, *(row.facts for row in rows)), strict=True):
        cells = (line.get(column, "") for column in columns)
        out.add_row(Text(label), *cells, style="bold" if facts.factorized else None)
    said = legend(rows, text, settings)
    return Group(out, "", Text(said if width else textwrap.fill(said, 100)))


def _cells(facts: Facts, row: Row | None, unit: float) -> dict[str, str]:
    """The cells of a line by column, in order."""
    cells = {
        "form": "MoBE" if facts.factorized else "plain",
        "size": f"{facts.n_bytes / unit:.2f}",
        "bits": f"{facts.bits_per_original_weight:.2f}",
    }
    if row is None:
        return cells
    d = row.divergence
    return (
        cells
        | {
            "KL divergence": with_error(d.kl),
            "median": decimal(d.percentiles["Median"], 4),
            "99 %": decimal(d.percentiles["99.0%"], 3),
            "top-1": f"{d.top1.value:.1%}",
            "Δp": f"{d.delta_p.value:.1%}",
            "PPL": f"{d.perplexity.value:.3f}",
            "ratio": f"{d.ratio.value:.4f}",
        }
        | ({"experts": f"{mean_kept(row):.1%}"} if row.kept else {})
    )


def mean_kept(row: Row) -> float:
    """Share of tokens that keep all their experts, mean over layers."""
    return sum(row.kept.values()) / len(row.kept)


def _width(names: Sequence[str], lines: Sequence[dict[str, str]], columns: Sequence[str]) -> int:
    """Width of the table in characters, with two between columns."""
    widest = (max(len(column), *(len(line.get(column, "")) for line in lines)) for column in columns)
    return max(map(len, names)) + sum(2 + w for w in widest)


def legend(rows: Sequence[Row], text: Path, settings: EvalSettings) -> str:
    """What the columns mean, and what they were measured on."""
    on = f" ({rows[0].scored} tokens of {rows[0].chunks} chunks of {settings.ctx})" if rows else ""
    return (
        "bits: of tensors in the file, for each of the original's weights. KL divergence from the first file, in nats: mean per token of "
        f"{text.name}{on}, median and 99th percentile. top-1: how often the likeliest token is the same. Δp: change of "
        "the next token's probability, root mean square. ratio: of perplexities." + _legend_of_experts(rows)
    )


def _legend_of_experts(rows: Sequence[Row]) -> str:
    if not any(row.kept for row in rows):
        return ""
    said = " experts: tokens that are sent to the same experts, mean over layers"
    for row in rows:
        least = min(row.kept, key=lambda layer: row.kept[layer])
        said += f"; {row.facts.path.name}: least in layer {least}, {row.kept[least]:.1%}"
    return said + "."


def sentence(reference: Facts, row: Row, text: Path) -> str:
    """The measured values of one file in a sentence, for its card."""
    d = row.divergence
    return (
        f"KL divergence {with_error(d.kl)} from {reference.path.name}, same likeliest token {d.top1.value:.1%}, "
        f"perplexity {d.perplexity.value:.3f} ({d.ratio.value:.4f} of the original's), on {row.scored} tokens of {text.name}."
    )


def decimal(value: float, digits: int) -> str:
    """``value`` with ``digits`` decimals; ``0.00`` instead of ``-0.00`` for the smallest negative numbers."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def with_error(estimate: Estimate) -> str:
    """``0.0240 ± 0.0012``: two digits of the standard error, and as many of the value."""
    digits = 4
    if math.isfinite(estimate.error) and 0 < estimate.error < 1:
        digits = min(FLOOR_DIGITS, max(2, 1 - math.floor(math.log10(estimate.error))))
    return f"{decimal(estimate.value, digits)} ± {decimal(estimate.error, digits)}"


def short_names(paths: Sequence[Path]) -> list[str]:
    """File names without ``.gguf``, with their directories if the names alone are not distinct."""
    plain = [path.name for path in paths]
    if len(set(plain)) < len(set(paths)):
        absolute = [str(path.absolute()) for path in paths]
        plain = [
            os.path.relpath(path, os.path.commonpath([os.path.dirname(p) for p in absolute]))
            for path in absolute
        ]
    return [name.removesuffix(".gguf") for name in plain]


def as_json(reference: Facts, rows: Sequence[Row], text: Path, settings: EvalSettings) -> dict[str, Any]:
    """For ``--json``: plain values only; NaN and infinity become null."""
    return {
        "reference": _facts(reference)
        | {"perplexity": _estimate(rows[0].divergence.reference) if rows else None},
        "text": str(text),
        "ctx": settings.ctx,
        "chunks": rows[0].chunks if rows else None,
        "tokens_evaluated": rows[0].scored if rows else None,
        "files": [_row(row) for row in rows],
    }


def _row(row: Row) -> dict[str, Any]:
    d = row.divergence
    estimates = {
        "kl_divergence": d.kl,
        "perplexity": d.perplexity,
        "perplexity_ratio": d.ratio,
        "top1_agreement": d.top1,
        "rms_delta_p": d.delta_p,
    }
    return (
        _facts(row.facts)
        | {name: _estimate(value) for name, value in estimates.items()}
        | {
            "kl_percentiles": {_key(name): _number(value) for name, value in d.percentiles.items()},
            "seconds": round(row.seconds, 3),
        }
        | (
            {"experts_kept": {str(layer): _number(share) for layer, share in row.kept.items()}}
            if row.kept
            else {}
        )
    )


def _facts(facts: Facts) -> dict[str, Any]:
    return {
        "path": str(facts.path),
        "architecture": facts.arch,
        "factorized": facts.factorized,
        "bytes": facts.n_bytes,
        "parameters": facts.n_params,
        "original_parameters": facts.original_params,
        "bits_per_weight": round(facts.bits_per_weight, 4),
        "bits_per_original_weight": round(facts.bits_per_original_weight, 4),
    }


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {"value": _number(estimate.value), "standard_error": _number(estimate.error)}


def _number(value: float) -> float | None:
    # fractions were computed from percent: 0.8848000000000001 is no more exact than 0.8848
    return round(value, 9) if math.isfinite(value) else None


def _key(label: str) -> str:
    """``99.0%`` -> ``99``, ``Median`` -> ``median``."""
    return label.removesuffix("%").removesuffix(".0").lower()
