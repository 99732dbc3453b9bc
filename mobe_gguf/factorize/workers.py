"""Where a job's units are worked on: in threads, in one process for each of several devices, or on a Ray cluster.

Whichever it is, ``do(job, layer, projection, device, on_step)`` is called with every unit and writes what it finds to the
job's work directory; what it returns comes back here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait as wait_for_any
from queue import Empty
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.memory import free_memory
from mobe_gguf.core.progress import Bar
from mobe_gguf.factorize.remote import JobAddress
from mobe_gguf.factorize.target import Unit

if TYPE_CHECKING:
    from mobe_gguf.factorize.job import Job

#: Seconds between two reports of a unit that is worked on in another process, and between two looks at them here.
REPORT = 0.5

Done = TypeVar("Done")
OnStep = Callable[[float, float], None]
Do = Callable[["Job", int, str, str, OnStep], Done]


class Stopped(Exception):
    """Ends a fit from its progress callback because another one failed or the user gave up."""


@dataclass(frozen=True)
class Place:
    """``devices`` of this machine, a unit at a time on each (``workers`` at once where it is one), or, if ``ray`` is given, one
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


def each(job: Job, units: list[Unit], place: Place, progress: Bar, do: Do[Done]) -> Iterator[Done]:
    """``do`` with ``units``; yields each result when it is there.  The first failure stops the others."""
    if not units:
        return
    if place.ray is not None:
        from mobe_gguf.factorize.distributed import on_ray

        yield from on_ray(job, units, place.devices[0], progress, do)
    elif len(place.devices) > 1:
        yield from in_processes(job, units, place.devices, progress, do)
    else:
        yield from in_threads(job, units, place.devices[0], place.workers, progress, do)


def in_threads(
    job: Job, units: list[Unit], device: str, workers: int | None, progress: Bar, do: Do[Done]
) -> Iterator[Done]:
    """Several units at once on one device.

    Units side by side on one thread each, not one unit on many threads: the matrices of a small model are too small to
    share out (measured: on two busy cores a second thread made a step of the tiny model six times slower).
    """
    threads = torch.get_num_threads()
    workers = max(1, units_at_once(job, len(units), device) if workers is None else workers)
    stop = threading.Event()

    def work(unit: Unit) -> Done:
        torch.set_num_threads(max(1, threads // workers))  # of this worker
        on_step = reporting(unit, progress.update, stop)
        if device != "cpu":
            return attempt(job, do, unit, device, device, on_step)
        return do(job, *unit, device, on_step)

    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(work, unit) for unit in units]):
            yield future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def units_at_once(job: Job, count: int, device: str) -> int:
    """How many of ``count`` units are worked on side by side: on the CPU as many as threads and half of the memory allow, else
    one on each device."""
    if device != "cpu":
        return max(1, min(count, device.count(",") + 1))
    return max(1, min(torch.get_num_threads(), count, int(0.5 * free_memory() / job.plan.memory_bytes)))


def reporting(
    unit: Unit, report: Callable[[str], None] | None, stop: Any = None, every: float = 0.0
) -> OnStep:
    """What is called after each step on ``unit``: gives ``report``, if there is one, a line for the bar, with ``every`` seconds in
    between.  Raises Stopped once the event ``stop`` is set.
    """
    began = last = time.monotonic()

    def on_step(share: float, error: float) -> None:
        nonlocal last
        if stop is not None and stop.is_set():
            raise Stopped
        now = time.monotonic()
        if report is not None and now >= last + every:
            last = now
            report(f"layer {unit[0]} {unit[1]}: {share:4.0%}, error {error:.5f}, {now - began:.0f} s")

    return on_step


def in_processes(
    job: Job, units: list[Unit], devices: Sequence[str], progress: Bar, do: Do[Done]
) -> Iterator[Done]:
    """A process for each of several devices, which takes the next unit when it is done with one.

    Processes, not threads: what Python does between the kernels of one device would keep the others waiting.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    stop, steps = context.Event(), context.Queue() if progress.is_live else None
    threads = max(1, torch.get_num_threads() // len(devices))
    address = JobAddress.of(job)
    pools = [ProcessPoolExecutor(1, context, _begin, (stop, steps, threads)) for _ in devices[: len(units)]]
    todo = deque(units)
    running: dict[Future[Done], tuple[int, Unit]] = {}

    def next_unit(i: int) -> None:
        if todo:
            unit = todo.popleft()
            running[pools[i].submit(_work, address, do, unit, devices[i])] = (i, unit)

    try:
        with _interrupts_held():
            for i in range(len(pools)):
                next_unit(i)
        while running:
            done, _ = wait(running, None if steps is None else REPORT, FIRST_COMPLETED)
            with contextlib.suppress(Empty):
                while steps is not None:
                    progress.update(steps.get_nowait())
            for future in done:
                i, unit = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as e:
                    raise MobeError(
                        f"layer {unit[0]} {unit[1]}: the process that worked on {devices[i]} died; of too little memory, "
                        "perhaps. Finished units are kept; run the same command again with --resume, with fewer devices."
                    ) from e
                next_unit(i)
                yield result
    finally:
        stop.set()
        for pool in pools:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all of them: this one tells them to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# in a worker process

_state: dict[str, Any] = {}


def _begin(stop: Any, steps: Any, threads: int) -> None:
    _state.update(stop=stop, steps=steps)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed job must not leave processes behind that go on computing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_any([parent.sentinel])
        os._exit(1)


def _work(address: JobAddress, do: Do[Done], unit: Unit, device: str) -> Done:
    stop, steps = _state["stop"], _state["steps"]
    on_step = reporting(unit, None if steps is None else steps.put, stop, REPORT)
    if stop.is_set():
        raise Stopped
    return attempt(opened(address), do, unit, device, device, on_step)


@cache
def opened(address: JobAddress) -> Job:
    """Opened once in a process, not once for every unit."""
    return address.open()


def attempt(job: Job, do: Do[Done], unit: Unit, device: str, where: str, on_step: OnStep) -> Done:
    """``do``; what torch says of a failing device becomes a MobeError that names it as ``where``."""
    try:
        return do(job, *unit, device, on_step)
    except RuntimeError as e:
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MobeError(
            f"layer {unit[0]} {unit[1]}: {where} failed: {said}. Finished units are kept; run the same command again with "
            "--resume, without that device if it goes on failing."
        ) from e
