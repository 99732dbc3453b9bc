"""The folder of a run, ``OUT.work``: finished layers stay there after any kill, and a later run continues from them.

    settings.json             fingerprint of model, text and settings
    states-003                hidden states that enter layer 3, [chunks, ctx, d]; kept only after the last finished layer
    layer-003.safetensors     moments of the inputs of layer 3's matrices
    gradients/                states and gradients of all layers, see ``gradients``
    share-001/                the same for a share of the text, see ``shares``
    scratch-*                 temporary data of a layer

A file appears under its name only when it is complete.  Files of states and scratch are mapped: the system keeps them in
memory while there is room, else on disk.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mobe_gguf.core.atomic import rename, sync
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import why_not_written
from mobe_gguf.core.workspace import Workspace

#: A finished layer's moments.
LAYERS = "layer-*"
#: Work that another run can go on with.
FINISHED = (
    LAYERS,
    "gradients/states-*",
    "gradients/gradient-*",
    "share-*/layer-*",
    "share-*/gradients/states-*",
)


class LayersWorkspace(Workspace):
    """The folder of a run over a model's layers."""

    @contextlib.contextmanager
    def open(self, settings: Mapping[str, Any], resume: bool) -> Iterator[None]:
        """Create the folder, or with ``resume`` continue in it; errors as in :meth:`settled` and :meth:`locked`."""
        with self.locked(finished=FINISHED):
            self.settled("settings.json", settings, resume, FINISHED)
            if not self.any(LAYERS):
                self._clear("states-*")
            self._clear("scratch-*")
            yield

    def inner(self, name: str) -> LayersWorkspace:
        """A folder for a part of the work, in this one, which is open."""
        found = LayersWorkspace(self.path / name)
        found.path.mkdir(exist_ok=True)
        found._clear("scratch-*")
        return found

    def _clear(self, pattern: str) -> None:
        for left in self.path.glob(pattern):
            left.unlink()

    # layers

    def layer_file(self, name: str) -> Path:
        """File with the moments of a layer (``003``) or of what follows the last one (``output``)."""
        return self.path / f"layer-{name}.safetensors"

    def states_file(self, layer: int) -> Path:
        return self.path / f"states-{layer:03d}"

    def next_layer(self) -> int | None:
        """The next layer to run: its states and all earlier layers are there.  None at the beginning."""
        there = [int(f.name[7:]) for f in self.path.glob("states-*") if re.fullmatch(r"states-\d+", f.name)]
        whole = (
            i
            for i in sorted(there, reverse=True)
            if all(self.layer_file(f"{j:03d}").is_file() for j in range(i))
        )
        return next(whole, None)

    def finish_layer(self, layer: int, states: States) -> None:
        """Give the states after ``layer`` their name and delete those before it."""
        states.sync()
        rename(states.file, self.states_file(layer + 1))
        self.states_file(layer).unlink(missing_ok=True)

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> States:
        """A new scratch file of that shape.  MobeError if the disk is full."""
        return States.make(self.path / f"scratch-{name}", shape, dtype)


class States:
    """A tensor in a mapped file."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype):
        self.file, self.shape, self.dtype = file, shape, dtype
        n = torch.Size(shape).numel()
        expected = n * dtype.itemsize
        if file.stat().st_size != expected:
            raise MobeError(
                f"{file}: it has {file.stat().st_size} bytes, expected {expected}; remove {file.parent}"
            )
        self.tensor = torch.from_file(str(file), shared=True, size=n, dtype=dtype).view(shape)

    @classmethod
    def make(cls, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> States:
        size = torch.Size(shape).numel() * dtype.itemsize
        try:
            with open(
                file, "wb"
            ) as f:  # reserve the space now: writing to a mapping on a full disk is a crash
                os.posix_fallocate(f.fileno(), 0, max(1, size)) if size else None
        except OSError as e:
            file.unlink(missing_ok=True)
            raise MobeError(
                f"{file.parent}: no room for {size / 1e9:.2f} GB of states: {why_not_written(e)}. Make room, or write OUT to "
                "another disk. Finished layers are kept."
            ) from e
        return cls(file, shape, dtype)

    def sync(self) -> None:
        sync(self.file)

    def remove(self) -> None:
        del self.tensor
        self.file.unlink(missing_ok=True)
