"""The file between the two runs: the reference's distribution for every evaluated token.

Written by ``llama-perplexity --kl-divergence-base``: ``_logits_``, then int32 ctx, n_vocab and chunks, the chunks' tokens, and
for each evaluated token 16 bits for each of the vocabulary (logarithms of probabilities, down to 16 below the largest).
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.core.atomic import destination
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import describe_sizes

MAGIC = b"_logits_"


@dataclass(frozen=True)
class Layout:
    """Sizes of one file; of each chunk of ``ctx`` tokens the second half is evaluated."""

    n_vocab: int
    ctx: int
    chunks: int

    @property
    def scored(self) -> int:
        """Evaluated tokens, over all chunks."""
        return scored(self.ctx) * self.chunks

    @property
    def n_bytes(self) -> int:
        # a row is padded to an even length, and begins with two float32: scale and least value
        row = 2 * (2 * ((self.n_vocab + 1) // 2) + 4)
        return len(MAGIC) + 3 * 4 + 4 * self.ctx * self.chunks + self.scored * row

    def check(self, path: Path) -> None:
        """MobeError unless ``path`` is a whole file of this layout: the program does not notice a full disk."""
        size = path.stat().st_size if path.is_file() else 0
        with contextlib.ExitStack() as stack:
            head = stack.enter_context(open(path, "rb")).read(20) if size >= 20 else b""
        expected = MAGIC + struct.pack("<3i", self.ctx, self.n_vocab, self.chunks)
        if head != expected or size != self.n_bytes:
            raise MobeError(
                f"{path}: llama-perplexity wrote {size} bytes of the reference's logits, expected {self.n_bytes} "
                f"({self.chunks} chunks of {self.ctx} tokens, {self.n_vocab} in the vocabulary). Is the disk full? "
                "Set TMPDIR to a larger one, or ask for fewer --chunks."
            )


def scored(ctx: int) -> int:
    """Evaluated tokens of a chunk: those that follow its first half."""
    return ctx - 1 - ctx // 2


@contextlib.contextmanager
def place(layout: Layout, keep: Path | None) -> Iterator[Path]:
    """Where to write it: ``keep``, or a temporary directory that is removed.  MobeError if there is no room."""
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
