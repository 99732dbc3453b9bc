"""Runs a model beside its rounded copy, layer by layer, and rounds each layer's experts for what the rounded layers before it put out.

An expert's matrix W gets the inputs x in the original, and x' in the rounded model, for the same token.  Rounding should keep
``W x``, so what is rounded is not W but the matrix that makes most of it from x':

    W* = W + W (C - S) (S + r)^-1        S = E[g^2 x' x'^T],  C = E[g^2 x x'^T],  r: RIDGE of S's mean diagonal

and the metric is S; g is as in ``moments``.  For down x' is what the expert's rounded gate and up make of their own inputs.  The idea is known for dense
models (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695).  The moments of the original run are added to both S and C, as if the
average expert had seen PRIOR d tokens more, so an expert that sees few tokens is corrected little.

Routed experts alone are treated so: they are almost all of the file.  The router, which is stored in float32, gets its W* as it is,
so that more tokens keep their experts (the same purpose as the null-space term of MoBiE, arXiv 2604.06798, at no cost in bytes).
Other matrices keep their values in both runs.

Memory as in ``layers``: one expert's matrices and sums, O(d^2), and a batch of tokens; twice the states on the disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from mobe_gguf.calibrate.experts import ROWS, ExpertForm, Fed, by_expert, squares_of
from mobe_gguf.calibrate.layers import LayerRun, MomentSettings, Run
from mobe_gguf.calibrate.runnable import Runnable
from mobe_gguf.calibrate.skeleton import Call, Skeleton
from mobe_gguf.calibrate.workspace import LayersWorkspace, States
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import describe_size
from mobe_gguf.core.memory import own_memory
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.core.progress import Bar
from mobe_gguf.formats.safetensors import Entry

#: Added to the diagonal of S, as a share of its mean, where W* is solved for.
RIDGE = 0.01


class PairedCodes(Protocol):
    """Rounds the experts of one layer: it has their types, the original's moments, and the search for codes."""

    def prior(self, projection: str, expert: int) -> torch.Tensor:
        """The original's moments of the expert's inputs, ``[d, d]`` float32, per token of a text."""

    def row_bytes(self, projection: str) -> int:
        """Bytes of a row."""

    def round(
        self, projection: str, expert: int, w: torch.Tensor, s: torch.Tensor, tokens: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes ``[rows, n]`` of ``w`` ``[rows, d]`` in the metric ``s``, and the values ``[rows, d]`` float32 that they
        stand for.  ``tokens``: how many are behind ``s``."""


@dataclass(frozen=True)
class Stream:
    """The states ``[chunks, ctx, d]`` of one of the two models."""

    tensor: torch.Tensor


class PairedRun(Run):
    """The original and the rounded model over ``texts``; states are ``[2, chunks, ctx, d]``.

    ``codes`` gives the rounding of a layer.  Each layer's file has ``{projection}`` ``[n, rows, bytes]`` uint8 and, in layers
    that are among ``routers``, ``router`` ``[n, d]`` float32.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        texts: Sequence[torch.Tensor],
        work: LayersWorkspace,
        settings: MomentSettings,
        budget: float,
        bar: Bar,
    ):
        super().__init__(skeleton, texts, work, settings, budget, bar)
        self.shape = (2, *self.shape)
        #: Share of tokens that keep all their experts, by layer.
        self.kept: dict[int, float] = {}

    codes: Callable[[int], PairedCodes]
    routers: Collection[int] = ()

    def part(self, states: Any, number: int) -> torch.Tensor:
        step = len(self.batches[0])
        chunks = slice(number * step, number * step + len(self.batches[number]))
        found: torch.Tensor = states.tensor
        return found[chunks] if isinstance(states, Stream) else found[:, chunks]

    def _layer(self, layer: int, calls: list[Call], states: States, after: States) -> None:
        self.skeleton.load(layer)
        said, entries = "no routed experts", []
        with torch.inference_mode():
            pair = [
                OneModel(self, layer, calls, Stream(states.tensor[i]), Stream(after.tensor[i]))
                for i in (0, 1)
            ]
            if layer in self.checkpoint.moe_layers:
                experts = PairedExperts(pair[0], pair[1], self.codes(layer), layer in self.routers)
                entries = experts.run()
                self.kept[layer] = experts.kept
                said = f"{experts.kept:.1%} of the tokens keep all their experts"
            else:
                for one in pair:
                    one.whole()
        self._write(f"{layer:03d}", entries, {})
        self.skeleton.drop(layer)
        for left in self.work.path.glob("scratch-*"):
            if left != after.file:
                left.unlink()
        self.bar.advance(1, f"layer {layer}: {said}, {describe_size(own_memory(), 1)} in memory")

    def _output(self, states: States) -> None:
        """No experts follow."""


class OneModel(LayerRun):
    """A layer of one of the two models.  All its weights are loaded but the experts', whose sums are computed elsewhere."""

    def __init__(self, run: Run, number: int, calls: list[Call], states: Any, after: Any):
        super().__init__(run, number, calls, states, after)

        self.inner: Any = self.expert_module() if number in self.checkpoint.moe_layers else None

    def feed(self, name: str) -> Fed:
        """Run the layer without its experts; what they get."""
        work, dtype, _ = self.run.place
        tokens, d, k = self.run.tokens.numel(), self.checkpoint.n_embd, self.checkpoint.n_expert_used
        fed = Fed.new(work, tokens, d, k, dtype, f"fed-{name}")
        with self._replaced(self.inner, fed.leave_out):
            self._forward(self.after)
        return fed

    def give(self, answers: States) -> None:
        """Complete the layer's output by the experts' ``answers`` ``[T, d]``."""
        with self._answering(answers):
            self._complete(answers)

    @contextlib.contextmanager
    def routing(self, weight: torch.Tensor | None) -> Iterator[None]:
        """The router has this ``weight`` ``[n, d]``; None: its own."""
        parameter = None if weight is None else router(self.module, self.checkpoint)
        if parameter is None or weight is None:
            yield
            return
        own = parameter.detach().clone()
        parameter.copy_(weight)
        try:
            yield
        finally:
            parameter.copy_(own)

    def whole(self) -> None:
        """Run a layer without routed experts."""
        self._forward(self.after)


def router(layer: nn.Module, checkpoint: Runnable) -> nn.Parameter | None:
    """The router's matrix ``[n, d]`` in transformers' ``layer``, None if it cannot be told from others."""
    shape = (checkpoint.n_expert, checkpoint.n_embd)
    found = [p for p in layer.parameters() if p.shape == shape]
    return found[0] if len(found) == 1 else None


class PairedExperts:
    """The routed experts of a layer, rounded one after the other."""

    def __init__(self, original: OneModel, rounded: OneModel, codes: PairedCodes, refit: bool):
        self.pair, self.codes = (original, rounded), codes
        self.layer, self.checkpoint = original.number, original.checkpoint
        self.work, self.dtype, self.device = original.run.place
        self.form = ExpertForm(original.inner)
        self.fed = [one.feed(str(i)) for i, one in enumerate(self.pair)]
        self.routers: list[torch.Tensor | None] = [None, None]
        self.n, self.d, self.p = self.checkpoint.n_expert, self.checkpoint.n_embd, self.checkpoint.n_ff_exp
        self.tokens, self.k = self.fed[0].index.shape
        if refit and router(rounded.module, self.checkpoint) is not None:
            self.routers[1] = self._router()
            with rounded.routing(self.routers[1]):
                self.fed[1] = rounded.feed("again")
        if original.run.gradients is not None:
            self.fed[1].gradients = original.run.gradients(self.layer)
        self.places = [by_expert(fed.index, self.n) for fed in self.fed]
        same = self.fed[0].index.sort(-1).values == self.fed[1].index.sort(-1).values
        self.kept = float(same.all(-1).float().mean())

    def run(self) -> list[Entry]:
        """Round all experts and complete the layer of both models; the tensors of the layer's file."""
        answers = [self.work.new(f"answers-{i}", (self.tokens, self.d), torch.float32) for i in (0, 1)]
        rows = {**dict.fromkeys(self.form.kinds, self.p), "down": self.d}
        stored = {
            x: self.work.new(f"codes-{x}", (self.n, rows[x], self.codes.row_bytes(x)), torch.uint8)
            for x in rows
        }
        for e in range(self.n):
            *first, down = (self._weights(e, x) for x in rows)
            before = self.form.joined(first), down
            after = self._round(e, first, before[0], down, stored)
            for model, (joined, down) in enumerate((before, after)):
                for at, x, weight in self._tokens(model, e):
                    out = self.form.output(self.form.hidden(x, joined, e), down, e) * weight
                    answers[model].tensor[at] += out.cpu()  # a token has an expert once
        for one, matrix, sums in zip(self.pair, self.routers, answers, strict=True):
            with one.routing(matrix):
                one.give(sums)
        entries = [
            Entry.copy(x, "U8", part.shape, part.file, 0, part.file.stat().st_size)
            for x, part in stored.items()
        ]
        if self.routers[1] is not None:
            entries.append(Entry.of("router", self.routers[1].cpu()))
        return entries

    def _router(self) -> torch.Tensor:
        """The router's W*, over all tokens."""
        own = router(self.pair[1].module, self.checkpoint)
        assert own is not None, self.layer
        sums = Sums(self.d, self.device)
        for rows in torch.arange(self.tokens).split(ROWS):
            sums.add(*(fed.x.tensor[rows].to(self.device).float() for fed in self.fed))
        return sums.solve(own.detach().float(), torch.zeros_like(sums.s), 0.0)[0]

    def _weight(self, d: int) -> float:
        """Tokens of a text whose moments stand for PRIOR d tokens of the average expert."""
        return PRIOR * d * self.n / self.k

    def _weights(self, e: int, projection: str) -> torch.Tensor:
        """Values in the model's type, as float32."""
        return self.checkpoint.expert(self.layer, projection, e).to(self.device, self.dtype).float()

    def _round(
        self,
        e: int,
        first: list[torch.Tensor],
        joined: torch.Tensor,
        down: torch.Tensor,
        stored: dict[str, States],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round the matrices of expert ``e``, put their bytes into ``stored``, and return the values that they stand for."""
        behind = len(self.places[1][e]) + PRIOR * self.k * self.tokens / self.n
        kinds, sums, squares = self.form.kinds, Sums(self.d, self.device), squares_of(down)
        for places, x, weight in self._pairs(e):
            slope = self.form.slope(self.form.product(x[0], joined, e), squares)
            factor = weight * self.fed[1].emphasis(places, slope)[:, None].to(weight)
            sums.add(x[0] * factor, x[1] * factor)
        fixed, s = sums.solve(torch.cat(first), self.codes.prior(kinds[0], e), self._weight(self.d))
        values = []
        for name, w in zip(kinds, fixed.split(self.p), strict=True):
            data, decoded = self.codes.round(name, e, w, s, behind)
            stored[name].tensor[e] = data
            values.append(decoded.to(w))
        now, sums = self.form.joined(values), Sums(self.p, self.device)
        for places, x, weight in self._pairs(e):
            factor = weight * self.fed[1].down_emphasis(places)[:, None].to(weight)
            sums.add(self.form.hidden(x[0], joined, e) * factor, self.form.hidden(x[1], now, e) * factor)
        fixed, s = sums.solve(down, self.codes.prior("down", e), self._weight(self.p))
        data, decoded = self.codes.round("down", e, fixed, s, behind)
        stored["down"].tensor[e] = data
        return now, decoded.to(down)

    def _pairs(self, e: int) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]]:
        """For the tokens that the rounded model routes to ``e``: their places, the inputs in both models, and the rounded one's
        weights."""
        for places in self.places[1][e].split(ROWS):
            both = [self._scaled(model, 1, places) for model in (0, 1)]
            yield places, [x for x, _ in both], both[0][1]

    def _tokens(self, model: int, e: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The tokens of expert ``e`` in one of the models: their numbers, its inputs, and the router's weights."""
        for places in self.places[model][e].split(ROWS):
            yield places // self.k, *self._scaled(model, model, places)

    def _scaled(self, model: int, router: int, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs in one of the models, and the weights of a model's ``router``; where transformers' class weighs the inputs, they
        are weighed, and the weights are 1."""
        x = self.fed[model].x.tensor[places // self.k].to(self.device).float()
        weight = self.fed[router].weights.view(-1)[places, None].to(self.device)
        return (x * weight, torch.ones_like(weight)) if self.form.scales_inputs else (x, weight)


class Sums:
    """``S`` and ``C`` of pairs of inputs, ``[d, d]``."""

    def __init__(self, d: int, device: str):
        self.s, self.c = torch.zeros(2, d, d, device=device).unbind()

    def add(self, x: torch.Tensor, x_rounded: torch.Tensor) -> None:
        self.s.addmm_(x_rounded.T, x_rounded)
        self.c.addmm_(x.T, x_rounded)

    def solve(self, w: torch.Tensor, prior: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """W* of ``w`` ``[rows, d]``, and the metric S, float32.  ``prior``, times ``weight``, is added to S and C."""
        lost = w.double() @ (self.c - self.s).double()
        s = self.s.double().add_(prior.to(self.s).double(), alpha=weight)
        size = float(s.diagonal().mean())
        if not 0 < size < float("inf"):
            raise MobeError("an expert's inputs are all zero, or not finite; give another text")
        ridge = s.clone()
        ridge.diagonal().add_(RIDGE * size)
        factor = torch.linalg.cholesky(ridge)
        more = torch.cholesky_solve(lost.T, factor).T
        return (w + more.to(w)), (s / size).float()
