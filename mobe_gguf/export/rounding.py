"""Rounding by second moments as a stage of export: what ``--moments`` does.

``quant.rounding`` rounds every matrix whose inputs are in the file of moments, if codes of its type can be chosen; one
run of rows at a time.  libggml rounds everything else, with the moments' diagonal (or an imatrix) as weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.metric import PRIOR, Roots, shrinkage
from mobe_gguf.core.sides import side
from mobe_gguf.export.encoder import Encoder, EncodeRows, Nearest
from mobe_gguf.export.imatrix import Importance
from mobe_gguf.export.report import Rounded
from mobe_gguf.export.source import Tensor
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.factors import FactorDirectory, MobeLayer
from mobe_gguf.quant.rounding.rounder import ROUNDED, Outcome, Rounder


def matrix(roots: Roots, e: int, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """S of expert ``e``, ``[d, d]`` float32.  With ``tokens`` ``[n]`` it is shrunk off its diagonal, more if there were
    fewer tokens."""
    s = roots.root[e] @ roots.root[e].T
    if roots.rest is not None:
        s.diagonal().add_(roots.rest[e])
    return s if tokens is None else shrunk(s, behind(tokens, e))


def behind(tokens: torch.Tensor, e: int) -> float:
    """Tokens behind the moments of expert ``e``: its own, and the share of the layer's mean that all experts have."""
    return float(tokens[e]) + PRIOR * float(tokens.float().mean())


def shrunk(s: torch.Tensor, tokens: float) -> torch.Tensor:
    """Shrink ``s`` off its diagonal, in place, by ``core.metric.shrinkage``."""
    diagonal = s.diagonal().clone()
    s.mul_(1 - shrinkage(tokens, len(s)))
    s.diagonal().copy_(diagonal)
    return s


@dataclass
class ByMoments:
    """A :class:`~.encoder.Rounding` by a file of second moments; ``outcomes``: results of the tensors written so far,
    by name.

    ``factors``: names of A's; under these the file has the inputs of the experts that they replace.
    """

    moments: Moments
    factors: frozenset[str] = frozenset()
    device: str = "cpu"
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def fingerprint(self) -> Hashable:
        return "moments", self.moments.checksum

    def encoder(self, tensor: Tensor, type_name: str, importance: Importance | None) -> Encoder:
        if type_name not in ROUNDED or tensor.name in self.factors or not covers(self.moments, tensor):
            return Nearest().encoder(tensor, type_name, importance)
        return MomentsEncoder(self, tensor.name, type_name)

    def said(self, name: str) -> str | None:
        """The result for a tensor that has been written; None if libggml rounded it."""
        outcome = self.outcomes.get(name)
        return None if outcome is None else str(outcome)

    def report(self) -> Rounded | None:
        """The mean over all tensors, whose relative errors count alike; None if there was none."""
        found = [outcome for outcome in self.outcomes.values() if outcome.size > 0]
        if not found:
            return None
        before, after = (sum(getattr(one, what) / one.size for one in found) for what in ("before", "after"))
        return Rounded(len(found), before / len(found), after / len(found), max(one.damping for one in found))


@dataclass(frozen=True)
class MomentsEncoder:
    """Encodes one tensor, one run of rows at a time: each takes all cores, and the matrix's moments are in memory."""

    rounding: ByMoments
    name: str
    type: str

    by_matrix = True

    def open(self) -> EncodeRows:
        roots, tokens = self.rounding.moments.find(self.name), self.rounding.moments.tokens(self.name)
        assert roots is not None, self.name
        lock = threading.Lock()
        ready: dict[int, Any] = {}
        outcome = self.rounding.outcomes[self.name] = Outcome()

        def encode(rows: torch.Tensor, number: int, name: str) -> np.ndarray:
            with lock:
                e = number if len(roots.root) > 1 else 0
                if e not in ready:
                    ready.clear()
                    ready[e] = self._rounder(roots, e, tokens)
                data, one = ready[e].encode(rows, self.type, name)
                outcome.add(one)
                return data

        return encode

    def _rounder(self, roots: Roots, e: int, tokens: torch.Tensor | None) -> Rounder:
        try:
            return Rounder(matrix(roots, e, tokens), self.rounding.device)
        except MobeError as error:
            where = f"{self.rounding.moments.path}: {self.name}, matrix {e}"
            raise MobeError(
                f"{where}: {error.message}; make the moments again, on a longer --text"
            ) from error


def covers(moments: Moments, tensor: Tensor) -> bool:
    """Whether the file has the inputs of ``tensor``.  MobeError if they are of a tensor of another shape."""
    shape = moments.shape(tensor.name)
    if shape is None:
        return False
    *matrices, _, row = tensor.source.shape
    n = int(np.prod(matrices))
    if shape[1] != row or shape[0] not in (1, n):
        raise MobeError(
            f"{moments.path}: has {shape[0]} x {shape[1]} inputs of {tensor.name}, the model has {n} x {row}: the moments are "
            "of another model. Make them with: mobe-gguf moments MODEL FILE --text TEXT"
        )
    return True


def few_tokens(moments: Moments, names: Iterable[str]) -> str | None:
    """A warning about experts that saw fewer tokens than they have input channels: their moments are mostly the layer's
    mean.

    None if there are no such experts, or the file does not say.
    """
    found: dict[str, list[int]] = {}
    for name in names:
        stem, shape, tokens = moments.stem(name), moments.shape(name), moments.tokens(name)
        if stem is None or shape is None or tokens is None or shape[0] == 1:
            continue
        if few := (tokens < shape[1]).nonzero().flatten().tolist():
            found[stem] = few
    if not found:
        return None

    def listed(experts: list[int]) -> str:
        return ", ".join(map(str, experts[:8])) + (
            f" and {len(experts) - 8} more" if len(experts) > 8 else ""
        )

    lines = "; ".join(f"{stem}: {listed(experts)}" for stem, experts in list(found.items())[:8])
    more = f"; and {len(found) - 8} more sets of inputs" if len(found) > 8 else ""
    return (
        f"experts that saw fewer tokens than they have inputs are rounded mostly by their layer's mean: {lines}{more}. Make the moments on a longer "
        "--text"
    )


def diagonals(moments: Moments, tensors: Mapping[str, Tensor]) -> dict[str, Importance]:
    """Weights of the columns of all tensors whose inputs are in the file: the moments' diagonals."""

    def reader(name: str, n: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            roots = moments.find(name)
            assert roots is not None, name
            return np.broadcast_to(roots.channels()[:, 0].float().numpy(), (n, roots.root.shape[1]))

        return read

    found = {}
    for name, tensor in tensors.items():
        if len(tensor.source.shape) >= 2 and covers(moments, tensor):
            n = int(np.prod(tensor.source.shape[:-2]))
            found[name] = Importance(f"{Path(moments.path).name} (second moments)", reader(name, n))
    return found


def bases(moments: Moments, factors: FactorDirectory) -> dict[str, Importance]:
    """Weights of the columns of gate's and up's bases: for basis j, ``sum_i mix_ij^2 diag(S_i)`` over the experts that
    use it."""

    def reader(layer: MobeLayer, projection: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            checkpoint = layer.checkpoint
            n, row = checkpoint.n_expert, checkpoint.expert_shape(layer.index, projection)[1]
            channels = moments.weight(layer.index, projection, n, row).channels()[:, 0]
            shares = layer.mix(projection).double().square()
            shares = shares.flatten(2).mean(-1) if shares.dim() == 3 else shares
            groups = layer.group_count(projection)
            parts = zip(shares.chunk(groups), channels.chunk(groups), strict=True)
            found = torch.cat([share.T @ squares for share, squares in parts])
            unused = ~(found.amax(-1) > 0)  # encoders refuse weights that are all zero
            found[unused] = channels.mean(0)
            return found.float().numpy()

        return read

    found = {}
    for index in factors.moe_layers:
        layer = factors.layer(index)
        for projection in layer.projections:
            if not side(projection).output and names.transform_name(index, projection) in moments:
                origin = f"{Path(moments.path).name} (second moments)"
                found[names.basis_name(index, projection)] = Importance(origin, reader(layer, projection))
    return found
