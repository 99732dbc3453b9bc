"""What an error of the experts costs: the inner product that the solver minimises in.

    || (W_i - A_i Z_i) S_i^(1/2) ||^2

S is the second moment of the layer's inputs, E[x x^T]: with it the error is that of the experts' outputs, not of
their matrices.  f works on the unscaled Z, so S enters only as a change of columns: every method takes ``[n, a, d]``
of some experts and multiplies from the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mobe_gguf.errors import MobeError


@dataclass(frozen=True)
class Metric:
    """A root R of S with ``S = R R^T``: None (identity), ``[d]`` or ``[n, d]`` (diagonal), or ``[d, d]`` (full).

    Scaled such that the mean of S's diagonal is 1: the metric does not change the size of the problem.
    """

    root: torch.Tensor | None = None
    per_expert: bool = False

    @classmethod
    def of(cls, weight: torch.Tensor | None, n_expert: int, d: int) -> Metric:
        """From second moments: None, ``[d]`` mean squares of the channels, ``[n, 1, d]`` the same for each expert,
        or ``[d, d]`` the full matrix.  MobeError if the values cannot be second moments.
        """
        if weight is None:
            return cls()
        weight = weight.detach().double()
        if tuple(weight.shape) not in ((d,), (d, d), (n_expert, 1, d)):
            raise MobeError(
                f"input weights have shape {list(weight.shape)}; expected [{d}], [{n_expert}, 1, {d}] or [{d}, {d}]"
            )
        diagonal = weight.diagonal() if weight.dim() == 2 else weight
        if not torch.isfinite(weight).all() or (diagonal < 0).any() or diagonal.sum() <= 0:
            raise MobeError("input weights must be finite, not negative and not all zero")
        weight = weight / diagonal.mean()
        if weight.dim() != 2:
            # A channel that the calibration text never fed must still be kept in bounds, or A is undetermined there.
            root = weight.clamp_min(1e-4).sqrt().float()
            return cls(root[:, 0] if root.dim() == 3 else root, per_expert=root.dim() == 3)
        values, vectors = torch.linalg.eigh((weight + weight.T) / 2)
        return cls((vectors * values.clamp_min(1e-4).sqrt()).float())

    def slice(self, experts: slice, like: torch.Tensor) -> Metric:
        """The metric of a run of experts, with the device and type of ``like``."""
        if self.root is None:
            return self
        root = self.root[experts] if self.per_expert else self.root
        return Metric(root.to(like), self.per_expert)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x R`` for x ``[n, a, d]``."""
        if self.root is None:
            return x
        if self.per_expert:
            return x * self.root[:, None]
        return x * self.root if self.root.dim() == 1 else x @ self.root

    def adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """``x R^T``: takes a gradient with respect to ``apply(x)`` to one with respect to x."""
        return x @ self.root.T if self.root is not None and self._is_full else self.apply(x)

    @property
    def _is_full(self) -> bool:
        return not self.per_expert and self.root.dim() == 2
