"""The contents of GGUF files for a page: bits and forms by layer, sizes by kind, and errors of the experts'
matrices."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mobe_gguf.core import names
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.formula import activate, combine
from mobe_gguf.core.sides import side
from mobe_gguf.core.tensors import merged_name
from mobe_gguf.formats.contents import ListedTensor, original_params, rows
from mobe_gguf.formats.gguf import GgufFile, GgufTensor, read_model
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.gguf_source import MERGED, StoredTensor

#: Kinds of a layer's tensors in the picture's order, by the name after ``blk.N.``; a merged gate and up counts as both.
KINDS = {
    "gate": r"ffn_gate_(exps|basis)\.",
    "up": r"ffn_up_(exps|basis)\.",
    "down": r"ffn_down_(exps|basis)\.",
    "gate and up": r"ffn_gate_up_exps\.",
    "shared experts": r"ffn_\w+_shexp\.",
    "dense": r"ffn_(gate|up|down)\.",
    "attention": r"(attn|ssm)_(?!\w*norm)",
}

#: Names on a page for the CLASSES of formats.contents.
LABELS = {
    "A": "A of factorized experts", "B": "bases", "mix": "mixing weights", "down": "down of experts",
    "experts": "gate and up of experts", "attention": "attention", "embeddings": "embedding and output", "other": "everything else",
}  # fmt: skip

#: Experts of a layer whose error is computed, spread evenly.
SAMPLE = 8


@dataclass
class Part:
    """All tensors of one kind in one layer."""

    tensors: list[ListedTensor] = field(default_factory=list)
    form: str = ""

    @property
    def bits(self) -> float:
        """Bits per weight of the original."""
        return 8 * sum(t.n_bytes for t in self.tensors) / original_params(self.tensors)

    @property
    def types(self) -> str:
        """``q4_k``; ``A q3_k, B q4_k`` if factorized."""
        found = dict.fromkeys(
            (("B " if "_basis." in t.name else "A ") if self.form else "") + t.type
            for t in self.tensors
            if not t.name.endswith(".mix") and not (t.type == "f32" and len(t.shape) == 1)
        )
        return ", ".join(found) or "f32"


def listed(file: GgufFile) -> list[ListedTensor]:
    return [ListedTensor(t.name, t.type, t.shape, t.n_bytes) for t in file.tensors.values()]


def by_layer(file: GgufFile) -> dict[str, dict[int, Part]]:
    """Kind -> layer -> its tensors of this kind; kinds that no layer has are left out."""
    found: dict[str, dict[int, Part]] = {kind: {} for kind in KINDS}
    for tensor in listed(file):
        match = re.match(r"blk\.(\d+)\.(.+)", tensor.name)
        kind = match and next((k for k, pattern in KINDS.items() if re.match(pattern, match[2])), None)
        if match and kind:
            part = found[kind].setdefault(int(match[1]), Part())
            part.tensors.append(tensor)
            if tensor.name.endswith("_basis.weight"):
                m, *shape = (1, 1, *tensor.shape)[-3:]
                r = shape[side(kind).r_axis]
                activation = file.text(names.key_activation(file.arch)) or "?"
                part.form = f"m {m}, r {r}" + ("" if activation == "none" else f", {activation}")
    return {kind: layers for kind, layers in found.items() if layers}


def kinds(file: GgufFile) -> dict[str, int]:
    """Bytes of each of LABELS' kinds."""
    by_label = {row.label: row.n_bytes for row in rows(listed(file))}
    return {label: by_label.get(key, 0) for key, label in LABELS.items()}


class Weights:
    """The experts' matrices that a GGUF file stands for, plain or factorized.  MobeError if it cannot be read."""

    def __init__(self, path: str | os.PathLike[str]):
        self.file = read_model(path)
        self.activation = self.file.text(names.key_activation(self.file.arch)) or "none"

    @property
    def layers(self) -> list[int]:
        """Layers with routed experts."""
        found = (re.fullmatch(r"blk\.(\d+)\.ffn_(gate_)?up_exps\.weight", name) for name in self.file.tensors)
        return sorted({int(match[1]) for match in found if match})

    def projections(self, layer: int) -> list[str]:
        return [p for p in names.ALL_PROJECTIONS if self._stored(layer, p) is not None]

    def _stored(self, layer: int, projection: str) -> StoredTensor | None:
        if info := self.file.tensors.get(names.transform_name(layer, projection)):
            return StoredTensor.of(info)
        merged = self.file.tensors.get(merged_name(layer))
        if merged is None or projection not in MERGED:
            return None
        return StoredTensor.half(merged, names.transform_name(layer, projection), MERGED.index(projection))

    def experts(self, layer: int, projection: str) -> tuple[int, Callable[[int], torch.Tensor]]:
        """The number of experts, and a function that gives the matrix of one: float32, ``[p, d]``, for down ``[d, p]``.

        Holds the bases of one projection and one expert's matrix at a time.
        """
        stored = self._stored(layer, projection)
        if stored is None:
            raise MobeError(f"{self.file.path}: layer {layer} has no {projection}")
        basis = self.file.tensors.get(names.basis_name(layer, projection))
        if basis is None:
            return stored.shape[0], stored.matrix
        mix = self._whole(self.file.tensors[names.mix_name(layer, projection)])
        bases = self._whole(basis).view(-1, *basis.shape[-2:])
        per_group, n = mix.shape[1], stored.shape[0]
        groups = bases.shape[0] // per_group

        def matrix(e: int) -> torch.Tensor:
            group = e * groups // n
            own = bases[group * per_group : (group + 1) * per_group]
            combined = activate(combine(mix[e : e + 1], own)[0], self.activation)
            return side(projection).multiply(stored.matrix(e), combined)

        return n, matrix

    @staticmethod
    def _whole(info: GgufTensor) -> torch.Tensor:
        return torch.cat(list(StoredTensor.of(info).pieces())).view(info.shape)


def errors(original: Path, result: Path, moments: Moments | None) -> Iterator[tuple[int, str, float]]:
    """``(layer, projection, error)``: ``|W - W'|^2 / |W|^2`` over up to SAMPLE experts of each layer.

    With ``moments`` it is the same error of the experts' outputs.  Reads the experts of both files one at a time.
    """
    before, after = Weights(original), Weights(result)
    for layer in before.layers:
        for projection in before.projections(layer):
            n, source = before.experts(layer, projection)
            n_after, made = after.experts(layer, projection)
            if n != n_after:
                raise MobeError(f"{result}: layer {layer} has {n_after} experts, {original} has {n}")
            roots = None if moments is None else moments.find(names.transform_name(layer, projection))
            lost = norm = 0.0
            for e in sample(n):
                w = source(e)
                difference = w - made(e)
                for x, add in ((difference, True), (w, False)):
                    if roots is None or roots.root.shape[:2] != (n, w.shape[1]):
                        size = float(x.double().square().sum())
                    else:
                        size = float((x @ roots.root[e]).double().square().sum())
                        if roots.rest is not None:
                            size += float((x.square() @ roots.rest[e]).double().sum())
                    lost, norm = (lost + size, norm) if add else (lost, norm + size)
            yield layer, projection, lost / norm if norm else math.nan


def sample(n: int) -> list[int]:
    """SAMPLE of n experts, evenly spread."""
    count = min(n, SAMPLE)
    return [i * n // count for i in range(count)]
