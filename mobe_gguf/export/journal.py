"""Resume inside a file: tensors whose rounding takes long stay after a kill.

An unfinished file and its journal lie in the folder of parts (``shards``).  The journal says of each rounded tensor where it
begins, its checksum, and what the rounding reported.  The next run with the same model and options renames the file
``*.earlier``, writes a new one from the start, and copies these tensors from it: they lie at the same places, because sizes
and order are the same.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mobe_gguf.core.atomic import sync
from mobe_gguf.core.records import plain, record
from mobe_gguf.core.workspace import Workspace
from mobe_gguf.export.rounding import ByMoments, MomentsEncoder
from mobe_gguf.export.write import Encoded
from mobe_gguf.quant.rounding.rounder import Outcome
from mobe_gguf.quant.small import Squares

#: Bytes copied at a time.
CHUNK = 1 << 22
#: The journal in the folder of parts.
JOURNAL = "journal.json"


@dataclass(frozen=True)
class JournalEntry:
    """A finished tensor: where it begins, bytes, checksum, what the rounding reported, squares of its values."""

    at: int
    n_bytes: int
    checksum: int
    outcome: Outcome
    squares: Squares


@dataclass(frozen=True)
class JournalRecord:
    """The journal in JSON."""

    key: str
    name: str
    tensors: dict[str, JournalEntry]


@dataclass
class Journal:
    """The journal of one file.  ``part``: the file while it is written, in ``folder``.  ``key``: what it is made of.

    ``rounding``: its ``outcomes`` are kept, too.
    """

    folder: Path
    name: str
    key: str
    rounding: ByMoments
    found: dict[str, JournalEntry] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)

    @property
    def part(self) -> Path:
        return self.folder / f"{self.name}.part"

    @property
    def earlier(self) -> Path:
        return self.folder / f"{self.name}.earlier"

    def begin(self) -> None:
        """Take over what an interrupted run with the same key wrote."""
        try:
            state = record(JournalRecord, Workspace(self.folder).read(JOURNAL))
            self.found = state.tensors if (state.key, state.name) == (self.key, self.name) else {}
        except (OSError, ValueError):
            self.found = {}
        if self.found and not self.earlier.exists() and self.part.exists():
            os.replace(self.part, self.earlier)
        if not self.found or not self.earlier.exists():
            self.found = {}
            self.earlier.unlink(missing_ok=True)
        self.left = set(self.found)

    def kept(self, tensor: Encoded) -> JournalEntry | None:
        """The entry of a tensor that an earlier run wrote, None if there is none or its bytes are damaged."""
        name = tensor.tensor.name
        entry = self.found.get(name) if name in self.left else None
        if entry is None or entry.n_bytes != tensor.nbytes or entry.at < 0:
            return None
        check = 0
        for block in _blocks(self.earlier, entry.at, entry.n_bytes):
            check = zlib.crc32(block, check)
        return entry if check == entry.checksum else None

    def add(self, tensor: Encoded, at: int, file: IO[bytes]) -> None:
        """Note a tensor that has just been written at ``at``."""
        file.flush()
        os.fsync(file.fileno())
        check = 0
        for block in _blocks(self.part, at, tensor.nbytes):
            check = zlib.crc32(block, check)
        name = tensor.tensor.name
        outcome = self.rounding.outcomes[name]
        self.found[name] = JournalEntry(at, tensor.nbytes, check, outcome, tensor.squares)
        Workspace(self.folder).write(JOURNAL, plain(JournalRecord(self.key, self.name, self.found)))

    def passed(self) -> None:
        """The new file has all that the earlier one had, which is removed."""
        if self.earlier.exists():
            sync(self.part)
            self.earlier.unlink()


def _blocks(path: Path, at: int, n_bytes: int) -> Iterator[bytes]:
    """The bytes of a part of a file; fewer if it ends before."""
    with open(path, "rb") as file:
        file.seek(at)
        while n_bytes and (block := file.read(min(CHUNK, n_bytes))):
            n_bytes -= len(block)
            yield block


@dataclass
class Kept:
    """A tensor for ``GGUFWriter.write_tensor_data`` that is copied from an earlier run's file if it is there."""

    encoded: Encoded
    journal: Journal

    @property
    def nbytes(self) -> int:
        return self.encoded.nbytes

    def tofile(self, file: IO[bytes]) -> None:
        journal, name = self.journal, self.encoded.tensor.name
        if (entry := journal.kept(self.encoded)) is not None:
            for block in _blocks(journal.earlier, entry.at, entry.n_bytes):
                file.write(block)
            journal.rounding.outcomes[name], self.encoded.squares = entry.outcome, entry.squares
        else:
            at = file.tell()
            self.encoded.tofile(file)
            if isinstance(self.encoded.encoder, MomentsEncoder):
                journal.add(self.encoded, at, file)
        journal.left.discard(name)
        if not journal.left:
            file.flush()
            journal.passed()
