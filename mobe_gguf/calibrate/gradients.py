"""The loss's gradients at the outputs of experts' matrices, which weigh their inputs in the metric.

    S_e = E[ g^2 r x x^T ]     over the tokens routed to expert e; g: the router's weight;  r = |dL/d(W_e x)| / g

L is the cross-entropy with tokens that are sampled from the model's own predictions, so the expected product of two gradients is
the Fisher information, which is what the KL divergence is to second order.  The norm r and not its square weighs a token: one sample
of a gradient is noisy, and this is the geometric mean of the metrics with gradients and without (docs/calibration.md).  The purpose
is that of GLAS in MoBiE (arXiv 2604.06798) and of GuidedQuant (arXiv 2505.07004).

The states that enter every layer are kept in files.  Then the gradient goes backward, one layer at a time, with the layer computed
once more: memory of one layer with all its experts, (layers + 1) sets of states on the disk, the time of four forward passes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from safetensors import safe_open
from torch import nn

from mobe_gguf.calibrate.experts import ExpertForm, PairGradients, by_expert, fill
from mobe_gguf.calibrate.layers import BESIDE, LayerRun, Run
from mobe_gguf.calibrate.skeleton import Call
from mobe_gguf.calibrate.workspace import States
from mobe_gguf.core.atomic import rename
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import describe_size
from mobe_gguf.core.memory import own_memory
from mobe_gguf.formats.safetensors import Entry
from mobe_gguf.models.original import SourceModel

#: Values of logits that are computed at once, but at least those of a chunk.
LOGITS = 1 << 25
#: Tokens that an expert needs for each of its inputs: with 20 gradients do harm, with 60 they help.
NEEDED = 60


def experts_bytes(checkpoint: SourceModel, itemsize: int) -> int:
    """Memory of a layer's experts, all at once."""
    each = len(checkpoint.family.kinds) * checkpoint.n_ff_exp * checkpoint.n_embd
    return int(BESIDE * each * checkpoint.n_expert * itemsize)


class GradientRun(Run):
    """Runs the model forward and backward over its texts.  What is finished stays in ``work`` after any kill:

    states-003                      what enters layer 3
    gradient-003                    the loss's gradient by it, float32; of the layer that was finished last alone
    layer-003.safetensors           of layer 3's experts, see :class:`~mobe_gguf.calibrate.experts.PairGradients`
    """

    mode = staticmethod(torch.no_grad)

    def run(self) -> None:
        n = len(self.skeleton.layers)
        begin, reached = max(self._there("states"), default=None), min(self._there("gradient"), default=None)
        if reached is not None:
            self._remove_after(reached)
        if reached == 0:
            return
        calls = self._embed(begin is None)
        begin = begin or 0
        self.bar.found(begin if reached is None else 2 * n - reached)
        for layer in range(begin, n if reached is None else 0):
            states = self._states(self.work.states_file(layer))
            after = self.work.new("states", self.shape, self.skeleton.dtype)
            with self._loaded(layer, [c[layer] for c in calls], states, after) as run:
                run.forward()
            self._keep(after, f"states-{layer + 1:03d}")
            self._advance(layer, "forward")
        if reached is None:
            self._loss(n)
            reached = n
        for layer in range(reached - 1, -1, -1):
            self._backward(layer, [c[layer] for c in calls])
            self._remove_after(layer)
            self._advance(layer, "backward")

    def _live(self) -> int:
        """With what the experts keep for the way back."""
        c = self.checkpoint
        return super()._live() + 2 * c.n_expert_used * (2 * c.n_embd + 3 * c.n_ff_exp)

    def gradients_of(self, layer: int) -> PairGradients:
        """Of a MoE layer's experts."""
        with safe_open(self.work.layer_file(f"{layer:03d}"), framework="pt") as file:
            return PairGradients(*(file.get_tensor(name) for name in ("index", "gate", "down")))

    # files

    def _there(self, name: str) -> list[int]:
        found = (re.fullmatch(rf"{name}-(\d+)", file.name) for file in self.work.path.glob(f"{name}-*"))
        return [int(one[1]) for one in found if one]

    def _remove_after(self, layer: int) -> None:
        """What is not needed once the gradient at the input of ``layer`` is known."""
        for name in ("gradient", "states"):
            for i in self._there(name):
                if i > layer or (name == "states" and layer == 0):
                    (self.work.path / f"{name}-{i:03d}").unlink()

    def _keep(self, states: States, name: str) -> None:
        states.sync()
        rename(states.file, self.work.path / name)

    def _advance(self, layer: int, way: str) -> None:
        self.bar.advance(1, f"layer {layer} {way}: {describe_size(own_memory(), 1)} in memory")

    # the ways

    @contextlib.contextmanager
    def _loaded(self, layer: int, calls: list[Call], states: States, after: States) -> Iterator[WholeLayer]:
        self.skeleton.load(layer)
        with torch.no_grad():
            run = WholeLayer(self, layer, calls, states, after)
            run.module.requires_grad_(False)
            with run.answering():
                yield run
        self.skeleton.drop(layer)

    def _loss(self, n: int) -> None:
        """The gradient at the last layer's output."""
        states, (work, _, device) = self._states(self.work.states_file(n)), self.place
        found = work.new("gradient", self.shape, torch.float32)
        vocabulary = self.checkpoint.shape(self.checkpoint.family.embedding)[0]
        step = max(1, LOGITS // (vocabulary * self.shape[1]))
        with self.skeleton.whole_output():
            for begin in range(0, len(self.tokens), step):
                self.bar.update(f"loss: {begin} of {len(self.tokens)} chunks")
                chunks = slice(begin, begin + step)
                hidden = states.tensor[chunks].to(device, copy=True).requires_grad_()
                with torch.enable_grad():
                    logits = self.skeleton.logits(self.tokens[chunks], hidden)
                with torch.no_grad():
                    slope = logits.float().softmax(-1).flatten(0, 1)
                    if not torch.isfinite(slope).all():
                        raise MobeError(
                            f"the model's logits are NaN or Inf in chunks {begin} to {begin + step}"
                        )
                    labels = torch.multinomial(slope, 1, generator=torch.Generator(device).manual_seed(begin))
                    slope.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=slope.dtype))
                (gradient,) = torch.autograd.grad(logits, hidden, slope.view(logits.shape).to(logits))
                found.tensor[chunks] = gradient.float().cpu()
        self._keep(found, f"gradient-{n:03d}")

    def _backward(self, layer: int, calls: list[Call]) -> None:
        """The gradients at the input of ``layer`` and at its experts."""
        states = self._states(self.work.states_file(layer))
        after = States(self.work.path / f"gradient-{layer + 1:03d}", self.shape, torch.float32)
        before = self.work.new("gradient", self.shape, torch.float32)
        with self._loaded(layer, calls, states, after) as run:
            run.backward(before)
        if run.pairs is not None:
            self._write(f"{layer:03d}", run.pairs.entries(layer), {})
        self._keep(before, f"gradient-{layer:03d}")


class WholeLayer(LayerRun):
    """A layer with all its weights, which can be run both ways.  ``after``: its outputs, or the gradients by them."""

    pairs: _Pairs | None = None

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Load the experts, and compute them one after the other, so that none of transformers' functions for many at once is asked
        for gradients."""
        if self.number not in self.checkpoint.moe_layers:
            yield
            return
        inner, (_, dtype, device), c = self.expert_module(), self.run.place, self.checkpoint
        fill(inner, c, self.number, dtype, device)
        self.pairs = _Pairs(inner, c.n_expert, self.run.tokens.numel(), c.n_expert_used)
        with self._replaced(inner, self.pairs.answer):
            yield

    def forward(self) -> None:
        self._forward(self.after)

    def backward(self, before: States) -> None:
        """From the gradient by the outputs, ``after``, that by the inputs."""
        for number, call in enumerate(self.calls):
            self.run.bar.update(f"layer {self.number} backward: {number} of {len(self.calls)} batches")
            hidden = self.run.part(self.states, number).to(self.skeleton.device, copy=True).requires_grad_()
            with torch.enable_grad():
                out = self.module(hidden, *call.args, **call.kwargs)
            out = out[0] if isinstance(out, tuple) else out
            (gradient,) = torch.autograd.grad(out, hidden, self.run.part(self.after, number).to(out))
            self._check(number, gradient)
            self.run.part(before, number).copy_(gradient)


class _Pairs:
    """Loaded experts that note the gradients at the outputs of their matrices, token after token."""

    def __init__(self, module: nn.Module, n: int, tokens: int, k: int):
        self.form, self.n, self.k, self.at = ExpertForm(module), n, k, 0
        self.index = torch.zeros(tokens, k, dtype=torch.int32)
        self.gate, self.down = torch.zeros(2, tokens, k).unbind()

    def answer(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Outputs ``[T, d]`` for inputs x ``[T, d]``, their experts ``index`` and ``weights`` ``[T, k]``."""
        form, begin = self.form, self.at
        self.at = (begin + len(x)) % len(self.index)
        self.index[begin : begin + len(x)] = index.cpu()
        first, last = (form.module._parameters[name] for name in (form.name, "down_proj"))
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for e, places in enumerate(by_expert(index, self.n)):
            if not len(places):
                continue
            tokens, weight = places // self.k, weights.reshape(-1)[places, None].float()
            own = torch.ones_like(weight) if form.scales_inputs else weight
            fed = (x[tokens] * weight).to(x.dtype) if form.scales_inputs else x[tokens]
            product = form.product(fed, form.stored(first[e]), e)
            output = form.output(form.combined(product), form.stored(last[e]), e).float()
            if product.requires_grad:
                where, by = begin * self.k + places.cpu(), own.detach()[:, 0].clamp_min(1e-6)
                product.register_hook(_note(self.gate, where, by))
                output.register_hook(_note(self.down, where, by))
            out.index_add_(0, tokens, output * own)
        return out.to(x.dtype)

    def entries(self, layer: int) -> list[Entry]:
        """The tensors of the layer's file; MobeError if there is no gradient."""
        down, means = self.down.mean(1), []
        for found in (self.gate, down):
            means.append(float(found.double().mean()))
            if not 0 < means[-1] < float("inf"):
                raise MobeError(f"layer {layer}: the loss's gradient at its experts is zero or not finite")
        scaled = {"index": self.index, "gate": self.gate / means[0], "down": down / means[1]}
        return [Entry.of(name, tensor) for name, tensor in scaled.items()]


def _note(to: torch.Tensor, places: torch.Tensor, by: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that stores the norm of a gradient's rows, over ``by``, at ``places`` of the flattened ``to``."""

    def hook(gradient: torch.Tensor) -> None:
        to.view(-1)[places] = (gradient.float().norm(dim=-1) / by).cpu()

    return hook
