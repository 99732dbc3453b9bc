"""Rounding in sequence: each layer's experts for what the rounded layers before it put out (``calibrate.pairs``).

Types are chosen first; then the model and its rounded copy run over a text, layer by layer, and the bytes of the experts are kept in
``OUT.rounding`` until the file is written.  A killed run continues after its last finished layer.  Factors are made as without it; the
experts beside them, which are down's as a rule, are rounded for what the factors leave wrong.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from mobe_gguf.calibrate.experts import PairGradients
from mobe_gguf.calibrate.layers import SHARE, MomentSettings
from mobe_gguf.calibrate.pairs import PairedRun
from mobe_gguf.calibrate.runnable import Runnable
from mobe_gguf.calibrate.shares import open_runnable
from mobe_gguf.calibrate.skeleton import Skeleton, silent
from mobe_gguf.calibrate.text import read_chunks
from mobe_gguf.calibrate.workspace import LayersWorkspace
from mobe_gguf.core import names
from mobe_gguf.core.atomic import destination
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import check_space
from mobe_gguf.core.memory import free_memory
from mobe_gguf.core.progress import bar, say
from mobe_gguf.export.layer_codes import CopiedExperts, GivenMatrices, LayerCodes, WrittenFactors
from mobe_gguf.export.opened import Opened
from mobe_gguf.export.request import ExportRequest
from mobe_gguf.export.shards import fingerprint
from mobe_gguf.export.source import Tensor, chunks
from mobe_gguf.export.write import Encoded
from mobe_gguf.formats.safetensors import read_header
from mobe_gguf.quant.recipe import Choice
from mobe_gguf.quant.rounding.rounder import Outcome
from mobe_gguf.runtime import ggml

ROUTER = "blk.{}.ffn_gate_inp.weight"
#: Tokens for each input of the average expert that are run at most.
ENOUGH = 40


@dataclass
class Ready(Encoded):
    """A tensor whose bytes are in a layer's file of the work folder; if they are not there, it is encoded as it is."""

    file: Path = field(default=Path(), kw_only=True)
    stored: str = field(default="", kw_only=True)

    def tofile(self, file: IO[bytes]) -> None:
        info = read_header(self.file).get(self.stored)
        if info is None:
            super().tofile(file)
            return
        with open(self.file, "rb") as source:
            source.seek(info.begin)
            left = info.end - info.begin
            self.check(left)
            while left:
                part = source.read(min(left, 1 << 24))
                if not part:
                    raise MobeError(f"{self.file}: is shorter than its head says; remove {self.file.parent}")
                file.write(part)
                left -= len(part)


class Unsuited(MobeError):
    """The model's experts cannot be rounded in sequence."""


class Sequential:
    """The run over ``request.options.sequential``'s texts, for the types ``choices`` of ``model``'s tensors.

    :class:`Unsuited` if transformers does not run the model, or computes with other experts than the file has.  MobeError or
    UsageError as :func:`~mobe_gguf.calibrate.text.read_chunks`.
    """

    def __init__(self, request: ExportRequest, model: Opened, choices: Mapping[str, Choice]):
        assert model.moments is not None
        self.request, self.moments = request, model.moments
        path = self._source(model)
        try:
            self.checkpoint: Runnable = open_runnable(path)
        except MobeError as error:
            raise Unsuited(f"--sequential: {error.message}; or leave the option out") from error
        if self.checkpoint.is_mobe:
            raise Unsuited(
                "--sequential with --dense rounds ordinary experts; MODEL holds factors. Leave out one of the two"
            )
        self.work = LayersWorkspace(destination(request.out).with_name(f"{request.out.name}.rounding"))
        layers, kinds = self.checkpoint.moe_layers, self.checkpoint.family.kinds
        self.factors = {i: model.factors.layer(i) for i in layers} if model.factors is not None else {}
        #: Where each layer's experts are rounded.
        self.places = {
            name: (layer, x)
            for layer in layers
            for x in kinds
            if (name := names.transform_name(layer, x)) in choices
            and not model.conversion.is_copied(name, choices[name])
            and x not in self._factorized(layer)
        }
        if not self.places:
            raise Unsuited(
                "--sequential: all experts are factors or copied, so none are rounded; leave the option out"
            )
        self.types = {name: choices[name].type for name in self.places}
        self.parts: dict[str, Encoded] = {}
        self.outcomes: dict[str, Outcome] = {}
        for layer in self.checkpoint.moe_layers:
            self._check(model, layer)
        options = request.options
        self.routers = self._refitted(model, choices)
        with silent(options.quiet):
            try:
                self.skeleton = Skeleton(self.checkpoint, options.device)
            except MobeError as error:
                raise Unsuited(f"--sequential: {error.message}; leave the option out") from error
            n_vocab = self.checkpoint.shape(self.checkpoint.family.embedding)[0]
            ctx = int(self.moments.about.get("ctx") or 512)
            whole = read_chunks(path, options.sequential, ctx, options.chunks, n_vocab)
            self.texts = self._enough(whole)
        self.gradients = self._gradients(list(whole.values()))
        self.about = {
            "model": self.checkpoint.checksum,
            "moments": self.moments.checksum,
            "text": _sha256(torch.cat(self.texts)),
            "types": self.types,
            "routers": self.routers,
            "factors": self._made_of(model, choices) if self.factors else None,
        }

    def _source(self, model: Opened) -> Path:
        """The model that is run beside its rounded copy: the one that is exported, or that the factors were made of."""
        if model.factors is None:
            return self.request.model
        if model.original is None:
            raise Unsuited(
                f"--sequential runs the original model, and {model.why}; name it with --original, or leave the option out"
            )
        return model.original.path

    def _enough(self, texts: Mapping[Path, torch.Tensor]) -> list[torch.Tensor]:
        """The first chunks of each text, as many as give the average expert ENOUGH tokens for each of its inputs."""
        c, there = self.checkpoint, sum(text.numel() for text in texts.values())
        share = min(1.0, ENOUGH * c.n_embd * c.n_expert / c.n_expert_used / there)
        return [text[: math.ceil(share * len(text))] for text in texts.values()]

    def _gradients(self, whole: Sequence[torch.Tensor]) -> Callable[[int], PairGradients] | None:
        """The loss's gradients for the tokens that are run, by layer, if the moments were made with them, of this text."""
        text = torch.cat(list(whole))
        if not self.moments.about.get("gradients"):
            return None
        if self.moments.about.get("text") != _sha256(text):
            if not self.request.options.quiet:
                say(
                    "note: --sequential runs another text than the moments', so their gradients are not used in it"
                )
            return None
        pairs = zip(whole, self.texts, strict=True)
        taken = torch.cat([torch.arange(len(all_)) < len(some) for all_, some in pairs])
        taken = taken[:, None].expand(text.shape).flatten()

        def of(layer: int) -> PairGradients:
            found = self.moments.gradients(layer)
            if found is None:
                raise MobeError(f"{self.moments.path}: no gradients of layer {layer}; make the file again")
            return PairGradients(**{part: tensor[taken] for part, tensor in found.items()})

        return of

    def _factorized(self, layer: int) -> tuple[str, ...]:
        """The projections of a layer that are factors."""
        return self.factors[layer].projections if layer in self.factors else ()

    def _factor_names(self, layer: int) -> list[str]:
        """The file's tensors of a layer's factors."""
        return [name for x in self._factorized(layer) for name in names.factor_names(layer, x)]

    def _made_of(self, model: Opened, choices: Mapping[str, Choice]) -> str:
        """What decides on the factors' bytes, beside the moments."""
        recipe, options = self.request.recipe, self.request.options
        types = [(name, choices[name].type) for layer in self.factors for name in self._factor_names(layer)]
        files = [*model.checkpoint.source_files(), *map(Path, recipe.imatrix)]
        return fingerprint(files, types, options.refit)

    def _check(self, model: Opened, layer: int) -> None:
        """MobeError if the file's experts are not those that transformers runs, as they are."""
        for x in self.checkpoint.family.kinds:
            if x in self._factorized(layer):
                continue
            name = names.transform_name(layer, x)
            tensor: Tensor | None = model.conversion.tensors.get(name)
            if tensor is None or self.moments.scale(name) is None:
                what = "is not in the file" if tensor is None else f"has no moments in {self.moments.path}"
                raise Unsuited(f"--sequential: {name} {what}; leave the option out")
            _, first = next(chunks(tensor.source))
            if not torch.equal(first[:1].float(), self.checkpoint.expert(layer, x, 0)[:1].float()):
                raise Unsuited(
                    f"--sequential: {name} is stored otherwise than transformers computes with it; leave the option out"
                )

    def _refitted(self, model: Opened, choices: Mapping[str, Choice]) -> list[int]:
        """Layers whose router is solved for again: it is in the file in float32, as the model has it."""
        found: list[int] = []
        for layer in self.checkpoint.moe_layers:
            name = ROUTER.format(layer)
            tensor, own = model.conversion.tensors.get(name), self.checkpoint.family.router(layer)
            if tensor is None or choices[name].type != "f32" or own not in self.checkpoint:
                continue
            _, first = next(chunks(tensor.source))
            if torch.equal(first[:1].float(), self.checkpoint.get(own)[:1].float()):
                found.append(layer)
        return found

    @property
    def fingerprint(self) -> Any:
        return "sequential", sorted(self.about.items(), key=str)

    def put(self, encoded: Sequence[Encoded]) -> list[Encoded]:
        """``encoded`` with the bytes of experts, of their layers' factors, and of routers from the work folder."""
        there = self.places | {ROUTER.format(layer): (layer, "router") for layer in self.routers}
        factors = {name: (layer, name) for layer in self.factors for name in self._factor_names(layer)}
        self.parts = {one.tensor.name: one for one in encoded if one.tensor.name in factors}
        there |= factors
        return [
            self._ready(one, *there[one.tensor.name]) if one.tensor.name in there else one for one in encoded
        ]

    def _ready(self, one: Encoded, layer: int, stored: str) -> Encoded:
        file = self.work.layer_file(f"{layer:03d}")
        return Ready(one.tensor, one.type, one.nbytes, one.importance, file=file, stored=stored)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run all layers that are not finished, then write the file inside; the work folder is removed after it."""
        options = self.request.options
        tokens = sum(text.numel() for text in self.texts)
        c, skeleton = self.checkpoint, self.skeleton
        with silent(options.quiet):
            budget = options.memory or int(SHARE * free_memory())
            experts = sum(
                ggml.type_info(t).tensor_bytes((c.n_expert, c.n_ff_exp, c.n_embd))
                for t in self.types.values()
            ) + sum(part.nbytes for part in self.parts.values())
            a_set = tokens * c.n_embd * skeleton.dtype.itemsize
            check_space(
                self.work.path,
                experts + 6 * a_set + 4 * tokens * (2 * c.n_embd + c.hidden_size),
                list(self.work.path.glob("*")),
                "Make room, or leave out --sequential.",
            )
            with (
                self.work.open(self.about, True),
                bar("round in sequence", len(skeleton.layers), options.quiet) as progress,
            ):
                run = PairedRun(skeleton, self.texts, self.work, MomentSettings(), budget, progress)
                run.codes, run.routers, run.gradients = self._codes, self.routers, self.gradients
                run.run()
        yield
        self.work.remove()

    def _codes(self, layer: int) -> LayerCodes:
        rounded = {x for at, x in self.places.values() if at == layer}
        others = set(self.checkpoint.family.kinds) - rounded - set(self._factorized(layer))
        given: list[GivenMatrices] = [CopiedExperts(self.checkpoint, layer, others)]
        if parts := {name: self.parts[name] for name in self._factor_names(layer)}:
            given.append(WrittenFactors(self.factors[layer], parts, self.work.path))
        return LayerCodes(self.moments, layer, self.types, self.outcomes, self.request.options.device, given)


def _sha256(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
