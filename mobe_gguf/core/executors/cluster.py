"""Pieces on a Ray cluster: a queue with one task for each piece.  If a worker dies, its piece is assigned again.

Workers read and write files directly, on a file system that all machines share.  Only addresses and results pass through
Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mobe_gguf import __version__
from mobe_gguf.core.errors import MobeError, UsageError, one_line
from mobe_gguf.core.executors.base import (
    REPORT,
    Address,
    Context,
    Done,
    Piece,
    Work,
    attempt,
    opened,
    reporting,
)
from mobe_gguf.core.progress import Bar

#: How often in total a piece is assigned if its workers die.
ATTEMPTS = 4


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Context manager: connected to the cluster at ``address`` (``local``: one of this machine's processors, for this run
    only).  Does nothing without an address.  MobeError if Ray is not installed or does not answer.
    """
    if address is None:
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # the next version's default, else a warning
    try:
        import ray
    except ImportError as e:
        raise MobeError(
            "--ray needs Ray, which is not installed: pip install 'mobe-gguf[ray]', here and on every machine"
        ) from e
    started: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **started)
    except (ConnectionError, ValueError, RuntimeError, OSError) as e:
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MobeError(
            f"--ray {address}: cannot be used ({said}). Start one with:\n  ray start --head\n"
            "and name it by its address HOST:6379 (on its own machine: auto), or take --ray local"
        ) from e
    try:
        yield
    finally:
        ray.shutdown()


def machines(device: str) -> int:
    """GPUs of the connected cluster for ``cuda``, else its machines."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if device == "cuda":
        return max(1, sum(int(node.get("GPU", 0)) for node in nodes))
    return max(1, sum(node.get("CPU", 0) >= 1 for node in nodes))


def on_ray(work: Work[Context, Done], pieces: list[Piece], device: str, progress: Bar) -> Iterator[Done]:
    """Run ``pieces`` on the connected cluster; ``device`` is ``cpu`` or ``cuda``.

    A piece takes its memory and one GPU, or a share of the CPUs.  Ray runs as many at once as the cluster has room for.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.queue import Queue

    needs = _needs(work.memory, len(pieces), device)
    steps = Queue(actor_options={"num_cpus": 0}) if progress.is_live else None
    task: Any = ray.remote(max_retries=0, **needs)(_work)
    address = ray.put(work.address())
    action = ray.put(work.do)
    tries = dict.fromkeys(pieces, 0)
    running: dict[Any, Piece] = {}

    def hand_out(piece: Piece) -> None:
        tries[piece] += 1
        sent = address, action, piece, work.label(piece), device, needs["num_cpus"], steps
        running[task.remote(*sent)] = piece

    try:
        for piece in pieces:
            hand_out(piece)
        while running:
            done, _ = ray.wait(list(running), timeout=None if steps is None else REPORT)
            while steps is not None and not steps.empty():
                progress.update(steps.get())
            for ref in done:
                piece = running.pop(ref)
                try:
                    result = ray.get(ref)
                except RayTaskError as e:  # `do` itself failed, and would fail again
                    raise _cause(e) from e
                except RayError as e:
                    said = one_line(e) or type(e).__name__
                    if tries[piece] == ATTEMPTS:
                        raise MobeError(
                            f"{work.label(piece)}: its worker died {ATTEMPTS} times, at last: {said}\nFinished units are "
                            "kept; run the same command again with --resume."
                        ) from e
                    progress.advance(
                        0,
                        f"{work.label(piece)}: its worker died ({type(e).__name__}), given to another",
                    )
                    hand_out(piece)
                else:
                    yield result
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
        if steps is not None:
            steps.shutdown(force=True)


def _needs(memory: int, count: int, device: str) -> dict[str, Any]:
    """Resources of a task.  UsageError if no machine has them."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = "GPU" if device == "cuda" else "CPU"
    able = [node for node in nodes if node.get(kind, 0) >= 1]
    if not able:
        raise UsageError(
            f"--device {device} with --ray: none of the cluster's {len(nodes)} machines has a {kind} to give"
        )
    at_once = min(count, sum(int(node[kind]) for node in able))
    cpus = [int(node.get("CPU", 0)) for node in able]
    needs: dict[str, Any] = {"num_cpus": min(sum(cpus) // at_once, *cpus, sum(cpus))}
    if device == "cuda":
        needs["num_gpus"] = 1
    largest = max(int(node.get("memory", 0)) for node in able)
    return needs | {"memory": min(memory, largest)}


def _cause(error: Any) -> BaseException:
    """The exception raised in a worker; converted to MobeError unless it is one of ours or a disk error."""
    cause = error.cause
    if isinstance(cause, MobeError | OSError):
        return cause
    said = str(error).strip().splitlines()[-1]
    hint = f" Install mobe-gguf[ray] {__version__} on every machine." if "No module named" in said else ""
    return MobeError(f"a worker failed: {said}.{hint} Finished units are kept; --resume continues from them.")


def await_file(path: Path, seconds: float = 90) -> None:
    """Wait for ``path``: a network file system may show another machine's file only after a while.

    MobeError if the file does not appear.
    """
    until = time.monotonic() + seconds
    while path.name not in os.listdir(path.parent):
        if time.monotonic() > until:
            raise MobeError(
                f"{path}: a worker wrote it, but it is not here after {seconds:.0f} s. Is {path.parent} on a file system that "
                "all machines share? Run the same command again with --resume."
            )
        time.sleep(1)


# in a worker


def _work(
    address: Address[Context],
    do: Callable[..., Done],
    piece: Piece,
    label: str,
    device: str,
    threads: int,
    steps: Any,
) -> Done:
    torch.set_num_threads(max(1, threads))

    def report(line: str) -> None:
        with contextlib.suppress(Exception):  # a lost report does no harm
            steps.put_nowait(line)

    on_step = reporting(label, None if steps is None else report, every=2 * REPORT)
    where = f"{device} of {socket.gethostname()}"
    return attempt(do, opened(address), piece, label, device, where, on_step)
