"""The share of tokens that are sent to the same experts as in the reference.

A file whose weights moved chooses other experts for some tokens.  MoBiE (arXiv 2604.06798) calls that the routing's shift.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate.logits import scored
from mobe_gguf.runtime.choices import choices


class ExpertsKept:
    """Compares files with ``reference`` on the evaluated tokens of the first ``chunks`` chunks of ``text``.

    UsageError if the reference has no routed experts; MobeError if it does not run.
    """

    def __init__(self, reference: Path, text: Path, ctx: int, chunks: int, threads: int | None):
        self.run = text, ctx, chunks, threads
        self.part = slice(ctx // 2, ctx // 2 + scored(ctx))
        self.reference, self.name = choices(reference, *self.run), reference
        if not self.reference:
            raise UsageError(f"--experts: {reference} has no routed experts; leave the option out")

    def shares(self, file: Path) -> dict[int, float]:
        """Share of tokens that have all their experts in common, by layer.  MobeError if the file has other layers or does not
        run."""
        found = choices(file, *self.run)
        if sorted(found) != sorted(self.reference):
            raise MobeError(
                f"{file}: it has routed experts in {len(found)} layers, {self.name} in {len(self.reference)}; compare files of one model"
            )
        return {layer: self._share(own, found[layer]) for layer, own in sorted(self.reference.items())}

    def _share(self, a: np.ndarray, b: np.ndarray) -> float:
        if a.shape != b.shape:
            raise MobeError(
                f"{self.name}: its tokens have {a.shape[-1]} experts, the other file's {b.shape[-1]}"
            )
        return float((a[:, self.part] == b[:, self.part]).all(-1).mean())
