"""Chunks of a text shared out over devices or machines, and their moments added up again.

Share i of n runs every n-th chunk of each text, through the whole model, in ``OUT.work/share-00i``.  A sum of second moments is the sum
of the shares' sums, so what comes out is what one run gives, up to rounding; with more than MOST channels each share has a subspace of
its own, and the strongest directions of all are kept.

A worker opens model and tokens by their paths: all machines see the same files.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mobe_gguf import __version__
from mobe_gguf.calibrate.experts import PairGradients, StoredRoots, gradient_entries
from mobe_gguf.calibrate.gguf_model import GgufCheckpoint
from mobe_gguf.calibrate.gradients import GradientRun, experts_bytes
from mobe_gguf.calibrate.layers import SHARE, MomentSettings, Run
from mobe_gguf.calibrate.roots import MOST, root
from mobe_gguf.calibrate.runnable import Runnable
from mobe_gguf.calibrate.skeleton import Skeleton, silent
from mobe_gguf.calibrate.workspace import LayersWorkspace
from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.executors import Place, Work, each
from mobe_gguf.core.executors.base import OnStep
from mobe_gguf.core.executors.cluster import await_file, machines
from mobe_gguf.core.memory import free_memory
from mobe_gguf.core.metric import FLOOR
from mobe_gguf.core.progress import Bar, bar
from mobe_gguf.formats.moments import GRADIENT, KEY_SEEN, KEY_WEIGHS
from mobe_gguf.formats.safetensors import Entry, read_header, read_metadata, write_safetensors
from mobe_gguf.models.checkpoint import Checkpoint

#: File of the work folder with the tokens of each text, ``[chunks, ctx]``.
TOKENS = "tokens.safetensors"


def open_runnable(model: Path) -> Runnable:
    """A directory of transformers, or a GGUF file."""
    return GgufCheckpoint(model) if model.is_file() else Checkpoint(model)


def free(device: str) -> int:
    """Bytes of a device's memory that are free."""
    return free_memory() if device == "cpu" else int(torch.cuda.mem_get_info(torch.device(device))[0])


@dataclass(frozen=True)
class Gathering:
    """The moments of ``checkpoint`` over ``texts``, each ``[chunks, ctx]``, in the folder ``work``."""

    checkpoint: Runnable
    texts: tuple[torch.Tensor, ...]
    work: LayersWorkspace
    settings: MomentSettings
    gradients: bool
    n_shares: int = 1

    def run(self, skeleton: Skeleton, device: str, progress: Bar) -> None:
        """All layers that are not finished, on one device.  ``progress`` has a step for each layer and way."""
        here = self.n_shares if device == "cpu" else 1
        budget = self.settings.memory or int(SHARE * free(device) / here)
        run = Run(skeleton, self.texts, self.work, self.settings, budget, progress)
        if self.gradients:
            inner = self.work.inner("gradients")
            back = GradientRun(skeleton, self.texts, inner, self.settings, budget, progress)
            back.run()
            run.gradients = back.gradients_of
        run.run()

    def steps(self, n_layer: int) -> int:
        """Steps of :meth:`run`."""
        return n_layer * (3 if self.gradients else 1)

    def share(self, i: int) -> Gathering:
        """Every n-th chunk, from the i-th on."""
        texts = tuple(text[i :: self.n_shares] for text in self.texts)
        return replace(self, texts=texts, work=self.work.inner(f"share-{i:03d}"))


def shares_for(place: Place) -> int:
    """How many shares: one for each device, or with Ray for each GPU or machine of the cluster."""
    return len(place.devices) if place.ray is None else machines(place.devices[0])


def run_shares(job: Gathering, place: Place, n_layer: int, quiet: bool) -> None:
    """Run all shares that are not finished, and join their layers' files in the job's folder."""
    save_file({str(i): text for i, text in enumerate(job.texts)}, job.work.path / TOKENS)
    address = GatheringAddress(
        job.checkpoint.path.absolute(),
        job.work.path.absolute(),
        job.checkpoint.checksum,
        job.work.token(),
        job.settings,
        job.gradients,
        job.n_shares,
    )
    memory = job.settings.memory or experts_bytes(job.checkpoint, 2)
    work: Work[Gathering, int] = Work(
        run_share, job, lambda: address, lambda piece: f"share {piece[0]}", memory
    )
    left = [i for i in range(job.n_shares) if not _finished(job, i)]
    with bar("shares", job.n_shares, quiet) as progress:
        progress.found(job.n_shares - len(left))
        for i in each(work, [(i,) for i in left], place, progress):
            if place.ray is not None:
                await_file(_mark(job, i))
            progress.advance(
                1, f"share {i}: {sum(len(text[i :: job.n_shares]) for text in job.texts)} chunks"
            )
    for name in [*(f"{layer:03d}" for layer in range(n_layer)), "output"]:
        if not job.work.layer_file(name).is_file() and job.work.inner("share-000").layer_file(name).is_file():
            _Joined(job, name).write()


def _mark(job: Gathering, i: int) -> Path:
    return job.work.path / f"share-{i:03d}" / "finished"


def _finished(job: Gathering, i: int) -> bool:
    return _mark(job, i).is_file()


@dataclass(frozen=True)
class GatheringAddress:
    """What another process needs to open a job.  ``token``: of the folder's lock."""

    model: Path
    work: Path
    checksum: str
    token: str
    settings: MomentSettings
    gradients: bool
    n_shares: int
    version: str = __version__

    def open(self) -> Gathering:
        """The job; MobeError if this process does not see the same files."""
        host, work = socket.gethostname(), LayersWorkspace(self.work)
        shared = "Every worker must see MODEL and OUT under the same paths, on a file system that all share."
        if self.version != __version__:
            raise MobeError(
                f"{host} has mobe-gguf {__version__}, the job runs {self.version}; install the same everywhere"
            )
        try:
            same = work.token() == self.token
            texts = load_file(work.path / TOKENS)
        except OSError as e:
            raise MobeError(f"{self.work}: not there on {host} ({e.strerror}). {shared}") from e
        if not same:
            raise MobeError(f"{self.work}: on {host} this is another folder than the job's. {shared}")
        checkpoint = open_runnable(self.model)
        if checkpoint.checksum != self.checksum:
            raise MobeError(f"{self.model} is another model on {host}. {shared}")
        ordered = tuple(texts[str(i)] for i in range(len(texts)))
        return Gathering(checkpoint, ordered, work, self.settings, self.gradients, self.n_shares)


def run_share(job: Gathering, i: int, device: str, on_step: OnStep) -> int:
    """Run share ``i`` of the ``job`` on a ``device``; returns i."""
    with silent(True):
        skeleton = Skeleton(job.checkpoint, device)
        share = job.share(i)
        share.run(skeleton, device, _Steps(on_step, job.steps(len(skeleton.layers))))
    _mark(job, i).touch()
    return i


class _Steps(Bar):
    """Tells how far a share is."""

    def __init__(self, on_step: OnStep, total: int):
        super().__init__("", total, None, quiet=True)
        self._on_step = on_step

    def update(self, label: str) -> None:
        self._on_step(self._done / self._total, None)

    def _tell(self, amount: float, line: str | None, left: str) -> None:
        self._on_step(self._done / self._total, None)


class _Joined:
    """A layer's file of all shares: sums of the moments, weighted by the tokens behind them."""

    def __init__(self, job: Gathering, name: str):
        self.job, self.name = job, name
        shares = [job.work.inner(f"share-{i:03d}").layer_file(name) for i in range(job.n_shares)]
        self.files = [file for file in shares if file.is_file()]
        self.heads = [read_header(file) for file in self.files]
        self.metadata = [read_metadata(file) for file in self.files]

    def write(self) -> None:
        weighs = json.loads(self.metadata[0][KEY_WEIGHS])
        stems = sorted(name.removesuffix(".root") for name in self.heads[0] if name.endswith(".root"))
        entries = [entry for stem in stems for entry in self._sum(stem)]
        if self.name.isdigit() and self.job.gradients:
            entries += self._gradients(int(self.name))
        seen = [json.loads(one.get(KEY_SEEN) or "null") for one in self.metadata]
        both = None if None in seen else torch.tensor(seen).sum(0).tolist()
        with atomic_path(self.job.work.layer_file(self.name)) as part:
            about = {KEY_WEIGHS: json.dumps(weighs), KEY_SEEN: json.dumps(both)}
            write_safetensors(part, entries, {"format": "pt", **about})
        for left in self.job.work.path.glob("scratch-*"):
            left.unlink()

    def _read(self, name: str) -> list[torch.Tensor]:
        found = []
        for file in self.files:
            with safe_open(file, framework="pt") as f:
                found.append(f.get_tensor(name))
        return found

    def _sum(self, stem: str) -> list[Entry]:
        """The tensors of one set of inputs.  O(n (d^2 K + d^3)) with K directions of all shares, with many channels O(n d K^2)."""
        counts, scales = self._read(f"{stem}.tokens"), self._read(f"{stem}.scale")
        if stem.endswith("_exps"):
            own = [
                sum(len(text[i :: self.job.n_shares]) for text in self.job.texts) for i in range(len(counts))
            ]
        else:
            own = [int(one[0]) for one in counts]
        weights = [tokens / sum(own) * float(scale) for tokens, scale in zip(own, scales, strict=True)]
        total = sum(weights)
        shapes = [head[f"{stem}.root"].shape for head in self.heads]
        n, d, k = shapes[0][0], shapes[0][1], max(shape[2] for shape in shapes)
        roots = StoredRoots(self.job.work, stem.replace(".", "-"), n, d, k)
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in self.files]
            for e in range(n):
                parts, rest = [], torch.zeros(d)
                for f, head, weight in zip(opened, self.heads, weights, strict=True):
                    parts.append(f.get_slice(f"{stem}.root")[e].float() * (weight / total) ** 0.5)
                    if f"{stem}.rest" in head:
                        rest += f.get_slice(f"{stem}.rest")[e].float() * (weight / total)
                roots.put(e, *_root(torch.cat(parts, 1), rest, k))
        entries = roots.entries(stem)
        entries.append(Entry.of(f"{stem}.scale", torch.tensor([total])))
        entries.append(Entry.of(f"{stem}.tokens", torch.stack(counts).sum(0).int()))
        return entries

    def _gradients(self, layer: int) -> list[Entry]:
        """In the order of the whole text."""
        names = {part: GRADIENT.format(layer, part) for part in ("index", "gate", "down")}
        if names["gate"] not in self.heads[0]:
            return []
        n, at = self.job.n_shares, 0
        order: list[list[torch.Tensor]] = [[] for _ in range(n)]
        for text in self.job.texts:
            numbers = torch.arange(text.numel()).view(text.shape) + at
            for i in range(n):
                order[i].append(numbers[i::n].flatten())
            at += text.numel()
        places = torch.cat([torch.cat(one) for one in order])
        found: Mapping[str, torch.Tensor] = {
            part: torch.cat(self._read(name)) for part, name in names.items()
        }
        return gradient_entries(
            layer, PairGradients(**{part: one[places.argsort()] for part, one in found.items()})
        )


def _root(parts: torch.Tensor, rest: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(root [d, k], rest [d])`` of ``parts parts^T + diag(rest)``, parts ``[d, K]``."""
    d = len(parts)
    if d <= MOST:
        return root(parts @ parts.T + torch.diag(rest), k)
    values, vectors = torch.linalg.eigh((parts.T @ parts).double())
    found = (parts @ vectors[:, -k:].float())[:, : min(k, len(values))].flip(1)
    diagonal = parts.square().sum(1) + rest
    return found, (diagonal - found.square().sum(1)).clamp_min(FLOOR)
