"""Inputs of a layer's routed experts, and also their outputs where not all experts' weights fit into memory.

down's inputs are summed while the experts run, each on its tokens.  gate's and up's inputs are kept, and summed after that,
one expert at a time: with many channels in the subspace of the layer's strongest directions (:class:`.roots.Subspace`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from mobe_gguf.calibrate.roots import MOST, Subspace, add_products, directions, mirror, root, size_of
from mobe_gguf.calibrate.runnable import Runnable
from mobe_gguf.calibrate.workspace import LayersWorkspace, States
from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.formats.moments import GRADIENT
from mobe_gguf.formats.safetensors import Entry

#: Number of an expert's tokens that are computed at once.
ROWS = 4096
#: Rows are padded to a multiple of this: oneDNN compiles and keeps a product for each number of rows.
PADDED = 32
#: Step of the central differences of an activation.
STEP = 1e-2
#: Rows whose slopes are computed at once.
PIECE = 256


@dataclass
class Fed:
    """The inputs of a layer's experts: x ``[T, d]``, each token's experts ``index`` ``[T, k]`` and the router's
    ``weights`` ``[T, k]``.

    ``metric`` ``[T, k]``: the factor of gate's and up's inputs in the sums, known when the experts have run.  ``gradients``: of the loss
    at the experts' matrices, if known.
    """

    x: States
    index: torch.Tensor
    weights: torch.Tensor
    metric: torch.Tensor
    gradients: PairGradients | None = None
    done: int = 0

    @classmethod
    def new(
        cls, work: LayersWorkspace, tokens: int, d: int, k: int, dtype: torch.dtype, name: str = "fed"
    ) -> Fed:
        index, weights, metric = torch.empty(tokens, k, dtype=torch.int32), *torch.empty(2, tokens, k)
        return cls(work.new(name, (tokens, d), dtype), index, weights, metric)

    def add(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        rows = slice(self.done, self.done + len(x))
        self.x.tensor[rows] = x.cpu()
        self.index[rows], self.weights[rows] = index.cpu().int(), weights.cpu().float()
        self.done += len(x)

    def leave_out(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Add, and answer nothing."""
        self.add(x, index, weights)
        return torch.zeros_like(x)

    def emphasis(self, places: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """``[rows]``: what multiplies the router's weights in the metric of gate and up, at ``places`` of the flattened ``index``.
        ``slope`` ``[rows]``: see :meth:`ExpertForm.slope`."""
        if self.gradients is None:
            return slope.cpu().sqrt()
        return self.gradients.gate_of(self.index, places).sqrt()

    def down_emphasis(self, places: torch.Tensor) -> torch.Tensor:
        """``[rows or 1]``: the same of down."""
        if self.gradients is None:
            return torch.ones(1)
        return self.gradients.down[places // self.index.shape[1]].float().sqrt()

    def seen(self, n: int, sizes: Sequence[int]) -> list[list[int]]:
        """How many tokens of each text each of ``n`` experts saw.  ``sizes``: tokens of each text, in order."""
        parts = self.index.split(list(sizes))
        return [torch.bincount(part.flatten(), minlength=n).tolist() for part in parts]


@dataclass(frozen=True)
class PairGradients:
    """Sizes of the loss's gradients at one layer's experts, over the router's weights, 1 on average; see ``gradients``.

    ``gate`` ``[T, k]`` at gate's and up's outputs of expert ``index`` ``[T, k]``, ``down`` ``[T]`` at down's.
    """

    index: torch.Tensor
    gate: torch.Tensor
    down: torch.Tensor

    def gate_of(self, index: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """``[rows]`` for ``places`` of a flattened ``index`` ``[T, k]``; where an expert was not the token's, the mean of those that
        were."""
        tokens = places // index.shape[1]
        same = self.index[tokens].int() == index.view(-1)[places, None].int()
        gate = self.gate[tokens].float()
        return torch.where(same.any(-1), (gate * same).sum(-1), gate.mean(-1))


def gradient_entries(layer: int, found: PairGradients) -> list[Entry]:
    """Their tensors in a file of moments."""
    parts = {"index": found.index.short(), "gate": found.gate.half(), "down": found.down.half()}
    return [Entry.of(GRADIENT.format(layer, part), tensor) for part, tensor in parts.items()]


def by_expert(index: torch.Tensor, n: int) -> list[torch.Tensor]:
    """Positions of each of n experts in the flattened ``index``, in the order of the text."""
    flat = index.flatten()
    return list(flat.argsort(stable=True).split(torch.bincount(flat, minlength=n).tolist()))


def given(layer: int, module: nn.Module, p: int, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """``(x [T, d], index [T, k], weights [T, k])`` of a call ``experts(x, index, weights)``, positional or named.  ``module`` has
    what :class:`ExpertForm` says; MobeError if not."""
    found = [*args, *kwargs.values()]
    known = len(found) >= 3 and found[1].shape == found[2].shape
    if not known or ExpertForm(module).p != p:
        raise MobeError(f"layer {layer}: transformers calls the experts in a way that is not known here")
    x = found[0].reshape(-1, found[0].shape[-1])
    return x, found[1].reshape(len(x), -1), found[2].reshape(len(x), -1)


class ExpertForm:
    """How transformers' class of experts (``integrations/moe.py``) stores and combines its matrices.

    ``kinds``: projections of the first of its two tensors, gate and up or up alone; ``down_proj`` is the other.
    """

    def __init__(self, module: Any):
        self.module = module
        self.gated = getattr(module, "has_gate", True)
        self.kinds = ("gate", "up") if self.gated else ("up",)
        self.name = "gate_up_proj" if self.gated else "up_proj"
        self.transposed = getattr(module, "is_transposed", False)
        self.biased = getattr(module, "has_bias", False)
        self.scales_inputs = getattr(module, "scales_inputs", False)

    @property
    def p(self) -> int | None:
        """Inner size of an expert; None if the class has no such tensor."""
        tensor = getattr(self.module, self.name, None)
        if tensor is None or not hasattr(self.module, "act_fn" if not self.gated else "_apply_gate"):
            return None
        return int(tensor.shape[-1 if self.transposed else -2]) // len(self.kinds)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(getattr(self.module, name).shape)

    def joined(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """One expert's share of the first tensor, ``[2p, d]`` or ``[p, d]``."""
        if len(matrices) == 1 or getattr(self.module, "is_concatenated", True):
            return torch.cat(list(matrices))
        return torch.stack(list(matrices), 1).flatten(0, 1)

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix as the class has it."""
        return matrix.T if self.transposed else matrix

    def hidden(self, x: torch.Tensor, matrix: torch.Tensor, e: int) -> torch.Tensor:
        """Inputs of down, of the expert's inputs x and its ``joined`` matrix."""
        return self.combined(self.product(x, matrix, e))

    def product(self, x: torch.Tensor, matrix: torch.Tensor, e: int) -> torch.Tensor:
        """Outputs of gate and up, or of up alone, as the class has them beside each other."""
        product = x @ matrix.T
        return product + self._bias(self.name, e, product) if self.biased else product

    def combined(self, product: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.module._apply_gate(product) if self.gated else self.module.act_fn(product)
        return found

    def slope(self, product: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """``[rows]``: how much small errors of ``product`` change the expert's output, root of the sum over its values.

        ``squares`` ``[p]``: :func:`squares_of` the expert's down.  They multiply the slopes of :meth:`combined`, which is element by
        element; these by central differences.
        """
        steps = [torch.zeros(product.shape[-1], device=product.device) for _ in self.kinds]
        for i, step in enumerate(steps):
            if len(steps) == 1 or getattr(self.module, "is_concatenated", True):
                step.chunk(len(steps))[i].fill_(STEP)
            else:
                step[i::2] = STEP
        return torch.cat([self._slope(part.float(), steps, squares) for part in product.split(PIECE)])

    def _slope(self, product: torch.Tensor, steps: list[torch.Tensor], squares: torch.Tensor) -> torch.Tensor:
        changes = (self.combined(product + step) - self.combined(product - step) for step in steps)
        found = sum(change.square_() @ squares for change in changes)
        return torch.as_tensor(found).sqrt() / (2 * STEP)

    def output(self, hidden: torch.Tensor, down: torch.Tensor, e: int) -> torch.Tensor:
        product = hidden @ down.T
        return product + self._bias("down_proj", e, product) if self.biased else product

    def _bias(self, name: str, e: int, like: torch.Tensor) -> torch.Tensor:
        return getattr(self.module, f"{name}_bias")[e].to(like)


def squares_of(down: torch.Tensor) -> torch.Tensor:
    """``[p]`` float32: squared norms of the columns of ``down`` ``[d, p]``."""
    return torch.linalg.vector_norm(down, dim=0, dtype=torch.float32).square()


def fill(module: nn.Module, checkpoint: Runnable, layer: int, dtype: torch.dtype, device: str) -> None:
    """Load all experts' weights of a layer, one by one."""
    form = ExpertForm(module)
    first, down = (
        torch.empty(form.shape(name), dtype=dtype, device=device) for name in (form.name, "down_proj")
    )
    for e in range(checkpoint.n_expert):
        first[e] = form.stored(form.joined([checkpoint.expert(layer, x, e) for x in form.kinds]))
        down[e] = form.stored(checkpoint.expert(layer, "down", e))
    module._parameters[form.name] = nn.Parameter(first, requires_grad=False)
    module._parameters["down_proj"] = nn.Parameter(down, requires_grad=False)


class ExpertSums:
    """Sums of what a layer's experts are ``fed``, and of down's inputs.  ``kinds``: projections before down; ``sizes``: n, d and p."""

    def __init__(
        self,
        layer: int,
        kinds: Sequence[str],
        sizes: tuple[int, int, int],
        fed: Fed,
        work: LayersWorkspace,
        device: str = "cpu",
    ):
        self.layer, self.kinds, self.fed, self.work, self.device = layer, kinds, fed, work, device
        self.n, self.d, self.p = sizes
        self.down_sums = work.new(f"sums-{layer}", (self.n, self.p, self.p), torch.float32)

    def moments(self, keep: float, rank: int | None) -> tuple[list[Entry], dict[str, str]]:
        """Return the tensors of the moments file (see docs/format.md) and the GGUF tensors that they weigh; call this once all
        have run.

        Every expert's moments include PRIOR of the average expert's tokens, with the layer's average moments.
        """
        places = by_expert(self.fed.index, self.n)
        counts = torch.tensor([len(p) for p in places], dtype=torch.int32)
        entries = []
        for stem, (roots, size) in (
            (self.kinds[0], self._inputs(places, keep, rank)),
            ("down", self._hidden(keep, rank)),
        ):
            name = f"blk.{self.layer}.ffn_{stem}_exps"
            entries += roots.entries(name)
            entries.append(Entry.of(f"{name}.scale", torch.tensor([size / (1 + PRIOR) / self.fed.done])))
            entries.append(Entry.of(f"{name}.tokens", counts))
        gate_stem, down_stem = (f"blk.{self.layer}.ffn_{x}_exps" for x in (self.kinds[0], "down"))
        weighs = {names.transform_name(self.layer, x): gate_stem for x in self.kinds}
        return entries, weighs | {names.transform_name(self.layer, "down"): down_stem}

    def _inputs(self, places: list[torch.Tensor], keep: float, rank: int | None) -> tuple[StoredRoots, float]:
        """StoredRoots of gate's and up's inputs, and the size of their average."""
        mean = self._mean_of_inputs()
        size = size_of(mean, f"blk.{self.layer}.ffn_{self.kinds[0]}_exps") * (1 + PRIOR)
        if self.d > MOST:
            mean_diagonal, subspace = mean.diagonal().clone(), Subspace.of(mean, keep, rank)
            del mean
            return self._in_subspace(places, subspace, mean_diagonal, size), size
        k = directions(mean, keep) if rank is None else min(rank, self.d)
        roots = StoredRoots(self.work, "gate", self.n, self.d, k)
        for e, at in enumerate(places):
            sums = torch.zeros(self.d, self.d, device=self.device)
            for x, weight in self._rows(self.fed.x, at):
                add_products(sums, x * weight)
            roots.put(e, *root(mirror(sums).add_(mean, alpha=PRIOR).div_(size), k, seed=e))
        return roots, size

    def _in_subspace(
        self, places: list[torch.Tensor], subspace: Subspace, mean_diagonal: torch.Tensor, size: float
    ) -> StoredRoots:
        k = subspace.basis.shape[1]
        projected = self.work.new("projected", (self.fed.done, k), torch.float32)
        for rows in torch.arange(self.fed.done).split(ROWS):
            projected.tensor[rows] = (self.fed.x.tensor[rows].to(self.device).float() @ subspace.basis).cpu()
        roots = StoredRoots(self.work, "gate", self.n, self.d, k)
        for e, at in enumerate(places):
            sums, diagonal = torch.zeros(k, k, device=self.device), PRIOR * mean_diagonal
            for x, weight in self._rows(projected, at):
                add_products(sums, x * weight)
            for x, weight in self._rows(self.fed.x, at):
                diagonal += (x * weight).square_().sum(0)
            sums = mirror(sums).add_(subspace.mean, alpha=PRIOR).div_(size)
            roots.put(e, *subspace.root(sums, diagonal / size))
        projected.remove()
        return roots

    def _rows(self, of: States, at: torch.Tensor) -> Any:
        """``(x [rows, d] float32, weight [rows, 1])`` of an expert's tokens, piece by piece."""
        k = self.fed.index.shape[1]
        for places in at.split(ROWS):
            x = of.tensor[places // k].to(self.device).float()
            yield x, self.fed.metric.view(-1)[places, None].to(x)

    def _hidden(self, keep: float, rank: int | None) -> tuple[StoredRoots, float]:
        """StoredRoots of down's inputs, and the size of their average."""
        mean = torch.zeros(self.p, self.p, dtype=torch.float64)
        for sums in self.down_sums.tensor:
            mean += mirror(sums)
        mean = (mean / self.n).float()
        size = size_of(mean, f"blk.{self.layer}.ffn_down_exps") * (1 + PRIOR)
        k = directions(mean, keep) if rank is None else self.p
        roots = StoredRoots(self.work, "down", self.n, self.p, k)
        for e in range(self.n):
            sums = self.down_sums.tensor[e].to(self.device)
            roots.put(e, *root((sums + PRIOR * mean.to(sums)) / size, k, seed=e))
        self.down_sums.remove()
        return roots, size

    def _mean_of_inputs(self) -> torch.Tensor:
        """``[d, d]``, the average of all experts' sums.  Each token counts once, with the sum of its squared factors."""
        sums = torch.zeros(self.d, self.d, device=self.device)
        strength = self.fed.metric.square().sum(1).sqrt()
        for rows in torch.arange(self.fed.done).split(ROWS):
            x = self.fed.x.tensor[rows].to(self.device).float()
            add_products(sums, x * strength[rows, None].to(x))
        return mirror(sums).div_(self.n)


class Experts(ExpertSums):
    """The experts of one MoE layer of ``checkpoint``: their answers, and the moments of their inputs ``fed``."""

    def __init__(self, checkpoint: Runnable, layer: int, module: nn.Module, fed: Fed, work: LayersWorkspace, dtype: torch.dtype, device: str):  # fmt: skip
        self.checkpoint, self.form, self.dtype = checkpoint, ExpertForm(module), dtype
        sizes = checkpoint.n_expert, checkpoint.n_embd, checkpoint.n_ff_exp
        super().__init__(layer, self.form.kinds, sizes, fed, work, device)
        self._squares: dict[int, torch.Tensor] = {}

    def answer(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Outputs ``[T, d]`` for inputs x ``[T, d]``, from loaded weights, as transformers computes them; down's inputs are
        summed."""
        begin = self.fed.done * index.shape[1]
        self.fed.add(x, index, weights)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        form = self.form
        first, last = (form.module._parameters[name] for name in (form.name, "down_proj"))
        for e, places in enumerate(by_expert(index, self.n)):
            if len(places):
                tokens = places // index.shape[1]
                both, down = form.stored(first[e]), form.stored(last[e])
                # an expert has a token once
                out[tokens] += self._expert(e, x[tokens], begin + places.cpu(), both, down)
        return out.to(x.dtype)

    def one_by_one(self, out: States) -> None:
        """Read each expert, apply it to all its tokens, and add the outputs to ``out`` ``[T, d]``.  In float32: the products of
        bf16 that oneDNN compiles take more memory than the expert."""
        k = self.fed.index.shape[1]
        for e, at in enumerate(by_expert(self.fed.index, self.n)):
            if not len(at):
                continue
            both, down = self.form.joined([self._read(x, e) for x in self.form.kinds]), self._read("down", e)
            for places in at.split(ROWS):
                x = self.fed.x.tensor[places // k].to(self.device).float()
                out.tensor[places // k] += self._expert(e, x, places, both, down).cpu()

    def _read(self, kind: str, e: int) -> torch.Tensor:
        """One expert's matrix: values in the model's type, as float32."""
        return self.checkpoint.expert(self.layer, kind, e).to(self.device, self.dtype).float()

    def _expert(
        self, e: int, x: torch.Tensor, places: torch.Tensor, both: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        """Weighted outputs of one expert, float32; adds what down is fed to its sum, and weighs the inputs for gate's and up's.

        ``places``: of the inputs x among all, flattened.
        """
        rows, fed = len(x), self.fed
        weight = fed.weights.view(-1)[places, None].to(x.device)
        if self.form.scales_inputs:
            x, weight = (x * weight).to(x.dtype), torch.ones_like(weight)
        product = self.form.product(pad(x, (0, 0, 0, -rows % PADDED)), both, e)
        hidden = self.form.combined(product)
        if e not in self._squares:
            self._squares[e] = squares_of(down)
        slope = self.form.slope(product[:rows], self._squares[e])
        fed.metric.view(-1)[places] = fed.weights.view(-1)[places] * fed.emphasis(places, slope)
        inputs = hidden[:rows].float() * (weight * fed.down_emphasis(places)[:, None].to(weight))
        sums = self.down_sums.tensor[e]
        if sums.device == x.device:
            add_products(sums, inputs)
        else:
            part = torch.zeros(sums.shape, device=x.device)
            add_products(part, inputs)
            sums += part.cpu()
        return self.form.output(hidden, down, e)[:rows].float() * weight


class StoredRoots:
    """StoredRoots of all experts, in scratch files with the layout of the layer's file."""

    def __init__(self, work: LayersWorkspace, name: str, n: int, d: int, k: int):
        self.k = k
        self.roots = work.new(f"{name}-root", (n, d, k), torch.float16)
        self.rests = work.new(f"{name}-rest", (n, d), torch.float16) if k < d else None

    def put(self, e: int, found: torch.Tensor, rest: torch.Tensor | None) -> None:
        self.roots.tensor[e] = found
        if self.rests is not None:
            assert rest is not None
            self.rests.tensor[e] = rest

    def entries(self, stem: str) -> list[Entry]:
        parts = [("root", self.roots), *([("rest", self.rests)] if self.rests is not None else [])]
        return [Entry.whole(f"{stem}.{name}", "F16", part.shape, part.file) for name, part in parts]
