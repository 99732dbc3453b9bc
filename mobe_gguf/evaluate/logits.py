"""The file of logits: the reference's distribution for every evaluated token.

``llama-perplexity --kl-divergence-base`` writes it: ``_logits_``, then int32 ctx, n_vocab and chunks, then the chunks'
tokens.  For each evaluated token follow 16 bits for each entry of the vocabulary (logarithms of probabilities, down to
16 below the largest). The program ignores anything after these, so our note on the file's origin is appended there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.core.atomic import destination
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import describe_sizes

MAGIC = b"_logits_"


@dataclass(frozen=True)
class LogitsLayout:
    """Sizes of one file; the second half of each chunk of ``ctx`` tokens is evaluated."""

    n_vocab: int
    ctx: int
    chunks: int

    @property
    def scored(self) -> int:
        """Evaluated tokens, over all chunks."""
        return scored(self.ctx) * self.chunks

    @property
    def n_bytes(self) -> int:
        # a row is padded to an even length and begins with two float32: scale and minimum
        row = 2 * (2 * ((self.n_vocab + 1) // 2) + 4)
        return len(MAGIC) + 3 * 4 + 4 * self.ctx * self.chunks + self.scored * row

    def check(self, path: Path, signed: bool = False) -> None:
        """MobeError unless ``path`` is a complete file of this layout, ``signed`` or not: the program does not notice a
        full disk."""
        size = path.stat().st_size if path.is_file() else 0
        with contextlib.ExitStack() as stack:
            head = stack.enter_context(open(path, "rb")).read(20) if size >= 20 else b""
        expected = MAGIC + struct.pack("<3i", self.ctx, self.n_vocab, self.chunks)
        if head != expected or size < self.n_bytes or (size > self.n_bytes and not signed):
            raise MobeError(
                f"{path}: llama-perplexity wrote {size} bytes of the reference's logits, expected {self.n_bytes} "
                f"({self.chunks} chunks of {self.ctx} tokens, {self.n_vocab} in the vocabulary). Is the disk full? "
                "Set TMPDIR to a larger one, or ask for fewer --chunks."
            )

    def sign(self, path: Path, origin: Mapping[str, object]) -> None:
        """Append to the logits at ``path`` their ``origin``, as plain values."""
        with open(path, "ab") as file:
            file.write(json.dumps(origin).encode())

    def check_origin(self, path: Path, origin: Mapping[str, object]) -> None:
        """MobeError unless ``path`` is a complete file of this layout that :meth:`sign` signed with the same
        ``origin``."""
        self.check(path, signed=True)
        with open(path, "rb") as file:
            file.seek(self.n_bytes)
            raw = file.read()
        try:
            found = json.loads(raw)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise MobeError(
                f"{path}: what model, text and settings these logits are of is not noted in it; delete it, and it is made again"
            )
        for key, expected in origin.items():
            if found.get(key) != expected:
                raise MobeError(
                    f"{path}: these logits are of another {key} ({found.get(key)}, expected {expected}); delete the file, and it "
                    "is made again"
                )


def scored(ctx: int) -> int:
    """Evaluated tokens of a chunk: those after its first half."""
    return ctx - 1 - ctx // 2


@contextlib.contextmanager
def place(layout: LogitsLayout, keep: Path | None) -> Iterator[Path]:
    """Where to write the logits: ``keep``, or a temporary directory that is removed.  MobeError if there is no room."""
    if keep is not None:
        parent = destination(keep).absolute().parent
        if not parent.is_dir():
            raise MobeError(f"{keep}: there is no directory {parent}; make it, or name another file")
        _check_room(parent, layout.n_bytes)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-eval-") as directory:
        _check_room(Path(directory), layout.n_bytes)
        yield Path(directory) / "logits"


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        wanted, there = describe_sizes(needed, free)
        raise MobeError(
            f"{directory}: the reference's logits take {wanted}, {there} are free. "
            "Ask for fewer --chunks, set TMPDIR to a larger disk, or name a file there with --keep-logits."
        )
