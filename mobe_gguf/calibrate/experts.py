"""Inputs of a layer's routed experts, and also their outputs where not all experts' weights fit into memory.

The experts are processed one after the other, each over all its tokens, so memory holds the sums of only one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mobe_gguf.calibrate.roots import add_products, directions, mirror, root, size_of
from mobe_gguf.calibrate.runnable import Runnable
from mobe_gguf.calibrate.workspace import LayersWorkspace, States
from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.formats.safetensors import Entry

#: Number of an expert's tokens that are computed at once.
ROWS = 4096


@dataclass
class Fed:
    """The inputs of a layer's experts: x ``[T, d]``, each token's experts ``index`` ``[T, k]`` and the router's
    ``weights`` ``[T, k]``."""

    x: States
    index: torch.Tensor
    weights: torch.Tensor
    done: int = 0

    @classmethod
    def new(cls, work: LayersWorkspace, tokens: int, d: int, k: int, dtype: torch.dtype) -> Fed:
        x = work.new("fed", (tokens, d), dtype)
        return cls(x, torch.empty(tokens, k, dtype=torch.int32), torch.empty(tokens, k))

    def add(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        rows = slice(self.done, self.done + len(x))
        self.x.tensor[rows] = x.cpu()
        self.index[rows], self.weights[rows] = index.cpu().int(), weights.cpu().float()
        self.done += len(x)

    def seen(self, n: int, sizes: Sequence[int]) -> list[list[int]]:
        """How many tokens of each text each of ``n`` experts saw.  ``sizes``: tokens of each text, in order."""
        parts = self.index.split(list(sizes))
        return [torch.bincount(part.flatten(), minlength=n).tolist() for part in parts]

    def by_expert(self, n: int) -> list[torch.Tensor]:
        """Positions of each expert in the flattened ``index``, in the order of the text."""
        flat = self.index.flatten()
        return list(flat.argsort(stable=True).split(torch.bincount(flat, minlength=n).tolist()))


def watch(layer: int, module: nn.Module, p: int, take: Callable[..., None]) -> Any:
    """Add a hook that passes the arguments of ``module`` to ``take``.

    The module is called as ``experts(x [T, d], index [T, k], weights [T, k])``, with positional or named arguments.  It
    has what :class:`ExpertForm` says.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        known = len(given) >= 3 and given[1].shape == given[2].shape
        if not known or ExpertForm(module).p != p:
            raise MobeError(f"layer {layer}: transformers calls the experts in a way that is not known here")
        x = given[0].reshape(-1, given[0].shape[-1])
        take(x, given[1].reshape(len(x), -1), given[2].reshape(len(x), -1))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


class ExpertForm:
    """How transformers' class of experts (``integrations/moe.py``) stores and combines its matrices.

    ``kinds``: projections of the first of its two tensors, gate and up or up alone; ``down_proj`` is the other.
    """

    def __init__(self, module: nn.Module):
        self.module: Any = module
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
        product = x @ matrix.T
        if self.biased:
            product += self._bias(self.name, e, product)
        return self.module._apply_gate(product) if self.gated else self.module.act_fn(product)

    def output(self, hidden: torch.Tensor, down: torch.Tensor, e: int) -> torch.Tensor:
        product = hidden @ down.T
        return product + self._bias("down_proj", e, product) if self.biased else product

    def _bias(self, name: str, e: int, like: torch.Tensor) -> torch.Tensor:
        return getattr(self.module, f"{name}_bias")[e].to(like)


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


class Experts:
    """The experts of one MoE layer of ``checkpoint``, run over all their inputs ``fed``."""

    def __init__(self, checkpoint: Runnable, layer: int, module: nn.Module, fed: Fed, work: LayersWorkspace, dtype: torch.dtype, device: str):  # fmt: skip
        self.checkpoint, self.layer, self.fed, self.work = checkpoint, layer, fed, work
        self.form = ExpertForm(module)
        self.dtype, self.device = dtype, device
        self.n, self.d, self.p = checkpoint.n_expert, checkpoint.n_embd, checkpoint.n_ff_exp
        self.places = fed.by_expert(self.n)

    def run(self, out: States | None, keep: float, rank: int | None) -> tuple[list[Entry], dict[str, str]]:
        """Return the tensors of the moments file (see docs/format.md) and the GGUF tensors that they weigh.  If ``out``
        ``[T, d]``, float32, is given, the experts' outputs are written to it.

        Every expert's moments include PRIOR of the average expert's tokens, with the layer's average moments.
        """
        gate_stem, down_stem = (f"blk.{self.layer}.ffn_{x}_exps" for x in (self.form.kinds[0], "down"))
        mean = self._mean_of_inputs()
        size = size_of(mean, gate_stem) * (1 + PRIOR)
        k = directions(mean, keep) if rank is None else min(rank, self.d)
        gate = _Roots(self.work, "gate", self.n, self.d, k)
        down_sums = self.work.new("sums", (self.n, self.p, self.p), torch.float32)
        down_mean = torch.zeros(self.p, self.p, dtype=torch.float64)
        for e in range(self.n):
            fed, hidden = self._expert(e, out)
            gate.put(e, mirror(fed).add_(mean, alpha=PRIOR).div_(size))
            down_sums.tensor[e] = mirror(hidden).cpu()
            down_mean += down_sums.tensor[e]
        del mean
        down_mean = (down_mean / self.n).float()
        down_size = size_of(down_mean, down_stem) * (1 + PRIOR)
        k = directions(down_mean, keep) if rank is None else self.p
        down = _Roots(self.work, "down", self.n, self.p, k)
        for e in range(self.n):
            sums = down_sums.tensor[e].to(self.device)
            down.put(e, (sums + PRIOR * down_mean.to(sums)) / down_size)
        down_sums.remove()
        counts = torch.tensor([len(p) for p in self.places], dtype=torch.int32)
        entries = []
        for stem, roots, of in ((gate_stem, gate, size), (down_stem, down, down_size)):
            entries += roots.entries(stem)
            entries.append(Entry.of(f"{stem}.scale", torch.tensor([of / (1 + PRIOR) / self.fed.done])))
            entries.append(Entry.of(f"{stem}.tokens", counts))
        weighs = {names.transform_name(self.layer, x): gate_stem for x in self.form.kinds}
        return entries, weighs | {names.transform_name(self.layer, "down"): down_stem}

    def _mean_of_inputs(self) -> torch.Tensor:
        """``[d, d]``, the average of all experts' sums.  Each token counts once, with the sum of its squared weights."""
        sums = torch.zeros(self.d, self.d, device=self.device)
        strength = self.fed.weights.square().sum(1).sqrt()
        for rows in torch.arange(self.fed.done).split(ROWS):
            x = self.fed.x.tensor[rows].to(self.device).float()
            add_products(sums, x * strength[rows, None].to(x))
        return mirror(sums).div_(self.n)

    def _expert(self, e: int, out: States | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of one expert's inputs: ``[d, d]`` for gate and up, ``[p, p]`` for down."""
        sums = torch.zeros(self.d, self.d, device=self.device)
        hidden_sums = torch.zeros(self.p, self.p, device=self.device)
        if not len(self.places[e]):
            return sums, hidden_sums
        gate_up, down = self._weights(e, out is not None)
        k = self.fed.index.shape[1]
        for places in self.places[e].split(ROWS):
            tokens = places // k
            x = self.fed.x.tensor[tokens].to(self.device).float()
            weight = self.fed.weights.view(-1)[places, None].to(x)
            add_products(sums, x * weight)
            if self.form.scales_inputs:
                x, weight = x * weight, torch.ones_like(weight)
            hidden = self.form.hidden(x, gate_up, e)
            add_products(hidden_sums, hidden * weight)
            if out is not None:
                out.tensor[tokens] += (
                    self.form.output(hidden, down, e) * weight
                ).cpu()  # a token has an expert once: no row twice
        return sums, hidden_sums

    def _weights(self, e: int, with_down: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's weights: values in the model's type, as float32."""
        form = self.form
        first, down = (form.module._parameters[name] for name in (form.name, "down_proj"))
        if first.device.type != "meta":
            return form.stored(first[e]).float(), form.stored(down[e]).float()

        def read(kind: str) -> torch.Tensor:
            return self.checkpoint.expert(self.layer, kind, e).to(self.device, self.dtype).float()

        matrix = form.joined([read(kind) for kind in form.kinds])
        return matrix, read("down") if with_down else matrix


class _Roots:
    """Roots of all experts, in scratch files with the layout of the layer's file."""

    def __init__(self, work: LayersWorkspace, name: str, n: int, d: int, k: int):
        self.k = k
        self.roots = work.new(f"{name}-root", (n, d, k), torch.float16)
        self.rests = work.new(f"{name}-rest", (n, d), torch.float16) if k < d else None

    def put(self, e: int, sums: torch.Tensor) -> None:
        found, rest = root(sums, self.k, seed=e)
        self.roots.tensor[e] = found
        if self.rests is not None:
            assert rest is not None
            self.rests.tensor[e] = rest

    def entries(self, stem: str) -> list[Entry]:
        parts = [("root", self.roots), *([("rest", self.rests)] if self.rests is not None else [])]
        return [
            Entry.copy(f"{stem}.{name}", "F16", part.shape, part.file, 0, part.file.stat().st_size)
            for name, part in parts
        ]

    def remove(self) -> None:
        for part in (self.roots, self.rests):
            if part is not None:
                part.remove()
