"""The tensors of a file or model, listed and totalled by class: parameters, bytes, types."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Classes of tensors in the order of the table, each with the patterns of its tensors' names.
#: The first match counts.  ``experts`` are gate and up of layers that are not factorized.
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

#: The classes that make up most of a model: the experts' matrices, or their factors.
WEIGHTS = ("A", "B", "down", "experts")


@dataclass(frozen=True)
class ListedTensor:
    """One tensor.  ``shape``: in torch's order.  ``wanted``: the type asked for, where the rows did not allow it.
    ``label``: the class, where the name alone does not tell it.  ``importance``: the source of the columns' weights."""

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
class ClassTotal:
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


def rows(entries: Iterable[ListedTensor]) -> list[ClassTotal]:
    """Totals of the entries by class, in the order of CLASSES; empty classes are left out."""
    entries = list(entries)
    factorized = {e.name.replace("_basis.", "_exps.") for e in entries if re.search(CLASSES["B"], e.name)}
    by_label = {label: ClassTotal(label) for label in CLASSES}
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
    """Key of CLASSES for a GGUF name.  The name alone does not tell an A from ordinary experts, see :func:`rows`."""
    return next(label for label, pattern in CLASSES.items() if re.search(pattern, name))


def original_params(entries: Iterable[ListedTensor]) -> int:
    """Parameters of a GGUF's model before factorization: ``n p d`` for each projection's A, B and mix."""
    entries = list(entries)
    shapes = {e.name: e.shape for e in entries}
    total = 0
    for entry in entries:
        basis = (
            shapes.get(entry.name.replace("_exps.weight", "_basis.weight"))
            if entry.name.endswith("_exps.weight")
            else None
        )
        if "_basis." in entry.name:
            continue
        if basis and ".ffn_down_" in entry.name:  # A [n, r, p], B [m, d, r]
            total += math.prod((entry.shape[0], (1, *basis)[-2], entry.shape[-1]))
        else:
            total += math.prod((*entry.shape[:-1], basis[-1])) if basis else entry.n_params
    return total
