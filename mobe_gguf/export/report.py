"""What an export wrote, or a file holds: tensors counted by class, sizes, bits per weight."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from mobe_gguf.quant.recipe import FLOATS

#: Classes of tensors in the order of the table, each with what is found in the names of its tensors.
#: The first that fits counts.  ``experts`` are gate and up of layers that are not factorized.
CLASSES = {
    "A": r"^$",
    "B": r"\.ffn_(gate|up|down)_basis\.weight$",
    "mix": r"\.ffn_(gate|up|down)_basis\.mix$",
    "down": r"\.ffn_down_exps\.",
    "experts": r"\.ffn_(gate|up|gate_up)_exps\.",
    "attention": r"\.attn_(?!.*norm)",
    "embeddings": r"^(token_embd|output)\.weight$",
    "other": r"",
}


@dataclass(frozen=True)
class Entry:
    """One tensor; ``shape`` in torch's order; ``wanted`` is the type asked for where its rows did not allow it;
    ``label`` its class, where its name alone does not tell; ``importance`` where its columns' weights came from."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    wanted: str | None = None
    label: str | None = None
    importance: str | None = None

    @property
    def n_params(self) -> int:
        return math.prod(self.shape)


@dataclass
class Refit:
    """What solving for A and mix again did, see ``refit``: squared errors of the outputs, summed over experts.

    ``original``: the model that they come near to; ``why``: why there is none.  ``before``: with the A's of the checkpoint
    rounded as they are, ``after``: as written; ``kept_before``, ``kept_after``: their inner product with the outputs that they
    should have, ``norm``: these outputs' squares.  ``solved``: matrices whose A is new, of ``matrices``.
    """

    original: str | None = None
    why: str | None = None
    before: float = 0.0
    after: float = 0.0
    kept_before: float = 0.0
    kept_after: float = 0.0
    norm: float = 0.0
    solved: int = 0
    matrices: int = 0

    def add(self, other: Refit) -> None:
        self.before += other.before
        self.after += other.after
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
            f"A and mix solved again for the rounded bases, {self.solved} of {self.matrices}, to come near to {to}: error "
            f"{self.before / self.norm:.4f} -> {self.after / self.norm:.4f}, size of the outputs "
            f"{self.kept_before / self.norm:.3f} -> {self.kept_after / self.norm:.3f}"
        )


@dataclass
class Report:
    """A GGUF file, written or to be written.  ``n_bytes`` is the whole file's size, 0 if only planned.

    ``original_params``: the same model with its experts as they were (equal to ``n_params`` if nothing is factorized).
    ``files``: all paths where it is split (``path`` is the first), of which ``files_kept`` an interrupted run had
    finished.  ``needs_imatrix``: tensors that could not be written for want of an importance matrix (planned only).  ``refit``: None if A was not
    solved for again.  ``copied``: tensors
    that passed through from a GGUF file.  ``card``: where the card is, or why there is none.
    """

    path: str
    arch: str
    quant: str
    entries: list[Entry]
    original_params: int
    n_bytes: int = 0
    seconds: float = 0.0
    tokenizer_pre: str | None = None
    tokenizer_why: str | None = None
    files: list[str] = field(default_factory=list)
    files_kept: int = 0
    needs_imatrix: int = 0
    refit: Refit | None = None
    divided: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    copied: int = 0
    card: str | None = None

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
    def fallbacks(self) -> list[Entry]:
        return [e for e in self.entries if e.wanted is not None]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``: plain values only."""
        return {
            "path": self.path,
            "files": self.files or [self.path],
            "architecture": self.arch,
            "quant": self.quant,
            "bytes": self.n_bytes,
            "tensor_bytes": self.data_bytes,
            "parameters": self.n_params,
            "original_parameters": self.original_params,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "seconds": round(self.seconds, 3),
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
            "notes": self.notes,
            "copied": self.copied,
            "card": self.card,
        }


@dataclass
class Row:
    """One line of the table."""

    label: str
    count: int = 0
    types: Counter[str] = field(default_factory=Counter)
    n_params: int = 0
    n_bytes: int = 0
    importance: Counter[str] = field(default_factory=Counter)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_params if self.n_params else 0.0


def rows(entries: Iterable[Entry]) -> list[Row]:
    """Entries summed up by class, in the order of CLASSES, classes without tensors left out."""
    entries = list(entries)
    factorized = {e.name.replace("_basis.", "_exps.") for e in entries if re.search(CLASSES["B"], e.name)}
    by_label = {label: Row(label) for label in CLASSES}
    for entry in entries:
        row = by_label[entry.label or ("A" if entry.name in factorized else class_of(entry.name))]
        row.count += 1
        row.types[entry.type] += 1
        if entry.importance is not None:
            row.importance[entry.importance] += 1
        row.n_params += entry.n_params
        row.n_bytes += entry.n_bytes
    return [row for row in by_label.values() if row.count]


def class_of(name: str) -> str:
    """Key of CLASSES for a GGUF name; an A cannot be told from ordinary experts by its name, see :func:`rows`."""
    return next(label for label, pattern in CLASSES.items() if re.search(pattern, name))


def original_params(entries: Iterable[Entry]) -> int:
    """Parameters of a GGUF's model before factorization: ``n p d`` for each projection's A, B and mix."""
    entries = list(entries)
    shapes = {e.name: e.shape for e in entries}
    total = 0
    for entry in entries:
        basis = (
            shapes.get(entry.name.replace("_exps.weight", "_basis.weight"))
            if "_exps." in entry.name
            else None
        )
        if "_basis." in entry.name:
            continue
        if basis and ".ffn_down_" in entry.name:  # A [n, r, p], B [m, d, r]
            total += math.prod((entry.shape[0], (1, *basis)[-2], entry.shape[-1]))
        else:
            total += math.prod((*entry.shape[:-1], basis[-1])) if basis else entry.n_params
    return total


def size_table(entries: Iterable[Entry], title: str | None = None) -> Table:
    """Tensors by class, at most 100 columns wide."""
    entries = list(entries)
    table = Table(title=title, title_justify="left", pad_edge=False, box=None)
    for column in ("class", "tensors", "types", "parameters", "MB", "bits/weight"):
        table.add_column(column, justify="left" if column in ("class", "types") else "right")
    found = rows(entries)
    total = Row("all", sum(r.count for r in found), Counter(), sum(r.n_params for r in found))
    total.n_bytes = sum(r.n_bytes for r in found)
    for row in (*found, total):
        types = ", ".join(t if n == row.count else f"{t} {n}" for t, n in row.types.most_common())
        table.add_row(
            row.label,
            str(row.count),
            Text(types, overflow="fold"),
            amount(row.n_params),
            f"{row.n_bytes / 1e6:,.2f}",
            f"{row.bits_per_weight:.2f}",
            style="bold" if row is total else None,
        )
    return table


def importance_lines(entries: Iterable[Entry]) -> list[str]:
    """Which tensors were weighed by which file, and which quantized ones by none: a line for each; none at all if no
    file was given."""
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


def amount(n: int) -> str:
    """``30.53 B``, ``15.20 M``, ``960``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= 10 * size or (n >= size and unit != "k"):
            return f"{n / size:,.2f} {unit}"
    return str(n)


def fallback_lines(fallbacks: Iterable[Entry]) -> list[str]:
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
