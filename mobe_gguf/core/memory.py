"""How much memory and how many processors this process may use, which may be less than the machine has."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")

#: In control groups of version 1, a limit from this size on means "no limit".
NO_LIMIT = 1 << 60


def free_memory() -> int:
    """Bytes that this process can still allocate without swapping or being killed.

    This is the smallest of three: the memory available on the machine; what is left in each control group of the process
    (versions 1 and 2, parents included; file pages that can be dropped count as free); and what the process's own
    limits (``ulimit -v``, ``-d``) leave.  Where the system does not report these (not Linux): all memory of the machine.
    """
    return max(0, min([_of_the_machine(), *_left_in_groups(), *_left_of_limits()]))


def own_memory() -> int:
    """Bytes of this process's own pages; 0 if unknown.  Pages of mapped files do not count: the system can reclaim them."""
    return _fields(PROC / "self" / "status").get("RssAnon:", 0) * 1024


def usable_cpus() -> int:
    """Number of processors that this process may use: its CPU affinity, limited by the quota of its control groups."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _folders("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.strip().isdecimal() and int(period):
            count = min(count, max(1, int(quota) // int(period)))
    return count


def _of_the_machine() -> int:
    found = _fields(PROC / "meminfo").get("MemAvailable:")
    return found * 1024 if found is not None else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_groups() -> Iterator[int]:
    for folder in _folders("memory"):
        for limit, taken, inactive in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            allowed, used = _text(folder / limit), _text(folder / taken)
            if allowed.isdecimal() and used.isdecimal() and int(allowed) < NO_LIMIT:
                droppable = _fields(folder / "memory.stat").get(inactive, 0)
                yield int(allowed) - max(0, int(used) - droppable)


def _left_of_limits() -> Iterator[int]:
    status = _fields(PROC / "self" / "status")
    for what, taken in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        allowed = resource.getrlimit(what)[0]
        if allowed != resource.RLIM_INFINITY:
            yield allowed - status.get(taken, 0) * 1024


def _folders(controller: str) -> Iterator[Path]:
    """The folders of the control groups that limit ``controller`` for this process, innermost first."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root = CGROUP / "unified" if (CGROUP / "unified").is_dir() else CGROUP
        elif controller in controllers.split(","):
            root = CGROUP / controllers if (CGROUP / controllers).is_dir() else CGROUP / controller
        else:
            continue
        # in a container the path is often the host's, and the group itself is what is mounted
        inner = root / path.lstrip("/")
        while True:
            if inner.is_dir():
                yield inner
            if inner == root or root not in inner.parents:
                break
            inner = inner.parent


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, int]:
    """Each line's first word -> the number after it."""
    words = (line.split() for line in _text(path).splitlines())
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdecimal()}
