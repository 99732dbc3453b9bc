"""Common to all executors: the description of work, and how a piece reports progress and stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import torch

from mobe_gguf.core.errors import MobeError, UsageError

#: Seconds between two progress reports of a piece in another process, and between two checks of the reports here.
REPORT = 0.5

#: A piece of work: a tuple of the function's arguments after its context.
Piece = tuple[Any, ...]
Done = TypeVar("Done")
Context = TypeVar("Context")
Opened = TypeVar("Opened", covariant=True)
#: Called with the share that is done, and the error so far where there is one.
OnStep = Callable[[float, float | None], None]


class Address(Hashable, Protocol[Opened]):
    """How another process gets the context: hashable and picklable."""

    def open(self) -> Opened:
        """Open the context in another process; MobeError if that process does not see the same files."""


@dataclass(frozen=True)
class Work(Generic[Context, Done]):
    """``do(context, *piece, device, on_step)`` is called for each piece and returns its result.

    ``context``: what the pieces share, opened in this process; other processes open it by ``address``.  ``label(piece)``: a
    piece's name in messages.  ``memory``: bytes that a piece takes while it runs.
    """

    do: Callable[..., Done]
    context: Context
    address: Callable[[], Address[Context]]
    label: Callable[[Piece], str]
    memory: int


class Stopped(Exception):
    """Raised in a piece's progress callback to end it, because another piece failed or the user interrupted the job."""


@dataclass(frozen=True)
class Place:
    """Where pieces run.  ``devices`` of this machine: one piece at a time on each, or ``workers`` at once on a single device.
    With ``ray``, the cluster at that address: ``devices`` is then one kind, ``cpu`` or ``cuda``.
    """

    devices: tuple[str, ...] = ("cpu",)
    ray: str | None = None
    workers: int | None = None

    @classmethod
    def of(cls, device: str, ray: str | None = None, workers: int | None = None) -> Place:
        """From ``device`` as on the command line: ``cuda:0,cuda:1``.  UsageError if it is invalid."""
        devices = tuple(part.strip() for part in device.split(","))
        for name in devices:
            try:
                torch.device(name)
            except RuntimeError as e:
                raise UsageError(
                    f"--device {device} cannot be used: {name!r} is no device; expected cpu, cuda, cuda:N or several, as cuda:0,cuda:1"
                ) from e
        if ray is not None and device not in ("cpu", "cuda"):
            raise UsageError(
                f"--device {device} with --ray: Ray hands out the devices; expected --device cpu or --device cuda"
            )
        gpus = [f"cuda:{torch.device(name).index or 0}" for name in devices if name.startswith("cuda")]
        for name in gpus:
            if gpus.count(name) > 1:
                raise UsageError(f"--device {device}: {name} is named twice; name each device once")
        return cls(devices, ray, workers)


def reporting(
    label: str, report: Callable[[str], None] | None, stop: Any = None, every: float = 0.0
) -> OnStep:
    """A callback for each step of the piece ``label``.  It passes a line for the bar to ``report``, if given, at most once in
    ``every`` seconds.  It raises Stopped once the event ``stop`` is set.
    """
    began = last = time.monotonic()

    def on_step(share: float, error: float | None) -> None:
        nonlocal last
        if stop is not None and stop.is_set():
            raise Stopped
        now = time.monotonic()
        if report is not None and now >= last + every:
            last = now
            said = "" if error is None else f" error {error:.5f},"
            report(f"{label}: {share:4.0%},{said} {now - began:.0f} s")

    return on_step


@cache
def opened(address: Address[Context]) -> Context:
    """The context at ``address``, opened once per process and not for every piece."""
    return address.open()


def attempt(
    do: Callable[..., Done], context: Any, piece: Piece, label: str, device: str, where: str, on_step: OnStep
) -> Done:
    """Call ``do``.  torch's error about a failing device becomes a MobeError that names the device as ``where``."""
    try:
        return do(context, *piece, device, on_step)
    except RuntimeError as e:
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MobeError(
            f"{label}: {where} failed: {said}. Finished units are kept; run the same command again with "
            "--resume, without that device if it goes on failing."
        ) from e
