"""How much memory and how many processors this process may use: not what the machine has, where it is given less."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")

#: A limit of control groups (version 1) from here on means that there is none.
NO_LIMIT = 1 << 60


def free_memory() -> int:
    """Bytes that this process can still take without swapping or being killed.

    The least of what the machine has available, of what each control group that the process is in has left (versions 1
    and 2, parents too; pages of files that can be dropped are not counted as taken), and of what the process's own limits
    (``ulimit -v``, ``-d``) leave.  Where the system says nothing of it (not Linux): all there is.
    """
    return max(0, min([_of_the_machine(), *_left_in_groups(), *_left_of_limits()]))


def own_memory() -> int:
    """Bytes of this process's own pages, without those of mapped files, which are the system's to take back; 0 if it is not said."""
    return _fields(PROC / "self" / "status").get("RssAnon:", 0) * 1024


def usable_cpus() -> int:
    """Processors that this process may keep busy: those it may run on, and no more than the quota of its control groups."""
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
        # in a container the path is often the host's, and what is mounted is the group itself
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
    """The first number of each line behind its first word."""
    words = (line.split() for line in _text(path).splitlines())
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdecimal()}
