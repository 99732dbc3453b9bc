"""Rounding in sequence: each layer's experts for what the rounded layers before it put out (``calibrate.pairs``).

Types are chosen first; then the model and its rounded copy run over a text, layer by layer, and the bytes of the experts are kept in
``OUT.rounding`` until the file is written.  A killed run continues after its last finished layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
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
from mobe_gguf.core.metric import Roots
from mobe_gguf.core.progress import bar, say
from mobe_gguf.export.encoder import encode_rows
from mobe_gguf.export.opened import Opened
from mobe_gguf.export.request import ExportRequest
from mobe_gguf.export.rounding import matrix, shrunk
from mobe_gguf.export.source import Tensor, chunks
from mobe_gguf.export.write import Encoded
from mobe_gguf.formats.moments import Moments
from mobe_gguf.formats.safetensors import read_header
from mobe_gguf.quant.recipe import Choice
from mobe_gguf.quant.rounding.rounder import ROUNDED, Outcome, Rounder
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
        path = request.model
        try:
            self.checkpoint: Runnable = open_runnable(path)
        except MobeError as error:
            raise Unsuited(f"--sequential: {error.message}; or leave the option out") from error
        if self.checkpoint.is_mobe:
            raise Unsuited("--sequential rounds ordinary experts; MODEL holds factors. Leave it out")
        self.work = LayersWorkspace(destination(request.out).with_name(f"{request.out.name}.rounding"))
        self.places = {
            names.transform_name(layer, x): (layer, x)
            for layer in self.checkpoint.moe_layers
            for x in self.checkpoint.family.kinds
        }
        self.types = {name: choices[name].type for name in self.places if name in choices}
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
        }

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

    def _check(self, model: Opened, layer: int) -> None:
        """MobeError if the file's experts are not those that transformers runs, as they are."""
        for x in self.checkpoint.family.kinds:
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
        """``encoded`` with the experts' bytes from the work folder."""
        there = set(self.places)
        there |= {ROUTER.format(layer) for layer in self.routers}
        return [self._ready(one) if one.tensor.name in there else one for one in encoded]

    def _ready(self, one: Encoded) -> Encoded:
        layer, projection = self.places.get(one.tensor.name) or (int(one.tensor.name.split(".")[1]), "router")
        file = self.work.layer_file(f"{layer:03d}")
        return Ready(one.tensor, one.type, one.nbytes, one.importance, file=file, stored=projection)

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
            )
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
        return LayerCodes(self.moments, layer, self.types, self.outcomes, self.request.options.device)


def _sha256(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


class LayerCodes:
    """The codes of one layer's experts, see ``calibrate.pairs.PairedCodes``."""

    def __init__(
        self,
        moments: Moments,
        layer: int,
        types: Mapping[str, str],
        outcomes: dict[str, Outcome],
        device: str,
    ):
        self.moments, self.layer, self.types, self.outcomes, self.device = (
            moments,
            layer,
            types,
            outcomes,
            device,
        )
        self._roots: dict[str, tuple[Roots, float]] = {}
        self._made: tuple[torch.Tensor, Rounder] | None = None
        self.columns: dict[str, int] = {}

    def _name(self, projection: str) -> str:
        return names.transform_name(self.layer, projection)

    def prior(self, projection: str, expert: int) -> torch.Tensor:
        name = self._name(projection)
        stem = self.moments.stem(name)
        assert stem is not None
        if stem not in self._roots:
            roots, scale = self.moments.find(name), self.moments.scale(name)
            assert roots is not None and scale is not None
            self._roots[stem] = roots, scale
        roots, scale = self._roots[stem]
        return matrix(roots, expert).mul_(scale)

    def row_bytes(self, projection: str) -> int:
        kind, n = self._type(projection)
        return ggml.type_info(kind).tensor_bytes((1, n))

    def round(
        self, projection: str, expert: int, w: torch.Tensor, s: torch.Tensor, tokens: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        name = self._name(projection)
        kind, said = self.types[name], f"tensor {name}, matrix {expert}"
        if kind in ROUNDED:
            if self._made is None or self._made[0] is not s:
                self._made = s, Rounder(shrunk(s.clone(), tokens), self.device)
            data, outcome = self._made[1].encode(w, kind, said)
            self.outcomes.setdefault(name, Outcome()).add(outcome)
        else:
            data = encode_rows(w.cpu(), kind, None, said)
        found = torch.from_numpy(np.ascontiguousarray(data)).view(len(w), -1)
        return found, self.decoded(projection, found)

    def decoded(self, projection: str, data: torch.Tensor) -> torch.Tensor:
        kind, n = self._type(projection)
        return torch.from_numpy(ggml.dequantize(data.numpy(), kind, n)).view(len(data), n)

    def _type(self, projection: str) -> tuple[str, int]:
        """The type of its rows, and their length."""
        name = self._name(projection)
        shape = self.moments.shape(name)
        assert shape is not None
        return self.types[name], shape[1]
