"""A page of every kind of section, with names that are long, odd or hostile, of a model with many layers."""

from __future__ import annotations

import math

from mobe_gguf.evaluate.page.data import (
    Bars,
    Cell,
    ChartBar,
    Command,
    Commands,
    Dot,
    Figure,
    FileText,
    Generation,
    Generations,
    HeatMap,
    Line,
    Lines,
    Page,
    PageTable,
    Scatter,
    Section,
    Token,
)

HOSTILE = "<script>alert('x')</script>&\"{{ 7 * 7 }}"


def dots(n: int) -> list[Dot]:
    """On a falling curve, some in a bunch, one with a long name, one that cannot be drawn."""
    found = [
        Dot(f"model-q{i}_k", 3.0 + 0.22 * i * (1 if i % 3 else 0.97), 0.05 * 0.8**i, ("plain", "MoBE")[i % 2], 0.002 * 0.8**i)
        for i in range(n)
    ]  # fmt: skip
    found.append(Dot("model-of-a-very-long-name-128x3b-instruct-2507-iq4_xs", 4.1, 0.006, "plain", 0.0, True))
    return [*found, Dot("model-same", 9.0, 0.0, "plain"), Dot("model-nan", 9.0, math.nan, "plain")]


def page(layers: int = 94, n: int = 16) -> Page:
    kinds = ("gate", "up", "down", "shared experts", "attention")
    columns = [str(i) for i in range(layers)]
    cells = [
        [Cell(2 + (i * k) % 5, f"layer {i}", k < 2) if (i + k) % 7 else None for i in range(layers)]
        for k in range(len(kinds))
    ]
    lines = [
        Line(kind, [(i, 0.01 + 0.001 * ((i * k) % 9)) for i in range(layers)]) for k, kind in enumerate(kinds)
    ]
    left = [Token(" and"), Token(f" he{HOSTILE}", "part"), Token(" said\n", "own")]
    generation = Generation(
        "In the beginning", FileText("a.gguf", left, [("␣and", 0.5)]), FileText("b" * 60, left[:2]), 1
    )
    sections = [
        Section("quality", "Quality and size", "Note.", Scatter("file size, MB", "KL divergence, nats per token", dots(n)), PageTable(["file", "MB"], [[d.label, f"{d.x:.2f}"] for d in dots(n)], [n])),
        Section("bits", "Bits and form", "Note.", HeatMap(kinds, columns, cells, "bits", "layers and projections with a long name", "factorized"), PageTable(["where", "bits"], [[c, "4"] for c in columns])),
        Section("errors", "Error by layer", "Note.", Lines("layer", "relative squared error", lines, True)),
        Section("sizes", "Sizes", "Note.", Bars(kinds, [ChartBar("original" * 12, [5, 4, 3, 2, 1]), ChartBar("b", [1, 0, 1, 0, 0.001])], "GB")),
        Section("texts", "What they write", "Note.", Generations([generation])),
        Section("commands", HOSTILE, HOSTILE, Commands([Command("Run:", "llama-cli -m " + "x" * 300)])),
    ]  # fmt: skip
    return Page(
        f"title {HOSTILE}",
        HOSTILE,
        [Figure("size", "3.47 MB", "of 15.87")] * 5,
        sections,
        [("text", HOSTILE)],
    )
