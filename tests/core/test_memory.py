"""What this process may use, in made-up control groups and under real limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobe_gguf.core import memory

GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """``system(file, text)``: writes a file of a made-up /proc or /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")

    write("proc/meminfo", "MemTotal: 99000000 kB\nMemAvailable: 64000000 kB")
    write("proc/self/status", "Name: x\nVmSize: 1000 kB\nVmData: 1000 kB")
    return write


def test_the_machine(system):
    assert memory.free_memory() == 64_000_000 * 1024


def test_version_2(system):
    """The parent's limit counts; pages of files that can go do not; ``max`` is no limit."""
    system("proc/self/cgroup", "0::/a/b")
    for group, limit, used in (("a", f"{32 * GB}", 10 * GB), ("a/b", "max", 5 * GB)):
        system(f"cgroup/{group}/memory.max", limit)
        system(f"cgroup/{group}/memory.high", "max")
        system(f"cgroup/{group}/memory.current", str(used))
        system(f"cgroup/{group}/memory.stat", f"anon 7\nactive_file 1\ninactive_file {4 * GB}")
    assert memory.free_memory() == 26 * GB
    system("cgroup/a/b/memory.high", str(3 * GB))
    assert memory.free_memory() == 2 * GB
    system("cgroup/a/b/memory.current", str(9 * GB))
    assert memory.free_memory() == 0


def test_version_1(system):
    system("proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/x\n0::/")
    (memory.CGROUP / "unified").mkdir(parents=True)
    system("cgroup/memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    system("cgroup/memory/memory.usage_in_bytes", str(GB))
    assert memory.free_memory() == 64_000_000 * 1024
    system("cgroup/memory/x/memory.limit_in_bytes", str(8 * GB))
    system("cgroup/memory/x/memory.usage_in_bytes", str(2 * GB))
    system("cgroup/memory/x/memory.stat", f"inactive_file 5\ntotal_inactive_file {GB}")
    assert memory.free_memory() == 7 * GB


def test_a_container_that_sees_the_hosts_path(system):
    system("proc/self/cgroup", "0::/kubepods/of/the/host")
    system("cgroup/memory.max", str(4 * GB))
    system("cgroup/memory.current", str(GB))
    assert memory.free_memory() == 3 * GB


def test_processors(system):
    there = len(os.sched_getaffinity(0))
    assert memory.usable_cpus() == there
    system("proc/self/cgroup", "0::/a")
    system("cgroup/a/cpu.max", "50000 100000")
    assert memory.usable_cpus() == 1
    system("cgroup/a/cpu.max", "max 100000")
    assert memory.usable_cpus() == there


def test_own_pages():
    """In a process of its own: what other tests freed may be used again."""
    script = (
        "from mobe_gguf.core.memory import own_memory; before = own_memory()\n"
        "taken = bytearray(50_000_000); taken[::4096] = b'x' * len(taken[::4096])\n"
        "print(own_memory() - before)"
    )
    assert 40e6 < int(answer(script)) < 80e6


def test_own_limits():
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 * 10**9,) * 2)\n"
        "from mobe_gguf.core.memory import free_memory; print(free_memory())"
    )
    assert 10**8 < int(answer(script)) < 3 * 10**9


def answer(script: str) -> str:
    root = str(Path(memory.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
