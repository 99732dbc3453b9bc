"""Pieces in processes, one for each of several devices."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from queue import Empty
from typing import Any

import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.executors.base import (
    REPORT,
    Address,
    Context,
    Done,
    Piece,
    Stopped,
    Work,
    attempt,
    opened,
    reporting,
)
from mobe_gguf.core.progress import Bar


def in_processes(
    work: Work[Context, Done], pieces: list[Piece], devices: Sequence[str], progress: Bar
) -> Iterator[Done]:
    """One process for each of several devices; it takes the next piece when it has finished one.

    These are processes, not threads: Python's work between the kernels of one device would block the other devices.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    stop, steps = context.Event(), context.Queue() if progress.is_live else None
    threads = max(1, torch.get_num_threads() // len(devices))
    address = work.address()
    pools = [ProcessPoolExecutor(1, context, _begin, (stop, steps, threads)) for _ in devices[: len(pieces)]]
    todo = deque(pieces)
    running: dict[Future[Done], tuple[int, Piece]] = {}

    def next_piece(i: int) -> None:
        if todo:
            piece = todo.popleft()
            sent = pools[i].submit(_work, address, work.do, piece, work.label(piece), devices[i])
            running[sent] = (i, piece)

    try:
        with _interrupts_held():
            for i in range(len(pools)):
                next_piece(i)
        while running:
            done, _ = wait(running, None if steps is None else REPORT, FIRST_COMPLETED)
            with contextlib.suppress(Empty):
                while steps is not None:
                    progress.update(steps.get_nowait())
            for future in done:
                i, piece = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as e:
                    raise MobeError(
                        f"{work.label(piece)}: the process that worked on {devices[i]} died; of too little memory, "
                        "perhaps. Finished units are kept; run the same command again with --resume, with fewer devices."
                    ) from e
                next_piece(i)
                yield result
    finally:
        stop.set()
        for pool in pools:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to all of them; this process tells them to stop."""
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
    """End this process with its parent: a killed job must not leave computing processes behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_any([parent.sentinel])
        os._exit(1)


def _work(address: Address[Context], do: Callable[..., Done], piece: Piece, label: str, device: str) -> Done:
    stop, steps = _state["stop"], _state["steps"]
    on_step = reporting(label, None if steps is None else steps.put, stop, REPORT)
    if stop.is_set():
        raise Stopped
    return attempt(do, opened(address), piece, label, device, device, on_step)
