"""How errors of the experts are weighed: the metric in which the solver minimises.

    || (W_i - A_i Z_i) S_i^(1/2) ||^2

S is the second moment of the layer's inputs, E[x x^T].  With it the error is that of the experts' outputs, not of
their matrices.  f is applied to the unscaled Z, so S only transforms columns: every method takes ``[n, a, d]`` of some
experts and multiplies from the right.

Down is fitted transposed, so its inputs correspond to the rows of W and A.  No f lies between these.  The metric is then
applied to W before the fit (:meth:`apply_rows`) and undone in A afterwards (:meth:`solve_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mobe_gguf.core.errors import MobeError

#: Least second moment of a direction, relative to the mean.  Without it A would be undetermined in directions that the
#: calibration text never uses.
FLOOR = 1e-4

#: Every expert gets this share of the average expert's tokens in addition, with the average moments, so that an expert
#: that saw few tokens or none still counts.
PRIOR = 0.1

#: Shrinkage of second moments from t tokens of d inputs: off the diagonal they are reduced by the share
#: ``1 / (1 + TRUSTED t / d)``.
TRUSTED = 0.2


def shrinkage(tokens: float, d: int) -> float:
    """Share of the diagonal in the shrunk second moments: ``(1 - share) S + share diag(S)``.

    Few tokens show spurious correlations, and one text shows correlations that other texts lack.  For independent
    normal inputs, Schaefer and Strimmer (2005, target D) give the share 0.02 at t = 3.6 d.  Measured, 0.5 and more is
    best there (docs/quality.md).
    """
    return 1.0 / (1.0 + TRUSTED * tokens / d)


@dataclass(frozen=True)
class Roots:
    """Full second moments of each expert's own inputs: ``S_e = root_e root_e^T + diag(rest_e)``.

    ``root`` ``[n, d, k]``; ``rest`` ``[n, d]``, or None where k = d.
    """

    root: torch.Tensor
    rest: torch.Tensor | None = None

    def channels(self) -> torch.Tensor:
        """The diagonals alone, as ``[n, 1, d]``."""
        squares = torch.stack([root.double().square().sum(-1) for root in self.root])
        return (squares if self.rest is None else squares + self.rest)[:, None]


@dataclass(frozen=True)
class Metric:
    """A root R of S with ``S = R R^T``: None (identity), ``[d]`` or ``[n, d]`` (diagonal), ``[d, d]`` (full), or
    ``[n, d, k]`` (full for each expert).

    With ``rest`` ``[n, d]`` the last kind is ``R = [root, diag(rest)]``, and matrices in the metric have k + d columns.
    S is scaled to a mean diagonal of 1, so the metric does not change the magnitude of the problem.
    """

    root: torch.Tensor | None = None
    per_expert: bool = False
    rest: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor | Roots | None, n_expert: int, d: int) -> Metric:
        """From second moments: None, ``[d]`` mean squares of the channels, ``[n, 1, d]`` the same for each expert,
        ``[d, d]`` the full matrix, or :class:`Roots`.  MobeError if the values cannot be second moments.
        """
        if weight is None:
            return cls()
        if isinstance(weight, Roots):
            return cls._of_roots(weight, n_expert, d)
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
            root = weight.clamp_min(FLOOR).sqrt().float()
            return cls(root[:, 0] if root.dim() == 3 else root, per_expert=root.dim() == 3)
        values, vectors = torch.linalg.eigh((weight + weight.T) / 2)
        return cls((vectors * values.clamp_min(FLOOR).sqrt()).float())

    @classmethod
    def _of_roots(cls, weight: Roots, n_expert: int, d: int) -> Metric:
        if weight.root.dim() != 3 or tuple(weight.root.shape[:2]) != (n_expert, d):
            raise MobeError(
                f"input moments have shape {list(weight.root.shape)}; expected [{n_expert}, {d}, k]"
            )
        scale = float(weight.channels().mean())
        if not 0 < scale < float("inf"):
            raise MobeError("input moments must be finite and not all zero")
        rest = None if weight.rest is None else (weight.rest.double() / scale).clamp_min(FLOOR).sqrt().float()
        root = torch.empty_like(weight.root)
        for scaled, given in zip(root, weight.root, strict=True):  # one expert at a time in float64
            scaled.copy_(given.double() / scale**0.5)
        return cls(root, True, rest)

    def slice(self, experts: slice, like: torch.Tensor) -> Metric:
        """The metric of a run of experts, with the device and type of ``like``."""
        if self.root is None:
            return self
        root = self.root[experts] if self.per_expert else self.root
        rest = None if self.rest is None else self.rest[experts].to(like)
        return Metric(root.to(like), self.per_expert, rest)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x R`` for x ``[n, a, d]``."""
        if self.root is None:
            return x
        if self.root.dim() == 3:
            y = torch.bmm(x, self.root)
            return y if self.rest is None else torch.cat([y, x * self.rest[:, None]], -1)
        if self.per_expert:
            return x * self.root[:, None]
        return x * self.root if self.root.dim() == 1 else x @ self.root

    def apply_rows(self, x: torch.Tensor) -> torch.Tensor:
        """``R^T x`` for x ``[n, d, a]``."""
        return self.apply(x.transpose(1, 2)).transpose(1, 2)

    def solve_rows(self, x: torch.Tensor) -> torch.Tensor:
        """``R^-T x`` for x ``[n, d, a]``: undoes :meth:`apply_rows`."""
        if self.root is None:
            return x
        if self.root.dim() == 3 and self.rest is not None:
            raise ValueError("the root [root, diag(rest)] of a metric has no inverse")
        if self._is_full:
            return torch.linalg.solve(self.root.mT, x)
        return x / self.root[..., None]

    def adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """``x R^T``: takes a gradient with respect to ``apply(x)`` to one with respect to x."""
        if self.root is None or not self._is_full:
            return self.apply(x)
        if self.rest is None:
            return x @ self.root.mT
        k = self.root.shape[2]
        return torch.baddbmm(x[..., k:] * self.rest[:, None], x[..., :k], self.root.mT)

    @property
    def _is_full(self) -> bool:
        return self.root is not None and self.root.dim() == (3 if self.per_expert else 2)
