"""A job: its model, settings and work directory."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import FULL
from mobe_gguf.core.workspace import Workspace
from mobe_gguf.factorize.plan import Plan
from mobe_gguf.factorize.spec import JobSettings
from mobe_gguf.factorize.target import Goal, Size, Unit
from mobe_gguf.formats.imatrix import ImatrixFile
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.original import Original

#: Version of the ``mobe`` key in config.json and of the work directory.
FORMAT = 1
#: Increases with every change after which the same settings give other factors.
SOLVER = "projected-adam-4"


#: Patterns of finished work that a resumed job can use.
FINISHED = ("units/layer-*.safetensors", "probes/layer-*.json")


class JobWorkspace(Workspace):
    """``OUT.work/``: ``job.json`` with the settings, ``units/`` with one safetensors file for each finished unit, ``probes/`` and
    ``sizes.json`` of a ``--target`` job."""

    def unit_path(self, layer: int, projection: str) -> Path:
        return self.path / "units" / f"layer-{layer:03d}-{projection}.safetensors"

    def probe_name(self, unit: Unit) -> str:
        return f"probes/layer-{unit[0]:03d}-{unit[1]}.json"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Lock the directory against a second run; it is removed again if nothing was finished in it."""
        with self.locked(uuid.uuid4().hex, FINISHED):
            (self.path / "units").mkdir(exist_ok=True)
            yield


@dataclass(frozen=True)
class Job:
    """A job that passed every check but has done no work yet.

    ``goal``: the budget of ``--target``.  ``sizes``: the sizes chosen for it, None before the units are probed; ``plan`` then
    assumes an even share.  ``shared``: others may write the same unit at the same time, such as a worker presumed dead.
    """

    checkpoint: Original
    out: Path
    settings: JobSettings
    plan: Plan
    imatrix: ImatrixFile | None
    goal: Goal | None = None
    sizes: Mapping[Unit, Size] | None = None
    moments: Moments | None = None
    shared: bool = False

    def example(self) -> Size | None:
        """A size that some unit has or may get; None if all units have the settings' size."""
        sizes = self.sizes or (self.goal and self.goal.nominal())
        return next(iter(sizes.values())) if sizes else None

    def size(self, unit: Unit) -> Size | None:
        """m and r of a unit; None if they are the settings' own."""
        return self.sizes[unit] if self.sizes else None

    @property
    def moments_of_another(self) -> bool:
        """Whether the moments come from another model or copy of it; False for a GGUF file, where they always do."""
        if self.moments is None or self.checkpoint.directory is None or not self.moments.about:
            return False
        return self.moments.about.get("source_checksum") != self.checkpoint.checksum

    @cached_property
    def workspace(self) -> JobWorkspace:
        return JobWorkspace.beside(self.out)

    @property
    def work(self) -> Path:
        return self.workspace.path

    def unit_path(self, layer: int, projection: str) -> Path:
        return self.workspace.unit_path(layer, projection)

    def description(self) -> dict[str, Any]:
        """Content of job.json: everything that must be the same in a resumed job."""
        return {
            "version": FORMAT,
            "solver": SOLVER,
            "source_checksum": self.checkpoint.checksum,
            "settings": self.settings.to_json(),
        }


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Convert the operating system's disk errors to a MobeError with the next step."""
    try:
        yield
    except OSError as e:
        again = ""
        with contextlib.suppress(OSError):
            if JobWorkspace.beside(out).any(FINISHED[0]):
                again = " Finished units are kept; run the same command again with --resume."
        if e.errno in FULL:
            raise MobeError(f"{out.parent}: the disk is full ({e}). Free some space.{again}") from e
        raise MobeError(f"{out}: cannot be written: {e}. Choose another OUT.{again}") from e
