"""Run a job's pieces: in threads, in one process for each of several devices, or on a Ray cluster.

An executor gets a function and tuples of arguments (:class:`Work`); it does not know what the function does.
"""

from __future__ import annotations

from collections.abc import Iterator

from mobe_gguf.core.executors.base import Context, Done, Piece, Place, Stopped, Work
from mobe_gguf.core.executors.cluster import on_ray
from mobe_gguf.core.executors.processes import in_processes
from mobe_gguf.core.executors.threads import in_threads, pieces_at_once
from mobe_gguf.core.progress import Bar

__all__ = ["Piece", "Place", "Stopped", "Work", "each", "pieces_at_once"]


def each(work: Work[Context, Done], pieces: list[Piece], place: Place, progress: Bar) -> Iterator[Done]:
    """Yields the result of each piece when it is ready.  The first failure stops the others."""
    if not pieces:
        return
    if place.ray is not None:
        yield from on_ray(work, pieces, place.devices[0], progress)
    elif len(place.devices) > 1:
        yield from in_processes(work, pieces, place.devices, progress)
    else:
        yield from in_threads(work, pieces, place.devices[0], place.workers, progress)
