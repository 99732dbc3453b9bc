"""Runs a model beside its rounded copy, layer by layer, and rounds each layer's experts for what the rounded layers before it put out.

An expert's matrix W gets the inputs x in the original, and x' in the rounded model, for the same token.  What is rounded is not W but
the matrix that makes most of what is lost from x':

    W* = W + q E[g^2 l x'^T] (S + r)^-1        S = E[g^2 x' x'^T],  r: RIDGE of S's mean diagonal,  0 <= q <= 1

and the metric is S; g is as in ``moments``.  For gate and up, ``l = W x - W x'``: their outputs should stay.  The idea is known for dense
models (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695).  down is rounded last, for l = all that the layer's output lacks: of
the layers before, of gate, up and the choice of experts, and of the downs that were rounded before it.  Here x' is what the rounded gate
and up make of their inputs.  The moments of the original run are added to S, as if the average expert had seen PRIOR d tokens more, so
an expert that sees few tokens is corrected little; and q says how far one half of the text confirms the other (``Sums``).

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
#: A token's output counts fully up to this multiple of the median size.
LOUD = 4


class PairedCodes(Protocol):
    """Rounds the experts of one layer: it has their types, the original's moments, and the search for codes.

    ``given``: projections that are not rounded, but are :meth:`matrix` in the rounded model.
    """

    @property
    def given(self) -> Collection[str]: ...

    def matrix(self, projection: str, expert: int) -> torch.Tensor:
        """A given matrix, float32; the experts are asked for in order, several times."""

    def entries(self) -> list[Entry]:
        """What the layer's file has of the given projections."""

    def prior(self, projection: str, expert: int) -> torch.Tensor:
        """The original's moments of the expert's inputs, ``[d, d]`` float32, per token of a text."""

    def row_bytes(self, projection: str) -> int:
        """Bytes of a row."""

    def round(
        self, projection: str, expert: int, w: torch.Tensor, s: torch.Tensor, tokens: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes ``[rows, n]`` of ``w`` ``[rows, d]`` in the metric ``s``, and the values ``[rows, d]`` float32 that they
        stand for.  ``tokens``: how many are behind ``s``."""

    def decoded(self, projection: str, data: torch.Tensor) -> torch.Tensor:
        """The values ``[rows, d]`` float32 that bytes stand for."""


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
                experts.run()
                entries = experts.entries()
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

    def give(self, answers: States) -> bool:
        """Complete the layer's output by the experts' ``answers`` ``[T, d]``; whether it is their sum with something else."""
        with self._answering(answers):
            return self._complete(answers)

    def put(self, outputs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """These are the layer's outputs: numbers of tokens, and their rows."""
        after = self.after.tensor.view(-1, self.after.tensor.shape[-1])
        for rows, values in outputs:
            after[rows] = values.to(after)
        self._check_all()

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
        self.projections = (*self.form.kinds, "down")
        rows = {**dict.fromkeys(self.form.kinds, self.p), "down": self.d}
        self.stored = {
            x: self.work.new(f"codes-{x}", (self.n, rows[x], codes.row_bytes(x)), torch.uint8)
            for x in self.projections
            if not self._is_given(x)
        }

    def run(self) -> None:
        """Round all experts and complete the layer of both models.

        gate and up come first, of all experts, then down: it makes up for what they, and the layers before, have left wrong.
        """
        answers = [self.work.new(f"answers-{i}", (self.tokens, self.d), torch.float32) for i in (0, 1)]
        for e in range(self.n):
            *first, down = (self._weights(e, x) for x in self.projections)
            before = self.form.joined(first)
            for model, joined in enumerate((before, self._round(e, first, before, down))):
                for at, x, weight in self._tokens(model, e):
                    out = self.form.output(self.form.hidden(x, joined, e), down, e) * weight
                    answers[model].tensor[at] += out.cpu()  # a token has an expert once
        added = []
        for one, matrix, sums in zip(self.pair, self.routers, answers, strict=True):
            with one.routing(matrix):
                added.append(one.give(sums))
        if all(added):  # down can make up for what any part of the layer, or a layer before, has left wrong
            self.pair[1].put(self._round_downs(*(one.after.tensor.flatten(0, 1) for one in self.pair)))
            return
        for rows, values in self._round_downs(*(sums.tensor for sums in answers)):
            answers[1].tensor[rows] = values
        with self.pair[1].routing(self.routers[1]):
            self.pair[1].give(answers[1])

    def _round_downs(
        self, right: torch.Tensor, got: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Round down of all experts, so that ``got`` ``[T, d]``, where they are not rounded yet, becomes ``right``, as far as may be;
        numbers of tokens, and what their rows are then."""
        lacking = self.work.new("lacking", (self.tokens, right.shape[1]), torch.float32).tensor
        pieces = torch.arange(self.tokens).split(ROWS)
        for rows in pieces:
            lacking[rows] = right[rows].float() - got[rows].float()
        sizes = torch.cat([torch.linalg.vector_norm(right[rows].float(), dim=-1) for rows in pieces])
        calm = (LOUD * sizes.median() / sizes.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1)
        for e in range(self.n):
            self._round_down(e, lacking, calm)
        yield from ((rows, right[rows].float() - lacking[rows]) for rows in pieces)

    def entries(self) -> list[Entry]:
        """The tensors of the layer's file."""
        entries = self.codes.entries()
        entries += [Entry.whole(x, "U8", part.shape, part.file) for x, part in self.stored.items()]
        if self.routers[1] is not None:
            entries.append(Entry.of("router", self.routers[1].cpu()))
        return entries

    def _is_given(self, projection: str) -> bool:
        return projection in self.codes.given

    def _rounded(self, projection: str, e: int) -> torch.Tensor:
        """Values in the rounded model."""
        if self._is_given(projection):
            return self.codes.matrix(projection, e).to(self.device)
        return self.codes.decoded(projection, self.stored[projection].tensor[e]).to(self.device)

    def _router(self) -> torch.Tensor:
        """The router's W*, over all tokens."""
        own = router(self.pair[1].module, self.checkpoint)
        assert own is not None, self.layer
        w, sums = own.detach().float(), Sums(self.n, self.d, self.device)
        for rows in torch.arange(self.tokens).split(ROWS):
            x, rounded = (fed.x.tensor[rows].to(self.device).float() for fed in self.fed)
            sums.add((x - rounded) @ w.T, rounded, rows >= self.tokens // 2)
        return w + sums.solve(torch.zeros(self.d, self.d), 0.0)[0]

    def _weight(self, d: int) -> float:
        """Tokens of a text whose moments stand for PRIOR d tokens of the average expert."""
        return PRIOR * d * self.n / self.k

    def _weights(self, e: int, projection: str) -> torch.Tensor:
        """Values in the model's type, as float32."""
        return self.checkpoint.expert(self.layer, projection, e).to(self.device, self.dtype).float()

    def _round(
        self, e: int, first: list[torch.Tensor], joined: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        """Round gate and up of expert ``e``, put their bytes into :attr:`stored`, and return the values that they stand for, joined."""
        if all(map(self._is_given, self.form.kinds)):
            return self.form.joined([self._rounded(x, e) for x in self.form.kinds])
        kinds, squares, w = self.form.kinds, squares_of(down), torch.cat(first)
        sums = Sums(len(w), self.d, self.device)
        for places, x, weight in self._pairs(e):
            slope = self.form.slope(self.form.product(x[0], joined, e), squares)
            factor = weight * self.fed[1].emphasis(places, slope)[:, None].to(weight)
            sums.add((x[0] - x[1]) * factor @ w.T, x[1] * factor, self._second(places))
        more, s = sums.solve(self.codes.prior(kinds[0], e), self._weight(self.d))
        parts = zip(kinds, (w + more).split(self.p), strict=True)
        return self.form.joined(
            [self._rounded(x, e) if self._is_given(x) else self._put(x, e, part, s) for x, part in parts]
        )

    def _round_down(self, e: int, lacking: torch.Tensor, calm: torch.Tensor) -> None:
        """Round down of expert ``e`` so that it adds what the layer's outputs are ``lacking`` ``[T, d]``, as far as its inputs tell.

        The loss's gradients do not weigh here: with them few tokens decide (docs/experiments.md).
        """
        down = self._weights(e, "down")
        joined = self.form.joined([self._rounded(x, e) for x in self.form.kinds])
        if self._is_given("down"):
            change = self._rounded("down", e) - down
        else:
            sums = Sums(len(down), self.p, self.device)
            for places, x, weight in self._own(e):
                tokens, hidden = places // self.k, self.form.hidden(x, joined, e)
                factor = calm[tokens][:, None].to(hidden)
                sums.add(lacking[tokens].to(hidden) * factor, hidden * weight * factor, self._second(places))
            more, s = sums.solve(self.codes.prior("down", e), self._weight(self.p))
            change = self._put("down", e, down + more, s) - down
        for places, x, weight in self._own(e):
            added = (self.form.hidden(x, joined, e) * weight) @ change.T
            lacking[places // self.k] -= added.cpu()

    def _second(self, places: torch.Tensor) -> torch.Tensor:
        """Which tokens are of the second half of the text."""
        return places >= self.k * (self.tokens // 2)

    def _put(self, projection: str, e: int, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Round ``w`` in the metric ``s``; the values that are stored for it."""
        behind = len(self.places[1][e]) + PRIOR * self.k * self.tokens / self.n
        data, decoded = self.codes.round(projection, e, w, s, behind)
        self.stored[projection].tensor[e] = data
        return decoded.to(w)

    def _pairs(self, e: int) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]]:
        """For the tokens that the rounded model routes to ``e``: their places, the inputs in both models, and the rounded one's
        weights."""
        for places in self.places[1][e].split(ROWS):
            both = [self._scaled(model, 1, places) for model in (0, 1)]
            yield places, [x for x, _ in both], both[0][1]

    def _own(self, e: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """As :meth:`_pairs`, with the inputs in the rounded model."""
        for places in self.places[1][e].split(ROWS):
            yield places, *self._scaled(1, 1, places)

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
    """Sums over the tokens of each half of a text: S of the rounded model's inputs, ``[2, d, d]``, and what is ``lost`` times these
    inputs, ``[2, rows, d]``."""

    def __init__(self, rows: int, d: int, device: str):
        self.lost, self.s = (torch.zeros(2, n, d, device=device) for n in (rows, d))

    def add(self, lost: torch.Tensor, x_rounded: torch.Tensor, second: torch.Tensor) -> None:
        """``lost`` ``[T, rows]``, ``x_rounded`` ``[T, d]``; ``second`` ``[T]``: which are of the second half."""
        for half, those in enumerate((~second, second)):
            x = x_rounded[those]
            self.lost[half].addmm_(lost[those].T, x)
            self.s[half].addmm_(x.T, x)

    def solve(self, prior: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix ``[rows, d]`` that makes most of what is lost from the inputs, and the metric S, float32.

        ``prior``, times ``weight``, is added to S as inputs of which nothing is lost.  The matrix is the solution by least squares, times
        the share of it that holds for other texts.  MobeError if all inputs are zero.
        """
        prior = prior.to(self.s).double() * weight
        s = self.s.sum(0, dtype=torch.float64).add_(prior)
        size = float(s.diagonal().mean())
        if not 0 < size < float("inf"):
            raise MobeError("an expert's inputs are all zero, or not finite; give another text")
        halves = [_solution(self.lost[i], self.s[i].double().add_(prior, alpha=0.5)) for i in (0, 1)]
        found = _solution(self.lost.sum(0), s) * self._common(halves)
        return found.float(), (s / size).float()

    def _common(self, halves: Sequence[torch.Tensor]) -> float:
        """The share, 0 to 1, of what the text tells that holds for another, as one half of it shows by the other.

        A half's solution, times q, serves the other half best.  It is q = a / (a + b), if a is the size of what holds, and b that of what
        chance adds; with twice the tokens b is half as much, so the share is 2 q / (1 + q).
        """
        right = size = 0.0
        for own, other in ((0, 1), (1, 0)):
            found = halves[own].float()
            right += float((found * self.lost[other]).sum(dtype=torch.float64))
            size += float(((found @ self.s[other]) * found).sum(dtype=torch.float64))
        q = min(1.0, max(0.0, right / size)) if size > 0 else 0.0
        return 2 * q / (1 + q)


def _solution(lost: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``lost (s + r)^-1``, float64; zero where s is."""
    ridge = s.clone()
    ridge.diagonal().add_(RIDGE * s.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return torch.cholesky_solve(lost.double().T, torch.linalg.cholesky(ridge)).T
