"""Runs a model layer by layer: all chunks of the text go through one layer, then the next layer's weights are loaded.

Peak memory: the layer's matrices, with all its routed experts if these fit in the budget, else one expert at a time; the
sums of some matrices' inputs; a batch of tokens.  This is O(model / layers), whatever the length of the text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mobe_gguf.calibrate.dense import Names, Sum, Watch, gguf_names
from mobe_gguf.calibrate.experts import Experts, Fed, PairGradients, fill, given, gradient_entries
from mobe_gguf.calibrate.runnable import Runnable
from mobe_gguf.calibrate.skeleton import Call, Skeleton
from mobe_gguf.calibrate.workspace import LayersWorkspace, States
from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import describe_size
from mobe_gguf.core.memory import own_memory
from mobe_gguf.core.progress import Bar
from mobe_gguf.formats.moments import KEY_SEEN, KEY_WEIGHS
from mobe_gguf.formats.safetensors import Entry, write_safetensors

#: Tokens sent through a layer at once, where memory allows.
BATCH = 4096
#: Share of the free memory that may be used without ``--memory``.
SHARE = 0.8
#: Memory of a layer's experts when all are loaded, as a multiple of their weights.
BESIDE = 1.25
#: A layer adds its experts' outputs, and does nothing else with them, if its output differs by no more than this share of them.
ROUNDING = 0.02
#: Values in memory for each token in a layer, as multiples of the hidden and the widest inner size; measured.
LIVE = 24


@dataclass(frozen=True)
class MomentSettings:
    """How moments are collected: see the options of ``mobe-gguf moments``."""

    keep: float = 0.999
    rank: int | None = None
    memory: int | None = None


class Run:
    """A model's layers, one after the other, over ``texts``, each ``[chunks, ctx]``."""

    #: torch's mode in which it runs.
    mode: Callable[[], contextlib.AbstractContextManager[Any]] = staticmethod(torch.inference_mode)
    #: The loss's gradients at a layer's experts, see ``gradients``; None: they are not known.
    gradients: Callable[[int], PairGradients] | None = None

    def __init__(
        self,
        skeleton: Skeleton,
        texts: Sequence[torch.Tensor],
        work: LayersWorkspace,
        settings: MomentSettings,
        budget: float,
        bar: Bar,
    ):
        self.skeleton, self.work, self.settings, self.bar = skeleton, work, settings, bar
        self.checkpoint: Runnable = skeleton.checkpoint
        self.tokens = tokens = torch.cat(list(texts))
        self.sizes, self.budget = [text.numel() for text in texts], budget
        self.names: Names = gguf_names(self.checkpoint.family.name, self.checkpoint.n_layer)
        self.batches = list(tokens.split(max(1, self._batch() // tokens.shape[1])))
        self.shape = (*tokens.shape, self.checkpoint.hidden_size)
        self.place = work, skeleton.dtype, skeleton.device

    def _batch(self) -> int:
        """Tokens at once: an eighth of the budget."""
        return max(self.tokens.shape[1], min(BATCH, int(self.budget / 8 / (4 * self._live()))))

    def _live(self) -> int:
        """Values in memory for each token."""
        config = self.checkpoint.config
        widest = max(
            v for k, v in config.items() if k in ("hidden_size", "intermediate_size") and isinstance(v, int)
        )
        heads = int(config.get("num_attention_heads") or 1) * int(config.get("head_dim") or 0)
        return LIVE * max(widest, heads)

    def run(self) -> None:
        """Run all layers that are not finished, and the output."""
        begin = self.work.next_layer()
        states = None if begin is None else self._states(self.work.states_file(begin))
        calls = self._embed(states is None)
        if states is None:
            begin, states = 0, self._states(self.work.states_file(0))
        assert begin is not None
        self.bar.found(begin)
        for layer in range(begin, len(self.skeleton.layers)):
            after = self.work.new("states", self.shape, self.skeleton.dtype)
            self._layer(layer, [c[layer] for c in calls], states, after)
            del states
            self.work.finish_layer(layer, after)
            states = self._states(self.work.states_file(layer + 1))
        if not self.work.layer_file("output").is_file():
            self._output(states)

    def _states(self, file: Any) -> States:
        return States(file, self.shape, self.skeleton.dtype)

    def _embed(self, keep: bool) -> list[list[Call]]:
        first = self.work.new("states", self.shape, self.skeleton.dtype) if keep else None

        def take(number: int, hidden: torch.Tensor) -> None:
            if first is not None:
                self.part(first, number).copy_(hidden)

        with self.mode():
            calls = self.skeleton.embed(self.batches, take)
        if first is not None:
            first.sync()
            first.file.rename(self.work.states_file(0))
        return calls

    def part(self, states: States, number: int) -> torch.Tensor:
        """The chunks of a batch."""
        step = len(self.batches[0])
        return states.tensor[number * step : number * step + len(self.batches[number])]

    # one layer

    def _layer(self, layer: int, calls: list[Call], states: States, after: States) -> None:
        self.skeleton.load(layer)
        with torch.inference_mode():
            found = LayerRun(self, layer, calls, states, after)
            entries = found.gather()
        self._write(f"{layer:03d}", entries, found.weighs, found.seen)
        self.skeleton.drop(layer)
        for left in self.work.path.glob("scratch-*"):
            if left != after.file:
                left.unlink()
        self.bar.advance(1, f"layer {layer}: {found.said}, {describe_size(own_memory(), 1)} in memory")

    # after the layers

    def _output(self, states: States) -> None:
        """Inputs of the output matrix."""
        total: Sum | None = None
        with torch.inference_mode():
            for number, ids in enumerate(self.batches):
                x = self.skeleton.head_inputs(ids, self.part(states, number).to(self.skeleton.device))
                if x is None:
                    break
                if total is None:
                    total = Sum.new(1, x.shape[-1], self.tokens.numel(), x.device)
                total.add(x)
            if total is None:
                return
            entries = total.entries("output", self.settings.keep, self.settings.rank)
        # in a GGUF file, an output that is tied to the embeddings is the embeddings' tensor
        names = (
            {"output.weight": "output", "token_embd.weight": "output"}
            if self._tied()
            else {"output.weight": "output"}
        )
        self._write("output", entries, names)

    def _tied(self) -> bool:
        return bool(self.checkpoint.config.get("tie_word_embeddings"))

    def _write(
        self, name: str, entries: list[Entry], weighs: dict[str, str], seen: list[list[int]] | None = None
    ) -> None:
        about = {KEY_WEIGHS: json.dumps(weighs), KEY_SEEN: json.dumps(seen)}
        with atomic_path(self.work.layer_file(name)) as part:
            write_safetensors(part, entries, {"format": "pt", **about})


class LayerRun:
    """Layer ``number`` of a ``run``, with all weights loaded except the experts'.  It computes ``after`` from ``states``."""

    def __init__(self, run: Run, number: int, calls: list[Call], states: States, after: States):
        self.run, self.number, self.calls, self.states, self.after = run, number, calls, states, after
        self.skeleton, self.checkpoint = run.skeleton, run.checkpoint
        self.module = run.skeleton.layers[number]
        prefix = f"{run.skeleton.layers_name}{number}."
        family, text = run.checkpoint.family, run.tokens.numel()
        self.dense = Watch(self.module, prefix, run.names, run.budget / 4, text, family.tiled_heads)
        self.weighs: dict[str, str] = {}
        #: How many tokens of each text each expert saw.
        self.seen: list[list[int]] | None = None
        self.said = "no routed experts"
        self.stored: _Stored | None = None

    def gather(self) -> list[Entry]:
        """Tensors of the layer's file; :attr:`weighs` says which GGUF tensors they weigh."""
        with contextlib.ExitStack() as stack:
            entries = self._experts(stack) if self.number in self.checkpoint.moe_layers else []
            if not self.dense.started:
                with self.dense.on():
                    self._forward(self.after)
            entries += self._dense()
        self.weighs |= self.dense.weighs()
        return entries

    def _forward(self, keep: States | None, first: int | None = None) -> None:
        """Run all batches, in order, or the ``first`` ones."""
        if self.stored is not None:
            self.stored.at = 0
        for number, call in enumerate(self.calls[:first]):
            self.run.bar.update(f"layer {self.number}: {number} of {len(self.calls)} batches")
            self.dense.next_batch()
            hidden = self.run.part(self.states, number).to(self.skeleton.device)
            out = self.module(hidden, *call.args, **call.kwargs)
            out = out[0] if isinstance(out, tuple) else out
            if keep is not None:
                self._check(number, out)
                self.run.part(keep, number).copy_(out)

    def _check(self, number: int, out: torch.Tensor) -> None:
        if torch.isfinite(out).all():
            return
        chunk = int((~torch.isfinite(out)).flatten(1).any(1).nonzero()[0]) + number * len(self.run.batches[0])
        raise MobeError(
            f"layer {self.number} answers NaN or Inf in chunk {chunk} of the text (tokens {chunk * self.run.tokens.shape[1]} and "
            "on); the model's weights are damaged, or its type is too narrow for it. Finished layers are kept."
        )

    def _dense(self) -> list[Entry]:
        """Moments of ordinary matrices, in as many passes as needed."""
        settings, entries = self.run.settings, []
        while True:
            again = bool(self.dense.waiting)
            for stem, found in self.dense.next_pass().items():
                entries += found.entries(stem, settings.keep, settings.rank)
                del found
            if not again:
                return entries
            with self.dense.on():
                self._forward(None)

    # routed experts

    def _experts(self, stack: contextlib.ExitStack) -> list[Entry]:
        """Moments of routed experts.

        If all fit in memory, the layer runs as it is.  Otherwise it runs with experts that add nothing, and their outputs are
        computed one expert after the other and added.  Until ``stack`` closes, the layer's expert module returns these outputs.
        """
        c, inner, (work, dtype, device) = self.checkpoint, self.expert_module(), self.run.place
        tokens = self.run.tokens.numel()
        fed = Fed.new(work, tokens, c.n_embd, c.n_expert_used, dtype)
        if self.run.gradients is not None:
            fed.gradients = self.run.gradients(self.number)
        experts = Experts(c, self.number, inner, fed, work, dtype, device)
        weights = len(c.family.kinds) * c.n_expert * c.n_ff_exp * c.n_embd * dtype.itemsize
        one_by_one = BESIDE * weights > self.run.budget
        if one_by_one:
            with self._replaced(inner, fed.leave_out), self.dense.on():
                self._forward(self.after)
            answers = work.new("answers", (tokens, c.n_embd), torch.float32)
            experts.one_by_one(answers)
            stack.enter_context(self._answering(answers))
            self._complete(answers)
        else:
            fill(inner, c, self.number, dtype, device)
            with self._replaced(inner, experts.answer), self.dense.on():
                self._forward(self.after)
        settings = self.run.settings
        entries, self.weighs = experts.moments(settings.keep, settings.rank)
        if fed.gradients is not None:
            entries += gradient_entries(self.number, fed.gradients)
        self.seen = fed.seen(c.n_expert, self.run.sizes)
        counts = [sum(of) for of in zip(*self.seen, strict=True)]
        self.said = f"{min(counts)} to {max(counts)} tokens an expert" + ", one at a time" * one_by_one
        return entries

    def expert_module(self) -> nn.Module:
        """transformers' module of the layer's routed experts."""
        found = [m for name, m in self.module.named_modules() if name.split(".")[-1] == "experts"]
        if len(found) != 1:
            raise MobeError(
                f"{self.checkpoint.path}: transformers' layer {self.number} has {len(found)} modules `experts`, expected one"
            )
        return found[0]

    @contextlib.contextmanager
    def _answering(self, answers: States) -> Iterator[None]:
        """Make the experts return ``answers``."""
        self.stored = _Stored(answers)
        with self._replaced(self.expert_module(), self.stored):
            yield

    def _complete(self, answers: States) -> bool:
        """Add the experts' outputs to those of a layer that ran without them; whether the layer does no more with them.

        If it does, which the first batch tells, all batches run again.
        """
        if answers.shape[1] != self.checkpoint.hidden_size:  # latent experts: a matrix follows
            self._forward(self.after)
            return False
        partial, added = self.after.tensor.view(answers.shape), answers.tensor
        rows = self.run.batches[0].numel()
        whole = (partial[:rows].float() + added[:rows]).to(partial.dtype)
        self._forward(self.after, 1)
        got, allowed = partial[:rows].float(), ROUNDING * float(added[:rows].norm())
        if float((got - whole.float()).norm()) > allowed + torch.finfo(partial.dtype).eps * float(got.norm()):
            self._forward(self.after)
            return False
        for begin in range(rows, len(added), BATCH):
            part = partial[begin : begin + BATCH]
            part.copy_(part.float() + added[begin : begin + BATCH])
        self._check_all()
        return True

    def _check_all(self) -> None:
        for number, _ in enumerate(self.calls):
            self._check(number, self.run.part(self.after, number))

    @contextlib.contextmanager
    def _replaced(self, inner: nn.Module, by: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Make ``inner`` return the outputs ``by(x [T, d], index [T, k], weights [T, k])``."""

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            x, index, weights = given(self.number, inner, self.checkpoint.n_ff_exp, *args, **kwargs)
            return by(x, index, weights).view((args[0] if args else next(iter(kwargs.values()))).shape)

        inner.forward = forward
        try:
            yield
        finally:
            del inner.forward


class _Stored:
    """The experts' stored outputs, batch after batch, again for every pass."""

    def __init__(self, answers: States):
        self.answers, self.at = answers, 0

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found = self.answers.tensor[self.at : self.at + len(x)].to(x)
        self.at = (self.at + len(x)) % len(self.answers.tensor)
        return found
