"""Table, JSON and plot of made-up rows."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate import Divergence, Estimate, EvalSettings, Facts, Row, plot, report
from mobe_gguf.evaluate.parse import PERCENTILES


def row(name: str, n_bytes: int, kl: float, *, factorized: bool = False) -> Row:
    percentiles = {label: kl * (1 + 10 / (i + 1)) for i, label in enumerate(PERCENTILES)}
    estimate = Estimate(21.4321, 0.4321)
    return Row(
        Facts(Path(name), "qwen3moe", n_bytes, n_bytes - 999, 7_000_000, 8_000_000, factorized, 2048),
        Divergence(
            Estimate(kl, kl / 9), percentiles, estimate, estimate, estimate, Estimate(0.1, 0.01), estimate
        ),
        chunks=16,
        scored=4080,
        seconds=1.5,
    )


def shown(rows: list[Row], width: int | None = 100) -> list[str]:
    console = Console(width=width or 1000, record=True, file=io.StringIO(), highlight=False)
    reference = row("model-bf16.gguf", 16_000_000, 0).facts
    console.print(report.table(reference, rows, Path("a.txt"), EvalSettings(), width))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_table_fits_and_shows_whole_names():
    name = "some-model-of-a-long-name-128x3b-instruct-iq4_xs"
    lines = shown([row(f"{name}.gguf", 123_456_789_000, 0.0239), row("x.gguf", 10, 3.25)])
    assert max(map(len, lines)) <= 100
    assert any(
        line.startswith(f"{name} ") and "123.46" in line and "0.0239 ± 0.0027" in line and "21.432" in line
        for line in lines
    )
    assert lines[0].split()[1] == "GB" and "KL divergence" in lines[0] and "99 %" not in lines[0]


def test_into_a_pipe_nothing_is_left_out_or_broken():
    name = "a-name-" * 20
    lines = shown([row(f"{name}.gguf", 7_000_999, 0.02, factorized=True)], None)
    (line,) = [line for line in lines if line.startswith(name)]
    assert lines[0].split()[:4] == ["file", "form", "MB", "bits"] and "Δp" in lines[0]
    # bits of the original's 8 million weights, not of the file's 7 million; no word of a bold face that a pipe lacks
    assert line.split()[1:4] == ["MoBE", "7.00", "7.00"] and "bold" not in "".join(lines)
    assert "for each of the original's weights" in "".join(lines)


def test_no_negative_zero_and_no_number():
    lines = shown([row("a.gguf", 10_000, -1e-9), row("b.gguf", 10_000, math.nan)])
    assert "-0.0" not in "".join(lines) and any("nan ± nan" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.023957, 0.001234, "0.0240 ± 0.0012"),
        (0.000378, 0.000031, "0.00038 ± 0.00003"),
        (6.73, 0.151, "6.73 ± 0.15"),
        (0.0, 0.0, "0.0000 ± 0.0000"),
        (3.0, 12.0, "3.0000 ± 12.0000"),
    ],
)
def test_two_digits_of_the_standard_error(value: float, error: float, text: str):
    assert report.with_error(Estimate(value, error)) == text


def test_names_are_distinct():
    assert report.short_names([Path("a/x.gguf"), Path("a/y-1.gguf")]) == ["x", "y-1"]
    assert report.short_names([Path("a/x.gguf"), Path("b/x.gguf")]) == ["a/x", "b/x"]
    assert report.short_names([Path("a/x.gguf"), Path("a/x.gguf")]) == ["x", "x"]


def test_json():
    rows = [row("a.gguf", 7_000_999, 0.02, factorized=True), row("b.gguf", 999, math.nan)]
    plain = report.as_json(rows[1].facts, rows, Path("a.txt"), EvalSettings(chunks=16))
    a, b = json.loads(json.dumps(plain, allow_nan=False))["files"]
    assert a["bytes"] == 7_000_999 and a["bits_per_weight"] == 8 and a["bits_per_original_weight"] == 7
    assert a["factorized"] and a["kl_divergence"] == {"value": 0.02, "standard_error": 0.002222222}
    assert list(a["kl_percentiles"])[:3] == ["maximum", "99.9", "99"]
    assert b["kl_divergence"] == {"value": None, "standard_error": None}
    assert plain["tokens_evaluated"] == 4080 and plain["reference"]["perplexity"]["value"] == 21.4321
    assert report.as_json(rows[0].facts, [], Path("a.txt"), EvalSettings())["files"] == []


# plot

ROWS = [row("a.gguf", 4_000_000, 0.05), row("b.gguf", 5_000_000, 0.06), row("c.gguf", 6_000_000, 0.006)]


def test_frontier():
    names = [r.facts.path.name for r in plot.frontier([*reversed(ROWS), row("d.gguf", 4_000_000, 0.04)])]
    assert names == ["d.gguf", "c.gguf"]


@pytest.mark.parametrize("form", plot.FORMATS)
def test_plot(tmp_path: Path, form: str):
    path = tmp_path / f"kl.{form}"
    rows = [*ROWS, row("mobe.gguf", 5_500_000, 0.02, factorized=True)]
    odd = [row("same.gguf", 9_000_000, 0.0), row("nan.gguf", 9_000_000, math.nan)]
    assert plot.plot([*rows, *odd], path) == odd
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[form]
    assert path.read_bytes().startswith(start) and list(tmp_path.iterdir()) == [path]


def test_labels_are_apart_and_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files in a bunch, in a corner, with long names: each label has a place of its own, inside the axes."""
    figures = []
    draw = plot._draw

    def remember(figure: Any, canvas: Any, rows: Sequence[Row]) -> bool:
        figures.append(figure)
        return draw(figure, canvas, rows)

    monkeypatch.setattr(plot, "_draw", remember)
    names = [f"model-q{i}" for i in range(20)]
    rows = [row(f"{name}.gguf", 4_000_000 + 9_000 * i, 0.05 * 0.97**i) for i, name in enumerate(names)]
    rows += [
        row("model-far-with-a-long-name.gguf", 9_000_000, 0.0001),
        row("model-top-right.gguf", 8_900_000, 0.06),
    ]
    plot.plot(rows, tmp_path / "kl.png")
    figure = figures[-1]
    renderer, axes = figure.canvas.get_renderer(), figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [
        r.facts.path.stem.removeprefix("model-") for r in rows
    ]
    extents = [text.get_window_extent(renderer) for text in axes.texts]
    extents.append(axes.get_legend().get_window_extent(renderer))
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])
    assert all(
        axes.bbox.x0 <= b.x0 and b.x1 <= axes.bbox.x1 and axes.bbox.y0 <= b.y0 and b.y1 <= axes.bbox.y1
        for b in extents
    )


def test_plots_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="ends in .png, .svg, .pdf"):
        plot.check(tmp_path / "kl.jpeg")
    with pytest.raises(MobeError, match="there is no directory"):
        plot.check(tmp_path / "none" / "kl.png")
    (tmp_path / "kl.png").mkdir()
    with pytest.raises(MobeError, match="it is a directory"):
        plot.check(tmp_path / "kl.png")
    (tmp_path / "kl.png").rmdir()
    with pytest.raises(MobeError, match="nothing to plot"):
        plot.plot([row("same.gguf", 1, 0.0)], tmp_path / "kl.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MobeError, match=r"pip install 'mobe-gguf\[plot\]'"):
        plot.check(tmp_path / "kl.png")
    assert not list(tmp_path.iterdir())
