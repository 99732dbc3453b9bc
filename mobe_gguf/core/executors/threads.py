"""Pieces in threads of this process, on one device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from mobe_gguf.core.executors.base import Context, Done, Piece, Work, attempt, reporting
from mobe_gguf.core.memory import free_memory
from mobe_gguf.core.progress import Bar


def in_threads(
    work: Work[Context, Done], pieces: list[Piece], device: str, workers: int | None, progress: Bar
) -> Iterator[Done]:
    """Several pieces at once on one device.

    Each piece runs on one thread, because a small model's matrices are too small to divide between threads.  (Measured on two
    busy cores: a second thread made a step of the tiny model six times slower.)
    """
    threads = torch.get_num_threads()
    workers = max(1, pieces_at_once(work.memory, len(pieces), device) if workers is None else workers)
    stop = threading.Event()

    def one(piece: Piece) -> Done:
        torch.set_num_threads(max(1, threads // workers))  # threads of this worker
        on_step = reporting(work.label(piece), progress.update, stop)
        if device != "cpu":
            return attempt(work.do, work.context, piece, work.label(piece), device, device, on_step)
        return work.do(work.context, *piece, device, on_step)

    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(one, piece) for piece in pieces]):
            yield future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def pieces_at_once(memory: int, count: int, device: str) -> int:
    """How many of ``count`` pieces run at once: on the CPU as many as threads and half of the memory allow, where a piece takes
    ``memory`` bytes; elsewhere one on each device."""
    if device != "cpu":
        return max(1, min(count, device.count(",") + 1))
    return max(1, min(torch.get_num_threads(), count, int(0.5 * free_memory() / memory)))
