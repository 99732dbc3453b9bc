"""The folder of a run, ``OUT.work``: what is finished stays there after any kill, and a later run goes on from it.

    settings.json             fingerprint of model, text and settings
    states-003                hidden states that enter layer 3, [chunks, ctx, d]: of the last finished layer alone
    layer-003.safetensors     moments of what layer 3's matrices are fed
    scratch-*                 what a layer needs while it runs

A file appears under its name only when it is whole.  Files of states and scratch are mapped: the system keeps them in
memory as long as there is room for them, and on disk where there is not.
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


class LayersWorkspace(Workspace):
    """The folder of a run over a model's layers."""

    @contextlib.contextmanager
    def open(self, settings: Mapping[str, Any], resume: bool) -> Iterator[None]:
        """Make the folder, or with ``resume`` go on in it; errors as :meth:`settled` and :meth:`locked` raise them."""
        with self.locked(finished=(LAYERS,)):
            self.settled("settings.json", settings, resume, (LAYERS,))
            if not self.any(LAYERS):
                self._clear("states-*")
            self._clear("scratch-*")
            yield

    def _clear(self, pattern: str) -> None:
        for left in self.path.glob(pattern):
            left.unlink()

    # layers

    def layer_file(self, name: str) -> Path:
        """Moments of a layer (``003``), or of what comes behind the last (``output``)."""
        return self.path / f"layer-{name}.safetensors"

    def states_file(self, layer: int) -> Path:
        return self.path / f"states-{layer:03d}"

    def next_layer(self) -> int | None:
        """The layer to go on with: its states are there, and so are all layers before it.  None to begin."""
        there = [int(f.name[7:]) for f in self.path.glob("states-*") if re.fullmatch(r"states-\d+", f.name)]
        whole = (
            i
            for i in sorted(there, reverse=True)
            if all(self.layer_file(f"{j:03d}").is_file() for j in range(i))
        )
        return next(whole, None)

    def finish_layer(self, layer: int, states: States) -> None:
        """The states behind ``layer`` get their name; those before it go."""
        states.sync()
        rename(states.file, self.states_file(layer + 1))
        self.states_file(layer).unlink(missing_ok=True)

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> States:
        """A scratch file of that shape.  MobeError if the disk has no room."""
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
            ) as f:  # taken now: a full disk must not be found by a mapping, which is a crash
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
