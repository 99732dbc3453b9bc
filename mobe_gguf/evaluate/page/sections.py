"""The sections of a page; each shows measurements or the contents of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mobe_gguf import __version__
from mobe_gguf.core import names
from mobe_gguf.evaluate.facts import Facts
from mobe_gguf.evaluate.measure import Row
from mobe_gguf.evaluate.page import charts, files, texts
from mobe_gguf.evaluate.page.data import (
    Bars,
    Cell,
    ChartBar,
    Command,
    Commands,
    Dot,
    Figure,
    Generations,
    HeatMap,
    Line,
    Lines,
    Page,
    PageTable,
    Scatter,
    Section,
)  # fmt: skip
from mobe_gguf.evaluate.report import decimal, with_error
from mobe_gguf.formats.gguf import read_model
from mobe_gguf.formats.moments import Moments

#: Columns of the picture of routed tokens; if there are more experts, each column is a group of them.
GROUPS = 24
#: An expert that saw fewer tokens than this share of the layer's mean counts as rarely used.
RARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a command measured: the original, the other files, and the name and ``series`` of each.

    ``chosen``: the index of the file that the page is about.  ``speeds``: tokens per second of each, where measured.
    """

    reference: Facts
    rows: Sequence[Row]
    labels: Sequence[str]
    series: Sequence[str]
    text: Path
    chosen: int = 0
    speeds: Sequence[float | None] = field(default_factory=tuple)

    @property
    def unit(self) -> tuple[float, str]:
        return (1e9, "GB") if max(row.facts.n_bytes for row in self.rows) >= 1e10 else (1e6, "MB")


def quality(measured: Measured) -> Section:
    """KL divergence against size, all files."""
    scale, unit = measured.unit
    dots = [
        Dot(label, row.facts.n_bytes / scale, row.divergence.kl.value, series, row.divergence.kl.error, i == measured.chosen)
        for i, (row, label, series) in enumerate(zip(measured.rows, measured.labels, measured.series, strict=True))
    ]  # fmt: skip
    best = [dot.label for dot in charts.frontier(charts.drawable(dots))]
    mine = measured.labels[measured.chosen]
    said = (
        "is on the frontier" if mine in best else "is not on the frontier: a file that is no larger is better"
    )
    scored = measured.rows[0].scored
    note = (
        f"Down and left is better. The broken line is the frontier: the files that no smaller file beats. {mine} (ringed) {said}. "
        f"KL divergence from {measured.reference.path.name}, mean over {scored} tokens of {measured.text.name}, in nats."
    )
    columns = ["file", unit, "bits/weight", "KL divergence", "99 %", "top-1", "perplexity", "ratio"]
    timed = any(speed is not None for speed in measured.speeds)
    rows, order = [], sorted(range(len(dots)), key=lambda i: measured.rows[i].facts.n_bytes)
    for i in order:
        row, d = measured.rows[i], measured.rows[i].divergence
        speed = measured.speeds[i] if timed else None
        rows.append(
            [
                measured.labels[i],
                f"{row.facts.n_bytes / scale:.2f}",
                f"{row.facts.bits_per_original_weight:.2f}",
                with_error(d.kl),
                decimal(d.percentiles["99.0%"], 3),
                f"{d.top1.value:.1%}",
                f"{d.perplexity.value:.3f}",
                f"{d.ratio.value:.4f}",
                *([f"{speed:.1f}" if speed is not None else ""] if timed else []),
            ]
        )
    table = PageTable([*columns, *(["tokens/s"] if timed else [])], rows, [order.index(measured.chosen)])
    body = Scatter(f"file size, {unit}", "KL divergence, nats per token", dots)
    return Section("quality", "Quality and size", note, body, table)


def figures(measured: Measured) -> list[Figure]:
    """The chosen file's numbers, for the top of the page."""
    row, (scale, unit) = measured.rows[measured.chosen], measured.unit
    d = row.divergence
    found = [
        Figure("size", f"{row.facts.n_bytes / scale:.2f} {unit}", f"of {measured.reference.n_bytes / scale:.2f}"),
        Figure("bits per weight", f"{row.facts.bits_per_original_weight:.2f}", "of the original's weights"),
        Figure("KL divergence", with_error(d.kl).split(" ")[0], f"± {with_error(d.kl).split(' ')[-1]} nats per token"),
        Figure("same likeliest token", f"{d.top1.value:.1%}"),
        Figure("perplexity", f"{d.perplexity.value:.3f}", f"original {d.reference.value:.3f}"),
    ]  # fmt: skip
    speed = measured.speeds[measured.chosen] if measured.speeds else None
    return found + ([] if speed is None else [Figure("tokens per second", f"{speed:.1f}", "writing")])


def bits(path: Path) -> Section | None:
    """Bits and form of each layer and kind of tensor."""
    found = files.by_layer(read_model(path))
    layers = sorted({layer for parts in found.values() for layer in parts})
    if not layers:
        return None
    cells, rows = [], []
    for kind, parts in found.items():
        line: list[Cell | None] = []
        for layer in layers:
            part = parts.get(layer)
            if part is None:
                line.append(None)
                continue
            form = f", MoBE {part.form}" if part.form else ""
            line.append(Cell(part.bits, f"layer {layer}, {kind}: {part.types}{form}, {part.bits:.2f} bits", bool(part.form)))  # fmt: skip
            rows.append([f"layer {layer}, {kind}", part.types, part.form or "plain", f"{part.bits:.2f}"])
        cells.append(line)
    factorized = any(cell is not None and cell.dotted for line in cells for cell in line)
    body = HeatMap(
        list(found), [str(layer) for layer in layers], cells, "bits", "layers",
        "factorized: shared bases and a small matrix for each expert (MoBE)" if factorized else None,
    )  # fmt: skip
    note = f"Bits that {path.name} spends for each weight of the original, by layer and kind of tensor. Stronger color: more bits."
    return Section(
        "bits", "Bits and form", note, body, PageTable(["where", "types", "form", "bits/weight"], rows)
    )


def errors(original: Path, result: Path, moments: Moments | None = None) -> Section:
    """Errors of the experts' matrices, or of their outputs if there are ``moments``."""
    found = list(files.errors(original, result, moments))
    projections = [p for p in names.ALL_PROJECTIONS if any(p == q for _, q, _ in found)]
    lines = [Line(p, [(float(layer), e) for layer, q, e in found if q == p]) for p in projections]
    what = "their outputs, by the second moments of their inputs" if moments else "their weights"
    note = (
        f"Squared error of the experts' matrices relative to their size, measured on {what}; mean of up to {files.SAMPLE} experts "
        "of each layer."
    )
    rows = [[f"layer {layer}, {projection}", f"{error:.3e}"] for layer, projection, error in found]
    return Section("errors", "Error by layer", note, Lines("layer", "relative squared error", lines, True), PageTable(["where", "error"], rows))  # fmt: skip


def routing(moments: Moments) -> Section | None:
    """How many tokens of the calibration text each expert saw."""
    rows, cells, layers = [], [], []
    names_of = sorted(
        (name for name in moments.names if ".ffn_down_exps." in name),
        key=lambda name: int(name.split(".")[1]),
    )
    for name in names_of:
        tokens = moments.tokens(name)
        if tokens is None or not int(tokens.sum()):
            continue
        layer = name.split(".")[1]
        ordered = tokens.double().sort(descending=True).values
        groups = torch.tensor_split(ordered, min(GROUPS, len(ordered)))
        mean = float(ordered.mean())
        layers.append(f"layer {layer}")
        cells.append([_routed(layer, i, group, mean) for i, group in enumerate(groups)])
        rare = int((ordered < RARE * mean).sum())
        numbers = (ordered[-1], ordered.median(), ordered[0])
        rows.append([f"layer {layer}", *(f"{int(x):,}" for x in numbers), str(rare)])
    if not rows:
        return None
    n = len(cells[0])
    body = HeatMap(layers, [str(i + 1) for i in range(n)], cells, "times the mean", "most to least used,")
    note = (
        f"Tokens of the calibration text that the router sent to each expert, in each layer from the most to the least used{_grouped(moments, names_of, n)}. "
        f"Rare: experts with less than {RARE:.0%} of the mean."
    )  # fmt: skip
    return Section("routing", "Tokens routed to each expert", note, body, PageTable(["", "least", "median", "most", "rare"], rows))  # fmt: skip


def _routed(layer: str, index: int, group: torch.Tensor, mean: float) -> Cell:
    value = float(group.mean())
    return Cell(value / mean, f"layer {layer}, place {index + 1}: {value:,.0f} tokens")


def _grouped(moments: Moments, names_of: Sequence[str], columns: int) -> str:
    tokens = moments.tokens(names_of[0])
    return "" if tokens is None or len(tokens) <= columns else f", {len(tokens)} experts in {columns} groups"


def sizes(paths: Sequence[Path]) -> Section:
    """Bytes by kind of tensor of each file."""
    found = [files.kinds(read_model(path)) for path in paths]
    labels = [label for label in files.LABELS.values() if any(kinds[label] for kinds in found)]
    largest = max(sum(kinds.values()) for kinds in found)
    scale, unit = (1e9, "GB") if largest >= 1e10 else (1e6, "MB")
    bars = [
        ChartBar(p.name, [kinds[k] / scale for k in labels]) for p, kinds in zip(paths, found, strict=True)
    ]
    rows = [[label, *(f"{kinds[label] / scale:.3f}" for kinds in found)] for label in labels]
    rows.append(["all tensors", *(f"{sum(kinds.values()) / scale:.3f}" for kinds in found)])
    table = PageTable(["kind", *(f"{path.name}, {unit}" for path in paths)], rows, [len(rows) - 1])
    return Section(
        "sizes", "Sizes by kind of tensor", "Where the bytes are.", Bars(labels, bars, unit), table
    )


def generations(found: Generations) -> Section:
    """Both files' continuations of the same prompts."""
    rows = [
        [f"prompt {i + 1}", str(text.same), str(max(len(text.left.tokens), len(text.right.tokens)))]
        for i, text in enumerate(found.texts)
    ]
    note = (
        "Both files continue the same words with the likeliest token each time. The box is the first token in which they part, "
        "with what each found likeliest there; underlined: what only one of them says after it. A small difference decides "
        "where two tokens are about as likely, so a different text is not a worse one."
    )
    table = PageTable(["", "equal tokens", "of"], rows)
    return Section("texts", "What they write", note, found, table)


def commands(found: Sequence[tuple[str, str]]) -> Section:
    """Commands, each ``(what, line)``."""
    return Section("commands", "Run and reproduce", "Lines for a shell.", Commands([Command(*each) for each in found]))  # fmt: skip


def about_file(
    original: Path, result: Path, moments: Moments | None, text: Path | None, threads: int | None, options: Sequence[str] = ()
) -> list[Section]:  # fmt: skip
    """All sections that can be made of two files and their model's moments; with a ``text`` for prompts, also generated
    texts."""
    found = [bits(result), errors(original, result, moments)]
    found += [routing(moments)] if moments is not None else []
    found.append(sizes([original, result]))
    if text is not None and (asked := texts.prompts(text)):
        found.append(generations(texts.generate(original, result, asked, threads, options)))
    return [section for section in found if section is not None]


def page(title: str, lead: str, measured: Measured | None, sections: Sequence[Section], facts: Sequence[tuple[str, str]]) -> Page:  # fmt: skip
    """A page that begins with what was measured."""
    first = [] if measured is None or not measured.rows else [quality(measured)]
    top = [] if measured is None or not measured.rows else figures(measured)
    made = ("made by", f"mobe-gguf {__version__}")
    return Page(title, lead, top, [*first, *sections], [*facts, made])
