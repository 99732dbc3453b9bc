"""The figures of a study, with matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.evaluate.plot import check
from mobe_gguf.studies.ablate.study import BINS, EDGE, Study, TrialResult


def plot(study: Study, rows: Sequence[TrialResult], directory: Path) -> list[Path]:
    """``bases.png``, ``activations.png``, ``values.png`` and, where they were measured, ``sizes.png`` and ``divergence.png`` in
    ``directory``.

    MobeError without matplotlib.
    """
    usual = [row for row in rows if row.trial.rank is None]
    of_bases = [row for row in usual if row.trial.activation == "tanh" and row.trial.bases in study.bases]
    of_activations = [
        row for row in usual if row.trial.bases == study.middle and row.trial.activation in study.activations
    ]
    of_sizes = [row for row in rows if row.trial.rank is not None]
    figures: dict[str, Callable[[Any], None]] = {
        "bases": lambda figure: _bases(figure, of_bases),
        "activations": lambda figure: _activations(figure, of_activations),
        "values": lambda figure: _values(figure, of_activations),
    }
    if of_sizes:
        figures["sizes"] = lambda figure: _sizes(figure, of_sizes)
    if all(row.divergence for row in rows):
        figures["divergence"] = lambda figure: _divergence(figure, rows)
    return [_draw(directory / f"{name}.png", draw) for name, draw in figures.items()]


def _draw(path: Path, draw: Callable[[Any], None]) -> Path:
    check(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=130)
    return path


def _bases(figure: Any, rows: Sequence[TrialResult]) -> None:
    """Error of each unit, and their mean, against the number of bases."""
    axes = figure.add_subplot()
    bases = [row.trial.bases for row in rows]
    for unit in rows[0].errors:
        axes.plot(bases, [row.errors[unit] for row in rows], linewidth=0.8, alpha=0.6, label=_unit(unit))
    axes.plot(bases, [row.error for row in rows], "k-o", linewidth=2, label="mean")
    axes.set_yscale("log")
    axes.set_xticks(bases, [f"{row.trial.bases}\n{row.kept:.0%}" for row in rows])
    axes.set_xlabel("bases, and the share of the parameters that is kept")
    axes.set_ylabel("relative error")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)


def _sizes(figure: Any, rows: Sequence[TrialResult]) -> None:
    """Mean error against the number of bases, each with the rank that keeps the same share, a line for each activation."""
    axes = figure.add_subplot()
    sizes = {row.trial.bases: row for row in rows}
    at = {m: x for x, m in enumerate(sizes)}
    for activation in dict.fromkeys(row.trial.activation for row in rows):
        found = [row for row in rows if row.trial.activation == activation]
        points = [at[row.trial.bases] for row in found], [row.objective for row in found]
        axes.plot(*points, "-o", label="no activation" if activation == "none" else activation)
    axes.set_yscale("log")
    axes.set_xticks(
        range(len(at)), [f"{m}\n{row.rank}\n{row.kept:.1%}" for m, row in sizes.items()], fontsize=9
    )
    axes.set_xlabel("bases, their rank, and the share of the parameters that is kept")
    axes.set_ylabel("relative error that was minimized, mean of the units")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()


def _activations(figure: Any, rows: Sequence[TrialResult]) -> None:
    """Mean error of each activation, and that of each unit."""
    axes = figure.add_subplot()
    names = [row.trial.activation for row in rows]
    axes.bar(names, [row.error for row in rows], color="tab:blue", alpha=0.5)
    for x, row in enumerate(rows):
        axes.plot([x] * len(row.errors), list(row.errors.values()), "k.", markersize=4)
    axes.set_ylabel(f"relative error, {rows[0].trial.bases} bases" if rows else "relative error")
    axes.grid(True, axis="y", alpha=0.25)


def _values(figure: Any, rows: Sequence[TrialResult]) -> None:
    """Density of the combined bases' values before and after f."""
    edges = [-EDGE + 2 * EDGE * i / BINS for i in range(BINS + 1)]
    panels = figure.subplots(1, max(1, len(rows)), sharex=True, squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=False):
        for counts, label, color in ((row.before, "before f", "tab:gray"), (row.after, "after f", "tab:red")):
            scale = sum(counts) * (edges[1] - edges[0])
            axes.stairs([c / scale for c in counts], edges, label=label, color=color)
        axes.set_title(row.trial.activation)
        axes.set_yscale("log")
        axes.set_xlabel("value (what lies outside is at the ends)", fontsize=8)
    panels[0].set_ylabel("density")
    panels[0].legend(fontsize=8)


def _divergence(figure: Any, rows: Sequence[TrialResult]) -> None:
    """KL divergence against the mean error."""
    axes = figure.add_subplot()
    for row in rows:
        value, error = row.divergence or (0.0, 0.0)
        axes.errorbar([row.error], [value], yerr=[error], fmt="o", color="tab:blue")
        label = f"{row.trial.bases} {row.trial.activation}"
        axes.annotate(label, (row.error, value), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    if all((row.divergence or (0.0, 0.0))[0] > 0 for row in rows):
        axes.set_yscale("log")
    axes.set_xlabel("relative error of the factorized matrices, mean")
    axes.set_ylabel("KL divergence from the original, nats per token")
    axes.grid(True, which="both", alpha=0.25)
    axes.margins(0.15)


def _unit(name: str) -> str:
    layer, projection = name.split(".")
    return f"layer {layer} {projection}"
