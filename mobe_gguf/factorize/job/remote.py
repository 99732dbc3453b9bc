"""Open a job in another process: checks that it sees the same files under the same paths."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

from mobe_gguf import __version__
from mobe_gguf.core.errors import MobeError
from mobe_gguf.factorize.job.state import Job, JobWorkspace
from mobe_gguf.factorize.plan import Plan
from mobe_gguf.factorize.spec import JobSettings
from mobe_gguf.factorize.target import Goal, Size, Unit
from mobe_gguf.formats.imatrix import ImatrixFile
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.original import open_original


@dataclass(frozen=True)
class JobAddress:
    """Everything needed to open a running job in another process.  ``token``: written by the run into the work directory's
    lock, so that another folder with the same name is not mistaken for it.
    """

    model: Path
    out: Path
    settings: JobSettings
    plan: Plan
    sizes: tuple[tuple[Unit, Size], ...] | None
    imatrix: Path | None
    moments: Path | None
    checksum: str
    token: str
    goal: Goal | None = field(default=None, compare=False)
    version: str = __version__

    @classmethod
    def of(cls, job: Job) -> JobAddress:
        """The address of a job that holds its lock."""
        return cls(
            job.checkpoint.path.absolute(),
            job.out.absolute(),
            job.settings,
            job.plan,
            None if job.sizes is None else tuple(job.sizes.items()),
            None if job.imatrix is None else Path(job.imatrix.path).absolute(),
            None if job.moments is None else job.moments.path.absolute(),
            job.checkpoint.checksum,
            job.workspace.token(),
            job.goal if job.sizes is None else None,
        )

    def open(self) -> Job:
        """The job, which writes under names of its own; MobeError if this process does not see the same files."""
        workspace, host = JobWorkspace.beside(self.out), socket.gethostname()
        work = workspace.path
        shared = "Every worker must see MODEL, OUT and the other files under the same paths, on a file system that all share."
        if self.version != __version__:
            raise MobeError(
                f"{host} has mobe-gguf {__version__}, the job runs {self.version}; install the same everywhere"
            )
        try:
            token = workspace.token()
        except OSError as e:
            raise MobeError(f"{work}: not there on {host} ({e.strerror}). {shared}") from e
        if token != self.token:
            raise MobeError(f"{work}: on {host} this is another folder than the job's. {shared}")
        try:
            checkpoint = open_original(self.model)
            imatrix = None if self.imatrix is None else ImatrixFile(self.imatrix)
            moments = None if self.moments is None else Moments(self.moments)
        except MobeError as e:
            raise MobeError(f"on {host}: {e.message}\n{shared}") from e
        found = {
            "MODEL": (checkpoint.checksum, self.checksum),
            "--imatrix": (imatrix and imatrix.checksum, self.settings.imatrix),
            "--moments": (moments and moments.checksum, self.settings.moments),
        }
        for name, (here, there) in found.items():
            if here != there:
                raise MobeError(
                    f"{name} is another one on {host} (checksum {here}, expected {there}). {shared}"
                )
        sizes = None if self.sizes is None else dict(self.sizes)
        return Job(
            checkpoint, self.out, self.settings, self.plan, imatrix, self.goal, sizes, moments, shared=True
        )
