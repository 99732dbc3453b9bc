"""The projected problem: the loss as a function of basis and mix alone.  A is solved for exactly.

For one group of experts, all in the metric of :mod:`metric` (W and Z already multiplied by its root):

    Z_i = f( sum_j alpha_ij B_j )                                      [r, d]
    A_i = W_i Z_i^T (Z_i Z_i^T + lambda_i I)^-1                        [p, r],  lambda_i = ridge trace(Z_i Z_i^T) / r
    loss = sum_i |W_i - A_i Z_i|^2 + lambda_i |A_i|^2 = sum_i |W_i|^2 - <A_i, W_i Z_i^T>

A minimises the loss, so its own change with Z does not matter to first order (variable projection, Golub and
Pereyra 1973).  The gradient is therefore the partial gradient at fixed A, without a derivative of the Cholesky factor:

    dloss/dZ_i = 2 (A_i^T A_i + ridge |A_i|^2 / r) Z_i - 2 A_i^T W_i

The second term in the bracket comes from lambda's dependence on Z.  With it neither the loss nor the gradient changes
with the scale of Z.  Cost per expert: two products of p r d multiply-adds, two of r r d, one Cholesky factorization of
size r.  Experts are processed in blocks: besides W and the parameters, memory holds only one block's matrices.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.metric import Metric


class SingularError(ArithmeticError):
    """A Gram matrix was not positive definite, or the loss not finite."""


_lock = threading.Lock()
_users = 0
_before = "highest"


@contextmanager
def fast_products() -> Iterator[None]:
    """While any thread is inside, torch may take its fastest float32 matrix products.

    On CUDA these are TF32.  On a CPU they are oneDNN's: twice as fast as MKL's on an AMD Zen 5, in full float32
    (bfloat16 only where the CPU has AMX).  Operands are rounded before they are multiplied.  The product is thus still
    a Gram matrix, of a Z that differs by less than the ridge can resolve.  The stored A is solved for in float64.
    """
    global _users, _before
    with _lock:
        if not _users:
            _before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                torch.set_float32_matmul_precision(_before)


@cache
def rounds_products() -> bool:
    """Whether fast products on this CPU round their operands to bfloat16, as AMX does.

    A product with the inverse then loses what the ridge resolves: in emulation a loss of 0.0114 was computed as 0.0072.
    """
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def activated(u: torch.Tensor, activation: str) -> torch.Tensor:
    """:func:`activate`.  On a CPU tanh uses torch's sigmoid, which takes a quarter of the time of torch's tanh."""
    if activation == "tanh" and not u.is_cuda:
        return torch.sigmoid(2 * u).mul_(2).sub_(1)
    return activate(u, activation)


def combine_gradient(
    g: torch.Tensor, mix: torch.Tensor, basis: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Backward pass of :func:`combine`, given its result's gradient g ``[n, r, d]``: adds B's gradient to ``out`` and
    returns that of the mix."""
    if mix.dim() == 2:
        out.view(out.shape[0], -1).addmm_(mix.T, g.flatten(1))
        return g.flatten(1) @ basis.flatten(1).T
    if mix.dim() == 4:
        sides = g.transpose(1, 2), mix[:, :, 0], basis.transpose(1, 2), out.transpose(1, 2)
        return combine_gradient(*sides)[:, :, None]
    rows, basis_rows = g.transpose(0, 1), basis.transpose(0, 1)  # [r, n, d], [r, m, d]
    out += torch.bmm(mix.permute(2, 1, 0), rows).transpose(0, 1)
    return torch.bmm(rows, basis_rows.transpose(1, 2)).permute(1, 2, 0)


def derivative_(g: torch.Tensor, u: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    """``g * f'(u)`` in place of g; ``z = f(u)``."""
    if activation == "tanh":
        return g.addcmul_(g * z, z, value=-1)
    if activation == "silu":
        s = torch.sigmoid(u)
        return g.mul_(s.addcmul_(s * (1 - s), u))
    return g


def solve_transform(w: torch.Tensor, z: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``(A, W Z^T)`` for w ``[n, p, d]``, z ``[n, r, d]``, both in the metric; SingularError if that fails."""
    gram = torch.bmm(z, z.transpose(1, 2))
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += ridge * diagonal.mean(1, keepdim=True)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.any():
        raise SingularError(f"the Gram matrix of expert {int(info.nonzero()[0])} of a block is singular")
    product = torch.bmm(w, z.transpose(1, 2))
    if z.dtype == torch.float32 and not z.is_cuda and not rounds_products():
        # 1.5 ms instead of 3.2: LAPACK solves a batch one by one, but the product with the inverse is fast.
        return torch.bmm(product, torch.cholesky_inverse(factor)), product
    return torch.cholesky_solve(product.transpose(1, 2), factor).transpose(1, 2), product


@dataclass(frozen=True)
class Projected:
    """One group's problem.  ``w`` ``[n, p, d]`` is normalised and in the metric.  It may be on another device than basis
    and mix; one block at a time is then copied.  ``block``: number of experts processed at once.
    """

    w: torch.Tensor
    activation: str
    metric: Metric
    ridge: float
    block: int

    @cached_property
    def mean_square(self) -> float:
        """Mean square of ``w``; a loss divided by it is relative."""
        return float(sum(x.square().sum(dtype=torch.float64) for x in self.w)) / self.w.numel()

    def blocks(self) -> list[slice]:
        n = self.w.shape[0]
        return [slice(i, min(i + self.block, n)) for i in range(0, n, self.block)]

    def loss_and_gradient(
        self, basis: torch.Tensor, mix: torch.Tensor, basis_grad: torch.Tensor, mix_grad: torch.Tensor
    ) -> float:
        """Loss of the group per element of W.  Its gradient, at the same scale, is written to ``basis_grad``, ``mix_grad``."""
        basis_grad.zero_()
        explained = torch.zeros((), dtype=torch.float64, device=basis.device)
        for s in self.blocks():
            w, metric = self.w[s].to(basis.device), self.metric.slice(s, basis)
            u = combine(mix[s], basis)
            z = activated(u, self.activation)
            zm = metric.apply(z)
            a, product = solve_transform(w, zm, self.ridge)
            explained += a.flatten().dot(product.flatten()).double()
            inner = torch.bmm(a.transpose(1, 2), a)
            diagonal = inner.diagonal(dim1=1, dim2=2)
            diagonal += self.ridge * diagonal.mean(1, keepdim=True)
            g = torch.bmm(inner, zm)
            g.baddbmm_(a.transpose(1, 2), w, beta=2.0, alpha=-2.0)
            g = derivative_(metric.adjoint(g), u, z, self.activation)
            mix_grad[s] = combine_gradient(g, mix[s], basis, basis_grad)
        loss = self.mean_square - float(explained) / self.w.numel()
        if not math.isfinite(loss):
            raise SingularError("the loss is not finite")
        basis_grad /= self.w.numel()
        mix_grad /= self.w.numel()
        return loss

    def transform(self, basis: torch.Tensor, mix: torch.Tensor, full_size: bool = False) -> torch.Tensor:
        """A of every expert, ``[n, p, r]``, float32 on W's device.  It is computed one expert at a time in float64,
        because the Gram matrix squares Z's condition number.

        ``full_size``: A is scaled so that ``<A Z, W> = |W|^2``.  Least squares makes A Z too small, by the relative error.
        """
        out = torch.empty(*self.w.shape[:2], basis.shape[1], device=self.w.device)
        for i in range(self.w.shape[0]):
            s = slice(i, i + 1)
            z = activate(combine(mix[s].double(), basis.double()), self.activation)
            zm = self.metric.slice(s, z).apply(z)
            w = self.w[s].to(basis.device).double()
            a, product = solve_transform(w, zm, self.ridge)
            size = float((a * product).sum())
            if full_size and size > 0:
                a = a * (float(w.square().sum()) / size)
            out[s] = a.float()
        return out
