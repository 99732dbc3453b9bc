"""What all executors have in common: the work that they are given, and how a piece of it reports and stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import torch

from mobe_gguf.core.errors import MobeError, UsageError

#: Seconds between two reports of a piece that is worked on in another process, and between two looks at them here.
REPORT = 0.5

#: What is to be worked on, a tuple: the arguments of the function behind its context.
Piece = tuple[Any, ...]
Done = TypeVar("Done")
Context = TypeVar("Context")
Opened = TypeVar("Opened", covariant=True)
OnStep = Callable[[float, float], None]


class Address(Hashable, Protocol[Opened]):
    """How another process comes by the context: hashable, and it can be pickled."""

    def open(self) -> Opened:
        """MobeError if that process does not see what this one does."""


@dataclass(frozen=True)
class Work(Generic[Context, Done]):
    """``do(context, *piece, device, on_step)`` is called with each piece; what it returns comes back.

    ``context``: what the pieces share, as it is open in this process; ``address`` makes that of another.  ``label(piece)``:
    what messages call a piece.  ``memory``: bytes that a piece takes while it is worked on.
    """

    do: Callable[..., Done]
    context: Context
    address: Callable[[], Address[Context]]
    label: Callable[[Piece], str]
    memory: int


class Stopped(Exception):
    """Ends a piece from its progress callback because another one failed or the user gave up."""


@dataclass(frozen=True)
class Place:
    """``devices`` of this machine, a piece at a time on each (``workers`` at once where it is one), or, if ``ray`` is given, one
    kind of device, ``cpu`` or ``cuda``, on the cluster at that address.
    """

    devices: tuple[str, ...] = ("cpu",)
    ray: str | None = None
    workers: int | None = None

    @classmethod
    def of(cls, device: str, ray: str | None = None, workers: int | None = None) -> Place:
        """``device`` as the command line has it: ``cuda:0,cuda:1``.  UsageError if that makes no sense."""
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
    """What is called after each step on the piece ``label``: gives ``report``, if there is one, a line for the bar, with ``every``
    seconds in between.  Raises Stopped once the event ``stop`` is set.
    """
    began = last = time.monotonic()

    def on_step(share: float, error: float) -> None:
        nonlocal last
        if stop is not None and stop.is_set():
            raise Stopped
        now = time.monotonic()
        if report is not None and now >= last + every:
            last = now
            report(f"{label}: {share:4.0%}, error {error:.5f}, {now - began:.0f} s")

    return on_step


@cache
def opened(address: Address[Context]) -> Context:
    """Opened once in a process, not once for every piece."""
    return address.open()


def attempt(
    do: Callable[..., Done], context: Any, piece: Piece, label: str, device: str, where: str, on_step: OnStep
) -> Done:
    """``do``; what torch says of a failing device becomes a MobeError that names it as ``where``."""
    try:
        return do(context, *piece, device, on_step)
    except RuntimeError as e:
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MobeError(
            f"{label}: {where} failed: {said}. Finished units are kept; run the same command again with "
            "--resume, without that device if it goes on failing."
        ) from e
