"""Report of an export or of a file: tensors counted by class, sizes, bits per weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from mobe_gguf.core.files import amount
from mobe_gguf.export.refit_solve import BIAS
from mobe_gguf.formats.contents import ClassTotal, ListedTensor, rows
from mobe_gguf.quant.recipe import FLOATS


@dataclass
class Refit:
    """Effect of solving for A and mix again, see ``refit``: squared errors of the outputs, summed over experts.

    - ``original``: the model with the target matrices; ``why``: the reason if there is none.
    - ``before``: errors if the checkpoint's A's are only rounded; ``after``: errors as written.
    - ``cost_before``, ``cost_after``: the same plus the cost of outputs of the wrong size (``refit_solve.cost``).  The
      A of lower cost is taken for each expert.
    - ``kept_before``, ``kept_after``: inner product of the outputs with the right ones; ``norm``: squares of the right
      ones.
    - ``solved``: how many of the ``matrices`` have a new A.
    """

    original: str | None = None
    why: str | None = None
    before: float = 0.0
    after: float = 0.0
    cost_before: float = 0.0
    cost_after: float = 0.0
    kept_before: float = 0.0
    kept_after: float = 0.0
    norm: float = 0.0
    solved: int = 0
    matrices: int = 0

    def add(self, other: Refit) -> None:
        self.before += other.before
        self.after += other.after
        self.cost_before += other.cost_before
        self.cost_after += other.cost_after
        self.kept_before += other.kept_before
        self.kept_after += other.kept_after
        self.norm += other.norm
        self.solved += other.solved
        self.matrices += other.matrices

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: relative errors."""
        norm = self.norm or 1.0
        return {
            "original": self.original,
            "matrices": self.matrices,
            "solved": self.solved,
            "cost_before": self.cost_before / norm,
            "cost_after": self.cost_after / norm,
            "error_before": self.before / norm,
            "error_after": self.after / norm,
            "size_before": self.kept_before / norm,
            "size_after": self.kept_after / norm,
        }

    def line(self) -> str:
        """In words."""
        if not self.matrices:
            return "A solved again: all in files that were finished before"
        if not self.norm:
            return "A not solved again: the encoder leaves the bases as they are"
        to = self.original if self.original else f"what the factors stand for ({self.why})"
        return (
            f"A and mix solved again for the rounded bases, {self.solved} of {self.matrices} (those that are better for it), to come near "
            f"to {to}: cost {self.cost_before / self.norm:.4f} -> {self.cost_after / self.norm:.4f}, which is the error "
            f"({self.before / self.norm:.4f} -> {self.after / self.norm:.4f}) and {BIAS:g} times the square of what the outputs' size lacks "
            f"({self.kept_before / self.norm:.3f} -> {self.kept_after / self.norm:.3f} of what it should be)"
        )


@dataclass(frozen=True)
class Rounded:
    """Effect of rounding by second moments: relative squared errors, mean over ``tensors``.

    ``before``: as libggml rounds by the diagonal alone; ``after``: as written.  ``damping``: what was added to a
    diagonal, as a share of its mean, at most.
    """

    tensors: int
    before: float
    after: float
    damping: float

    def line(self) -> str:
        return (
            f"{self.tensors} tensors rounded by second moments: squared error of their outputs {self.before:.2e} -> {self.after:.2e} "
            f"(damping {self.damping:g})"
        )


@dataclass
class Report:
    """A GGUF file, ``written`` or only planned.

    - ``n_bytes``: size of the whole file, also if it is only planned.
    - ``original_params``: parameters with the original experts (equal to ``n_params`` if nothing is factorized).
    - ``files``: all paths of a split file (``path`` is the first); ``files_kept``: how many an interrupted run had
      finished.
    - ``rounding_seconds``: how long rounding by moments is expected to take (planned only), None without moments.
    - ``needs_imatrix``: tensors that cannot be written without an importance matrix (planned only).
    - ``refit``: None if A was not solved for again.
    - ``copied``: tensors that were copied from a GGUF file.
    - ``card``: where the card is, or why there is none.
    - ``compared``: how far the file's first layers are from the model's, or why that is not known.
    """

    path: str
    arch: str
    quant: str
    entries: list[ListedTensor]
    original_params: int
    n_bytes: int = 0
    written: bool = False
    seconds: float = 0.0
    rounding_seconds: float | None = None
    tokenizer_pre: str | None = None
    tokenizer_why: str | None = None
    files: list[str] = field(default_factory=list)
    files_kept: int = 0
    needs_imatrix: int = 0
    refit: Refit | None = None
    rounded: Rounded | None = None
    divided: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    copied: int = 0
    card: str | None = None
    compared: str | None = None

    @property
    def n_params(self) -> int:
        return sum(e.n_params for e in self.entries)

    @property
    def data_bytes(self) -> int:
        return sum(e.n_bytes for e in self.entries)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.data_bytes / self.n_params

    @property
    def fallbacks(self) -> list[ListedTensor]:
        return [e for e in self.entries if e.wanted is not None]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: plain values only."""
        return {
            "path": self.path,
            "files": self.files or [self.path],
            "architecture": self.arch,
            "quant": self.quant,
            "bytes": self.n_bytes,
            "written": self.written,
            "tensor_bytes": self.data_bytes,
            "parameters": self.n_params,
            "original_parameters": self.original_params,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "seconds": round(self.seconds, 3),
            "rounding_seconds": self.rounding_seconds and round(self.rounding_seconds, 3),
            "tokenizer_pre": self.tokenizer_pre,
            "tokenizer_why": self.tokenizer_why,
            "classes": [
                {
                    "class": row.label,
                    "tensors": row.count,
                    "types": dict(row.types),
                    "parameters": row.n_params,
                    "bytes": row.n_bytes,
                    "bits_per_weight": round(row.bits_per_weight, 4),
                    "importance": dict(row.importance),
                }
                for row in rows(self.entries)
            ],
            "fallbacks": [
                {"tensor": e.name, "row": e.shape[-1], "wanted": e.wanted, "type": e.type}
                for e in self.fallbacks
            ],
            "needs_imatrix": self.needs_imatrix,
            "refit": self.refit and self.refit.as_json(),
            "rounded": self.rounded and asdict(self.rounded),
            "notes": self.notes,
            "copied": self.copied,
            "card": self.card,
            "compared": self.compared,
        }


def size_table(entries: Iterable[ListedTensor], title: str | None = None) -> Table:
    """Tensors by class, at most 100 columns wide."""
    entries = list(entries)
    table = Table(title=title, title_justify="left", pad_edge=False, box=None)
    found = rows(entries)
    total = ClassTotal("all", sum(r.count for r in found), Counter(), sum(r.n_params for r in found))
    total.n_bytes = sum(r.n_bytes for r in found)
    unit, name = (1e9, "GB") if total.n_bytes >= 10**10 else (1e6, "MB")
    for column in ("class", "tensors", "types", "parameters", name, "bits/weight"):
        table.add_column(column, justify="left" if column in ("class", "types") else "right")
    for row in (*found, total):
        types = ", ".join(t if n == row.count else f"{t} {n}" for t, n in row.types.most_common())
        table.add_row(
            row.label,
            str(row.count),
            Text(types, overflow="fold"),
            amount(row.n_params),
            f"{row.n_bytes / unit:,.2f}",
            f"{row.bits_per_weight:.2f}",
            style="bold" if row is total else None,
        )
    return table


def importance_lines(entries: Iterable[ListedTensor]) -> list[str]:
    """A line for each file, with the tensors that it weighed, and one for quantized tensors without weights.  Empty if
    no file was given."""
    by_origin: dict[str, list[str]] = {}
    without = []
    found = rows(entries)
    for row in found:
        for origin, n in row.importance.items():
            by_origin.setdefault(origin, []).append(row.label if n == row.count else f"{row.label} ({n})")
        n_without = sum(n for t, n in row.types.items() if t not in FLOATS) - sum(row.importance.values())
        if n_without:
            without.append(row.label if n_without == row.count else f"{row.label} ({n_without})")
    lines = [f"importance from {origin}: {', '.join(labels)}" for origin, labels in by_origin.items()]
    if lines and without:
        lines.append(f"importance not known, all columns alike: {', '.join(without)}")
    return lines


def fallback_lines(fallbacks: Iterable[ListedTensor]) -> list[str]:
    """Fallbacks in words, one line for each row length and pair of types."""
    kinds: dict[tuple[str, str, int], Counter[str]] = {}
    for e in fallbacks:
        stem = re.sub(r"^blk\.\d+\.|\.weight$", "", e.name)
        kinds.setdefault((str(e.wanted), e.type, e.shape[-1]), Counter())[stem] += 1
    return [
        f"{wanted} -> {got}, for its blocks do not divide rows of {row}: "
        + ", ".join(name if n == 1 else f"{name} ({n})" for name, n in found.items())
        for (wanted, got, row), found in kinds.items()
    ]
