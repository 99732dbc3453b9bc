"""The directory of unfinished work, without any work: locks, what a killed or failing run leaves, what reaches the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mobe_gguf.core import atomic
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.workspace import Workspace

HOLD = """
import sys, time
from pathlib import Path
from mobe_gguf.core.workspace import Workspace
work = Workspace(Path(sys.argv[1]))
with work.locked("mine", ("done-*",)):
    work.write("done-1", [1])
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    return Workspace.beside(tmp_path / "out")


@pytest.mark.parametrize("out", [Path("."), Path("/"), Path("a/.."), Path("")])
def test_no_name_for_a_directory(out: Path) -> None:
    with pytest.raises(UsageError, match="a directory that is there already; name a new one"):
        Workspace.beside(out)


def test_a_second_run_is_refused_and_a_killed_one_leaves_its_work(work: Workspace) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(work.path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(MobeError, match="out.work: another run is working on it"), work.locked():
            pass
        assert work.token() == "mine"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with work.locked("yours"):
        assert work.read("done-1") == [1] and work.token() == "yours"


def test_a_file_in_its_place(work: Workspace) -> None:
    work.path.write_text("not mine")
    with (
        pytest.raises(MobeError, match="out.work: unfinished work goes into a directory of this name"),
        work.locked(),
    ):
        pass
    assert work.path.read_text() == "not mine"


def test_a_failure_keeps_what_is_finished_and_nothing_else(work: Workspace) -> None:
    with pytest.raises(KeyboardInterrupt), work.locked("", ("units/done-*",)):
        work.write("job.json", {})
        raise KeyboardInterrupt
    assert not work.path.exists()
    with pytest.raises(KeyboardInterrupt), work.locked("", ("units/done-*",)):
        work.write("units/done-1", {"a": 1})
        raise KeyboardInterrupt
    assert work.read("units/done-1") == {"a": 1} and work.any("units/*")
    work.remove()
    assert not work.path.exists()


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record(fd: int) -> None:
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def renamed(source: Path, target: Path) -> None:
        done.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(atomic.os, "fsync", record)
    monkeypatch.setattr(atomic.os, "replace", renamed)
    work.write("job.json", {})
    work.deliver("job.json", work.path.parent / "result.json")
    assert done == [
        "sync .job.json.part",
        ".job.json.part -> job.json",
        "sync out.work",
        "job.json -> result.json",
        f"sync {work.path.parent.name}",
    ]


def test_settings_are_noted_and_compared(work: Workspace) -> None:
    with work.locked():
        work.settled("job.json", {"rank": 3, "where": Path("a")}, False, ("done-*",))
        work.settled(
            "job.json", {"rank": 4, "where": Path("a")}, False, ("done-*",)
        )  # nothing is finished yet
        work.write("done-1", 1)
        with pytest.raises(UsageError, match="holds unfinished work. Go on with it:\n  --resume"):
            work.settled("job.json", {"rank": 4, "where": Path("a")}, False, ("done-*",))
        with pytest.raises(UsageError, match="was begun with rank 4, now it is 5"):
            work.settled("job.json", {"rank": 5, "where": Path("a")}, True, ("done-*",))
        work.settled("job.json", {"rank": 4, "where": Path("a")}, True, ("done-*",))
        (work.path / "job.json").write_text("[")
        with pytest.raises(MobeError, match="cannot be read"):
            work.settled("job.json", {"rank": 4}, True, ("done-*",))
