"""The rows of a study as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mobe_gguf.core.layers import format_layers
from mobe_gguf.evaluate import Estimate
from mobe_gguf.evaluate.report import with_error
from mobe_gguf.studies.ablate.study import Study, TrialResult


def table(study: Study, rows: Sequence[TrialResult]) -> RenderableType:
    """A row for each trial; fits 100 columns."""
    out = Table(pad_edge=False, box=None, padding=(0, 2, 0, 0))
    for column in ("bases", "rank", "activation", "kept", "error", "error of outputs", "KL divergence"):
        out.add_column(column, justify="left" if column == "activation" else "right")
    for row in rows:
        out.add_row(
            str(row.trial.bases),
            str(row.rank),
            row.trial.activation,
            f"{row.kept:.1%}",
            f"{row.error:.4f}",
            f"{row.objective:.4f}" if study.imatrix else "-",
            with_error(Estimate(*row.divergence)) if row.divergence else "-",
        )
    units = f"layers {format_layers(study.layers)}, {' and '.join(study.projections)}, {study.steps} steps"
    return Group(
        out, "", Text(f"Means over {units}; kept: of the factorized matrices. Nothing is quantized.")
    )
