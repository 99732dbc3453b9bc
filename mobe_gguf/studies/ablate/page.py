"""A study as an HTML page: the same numbers as ``ablation.json``, drawn and as tables."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mobe_gguf import __version__
from mobe_gguf.core.layers import format_layers
from mobe_gguf.evaluate import Estimate
from mobe_gguf.evaluate.page.data import (
    Cell,
    Dot,
    Figure,
    HeatMap,
    Line,
    Lines,
    Page,
    PageTable,
    Scatter,
    Section,
)
from mobe_gguf.evaluate.page.sections import commands
from mobe_gguf.evaluate.report import with_error
from mobe_gguf.studies.ablate.study import BINS, EDGE, Study, Trial, TrialResult


def of_study(model: Path, out: Path, study: Study, rows: Sequence[TrialResult]) -> Page:
    """``rows`` as ``run`` gave them, at least one."""
    measured = all(row.divergence is not None for row in rows)
    sections = [_divergence(study, rows)] if measured else []
    sections += [_errors(study, rows), _by_layer(study, rows), _values(rows), _commands(model, out, study)]
    best = min(rows, key=_cost)
    units = f"layers {format_layers(study.layers)}, {' and '.join(study.projections)}"
    lead = f"{len(rows)} ways to factorize {units}, {study.steps} steps each. Nothing is quantized."
    figures = [
        Figure("least " + ("KL divergence" if measured else "error"), _label(best.trial)),
        Figure("error", f"{best.error:.4f}", "relative, of the weights"),
        Figure("kept", f"{best.kept:.1%}", "of the factorized matrices"),
    ]
    if best.divergence is not None:
        figures.append(Figure("KL divergence", f"{best.divergence[0]:.5f}", f"± {best.divergence[1]:.5f} nats per token"))  # fmt: skip
    facts = [("model", str(model)), ("made by", f"mobe-gguf {__version__}")]
    if study.text is not None:
        facts.insert(1, ("text", f"{study.text}, {study.chunks} chunks of {study.ctx} tokens"))
    return Page(f"Study of {model.name}", lead, figures, sections, facts)


def _label(trial: Trial) -> str:
    rank = "" if trial.rank is None else f" of rank {trial.rank}"
    return f"{trial.bases} bases{rank}, {trial.activation}"


def _cost(row: TrialResult) -> float:
    return row.objective if row.divergence is None else row.divergence[0]


def _dots(rows: Sequence[TrialResult], values: Sequence[tuple[float, float]]) -> list[Dot]:
    best = min(rows, key=_cost)
    return [
        Dot(_label(row.trial), 100 * row.kept, value, row.trial.activation, error, row is best)
        for row, (value, error) in zip(rows, values, strict=True)
    ]


def _divergence(study: Study, rows: Sequence[TrialResult]) -> Section:
    found = [row.divergence for row in rows if row.divergence is not None]
    note = "KL divergence of the model with these layers factorized from the original, against what the factors keep. Down and left is better."
    body = Scatter("kept of the matrices, %", "KL divergence, nats per token", _dots(rows, found))
    return Section("divergence", "KL divergence", note, body)


def _errors(study: Study, rows: Sequence[TrialResult]) -> Section:
    columns = ["", "rank", "kept", "error", *(["error of outputs"] if study.imatrix else []), "KL divergence"]
    table = [
        [
            _label(row.trial),
            str(row.rank),
            f"{row.kept:.1%}",
            f"{row.error:.4f}",
            *([f"{row.objective:.4f}"] if study.imatrix else []),
            with_error(Estimate(*row.divergence)) if row.divergence else "not measured",
        ]
        for row in rows
    ]
    best = rows.index(min(rows, key=_cost))
    note = "Squared error of the weights relative to their size, mean over the layers, against the share of the matrices that the factors keep."
    body = Scatter("kept of the matrices, %", "relative squared error", _dots(rows, [(row.error, 0.0) for row in rows]))  # fmt: skip
    return Section("errors", "Error and size", note, body, PageTable(columns, table, [best]))


def _by_layer(study: Study, rows: Sequence[TrialResult]) -> Section:
    units = [f"{layer}.{projection}" for layer in study.layers for projection in study.projections]
    shown = [unit.replace(".", " ") for unit in units]
    cells = [
        [
            Cell(row.errors[unit], f"{_label(row.trial)}, layer {name}: {row.errors[unit]:.4f}")
            if unit in row.errors
            else None
            for unit, name in zip(units, shown, strict=True)
        ]
        for row in rows
    ]
    table = [
        [f"layer {name}", *(f"{row.errors[unit]:.4f}" if unit in row.errors else "" for row in rows)]
        for unit, name in zip(units, shown, strict=True)
    ]
    body = HeatMap([_label(row.trial) for row in rows], shown, cells, "error", "layers and projections")
    columns = ["", *(_label(row.trial) for row in rows)]
    return Section("layers", "Error by layer", "Stronger color: more error.", body, PageTable(columns, table))


def _values(rows: Sequence[TrialResult]) -> Section:
    lines = []
    for activation in dict.fromkeys(row.trial.activation for row in rows):
        row = next(row for row in rows if row.trial.activation == activation)
        for when, counts in (("before", row.before), ("after", row.after)):
            if activation == "none" and when == "after":
                continue
            total = sum(counts) or 1
            middles = [-EDGE + 2 * EDGE * (i + 0.5) / BINS for i in range(BINS)]
            points = [(x, 100 * count / total) for x, count in zip(middles, counts, strict=True)]
            lines.append(Line(f"{when} {activation}" if activation != "none" else "none", points[1:-1]))
    note = f"How often the combined bases take which value, before the activation and after it, in bins of {2 * EDGE / BINS:g}."
    return Section("values", "Values before and after the activation", note, Lines("value", "% of all values", lines))  # fmt: skip


def _commands(model: Path, out: Path, study: Study) -> Section:
    again = ["mobe-gguf", "ablate", str(model), str(out), "--layers", format_layers(study.layers)]
    again += ["--projections", ",".join(study.projections), "--bases", ",".join(map(str, study.bases))]
    again += ["--activations", ",".join(study.activations), "--steps", str(study.steps), "--seed", str(study.seed)]  # fmt: skip
    again += ["--imatrix", study.imatrix] if study.imatrix else []
    again += ["--wide"] if study.sizes else []
    if study.text is None:
        again.append("--no-kl")
    else:
        again += ["--text", study.text, "--ctx", str(study.ctx), "--chunks", str(study.chunks)]
    return commands([("Measure again:", shlex.join([*again, "--report", "report.html"]))])
