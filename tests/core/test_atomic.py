"""Outputs are whole, of one writer, and only ever files."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mobe_gguf.core import atomic
from mobe_gguf.core.atomic import atomic_path, check_output, destination
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.locks import Busy, locked


def write(path: Path, text: str = "new") -> None:
    with atomic_path(path) as part:
        part.write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)


# what is there already


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    with pytest.raises(ValueError), atomic_path(out) as part:
        part.write_text("half")
        raise ValueError
    assert out.read_text() == "old" and names(tmp_path) == {"out"}
    (tmp_path / ".out.part").write_text("longer than new, of a killed run")
    with atomic_path(out) as part:
        assert part.name == ".out.part" and not part.stat().st_size
        part.write_text("new")
    assert out.read_text() == "new" and names(tmp_path) == {"out"}


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory"])
def test_what_is_no_file_stays(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named itself, and by a link to it."""
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    out, link = Path("out"), Path("link")
    if kind == "pipe":
        os.mkfifo(out)
    elif kind == "directory":
        out.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("out")
    link.symlink_to(out)
    before = out.lstat()
    for path in (out, link):
        with pytest.raises(MobeError, match=f"{path}: it is a {kind}, expected a file or none"):
            write(path)
        with pytest.raises(MobeError, match=kind):
            check_output(path)
    assert names(tmp_path) == {"out", "link"} and out.lstat() == before and link.is_symlink()


def test_a_link_stays_and_its_target_changes(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "model", tmp_path / "link"
    link.symlink_to(Path("disk") / "model")
    for text in ("made by a dangling link", "replaced"):
        check_output(link)
        with atomic_path(link) as part:
            assert part.parent == target.parent
            part.write_text(text)
        assert link.is_symlink() and target.read_text() == text and not target.is_symlink()
    assert names(tmp_path) == {"disk", "link"} and names(target.parent) == {"model"}


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    link, circle = tmp_path / "link", tmp_path / "circle"
    link.symlink_to(tmp_path / "absent" / "model")
    with pytest.raises(
        MobeError, match=rf"link links to .*absent: no such directory.*\n  mkdir -p {tmp_path}/absent"
    ):
        check_output(link)
    circle.symlink_to(circle)
    for refuse in (check_output, destination, write):
        with pytest.raises(MobeError, match="circle: symbolic links that lead in a circle"):
            refuse(circle)
    assert names(tmp_path) == {"link", "circle"}


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    """A given file, also by a link; a file of a given directory, unless it is a GGUF file of an earlier run."""
    folder, text = tmp_path / "model", tmp_path / "text"
    folder.mkdir()
    for path in (text, folder / "model.safetensors", folder / "old.gguf"):
        path.write_text("of the user")
    (tmp_path / "link").symlink_to(text)
    for out, of in (
        (text, "the file"),
        (tmp_path / "link", "the file"),
        (folder / "model.safetensors", f"a file of {folder}"),
    ):
        with pytest.raises(UsageError, match=f"{out} is {of} that is read; it would be replaced"):
            check_output(out, [None, folder, text])
    for out in (folder / "old.gguf", folder / "new", tmp_path / "other"):
        check_output(out, [folder, text])
    with pytest.raises(UsageError, match="old.gguf is the file that is read"):
        check_output(folder / "old.gguf", [folder / "old.gguf"])


# several writers

HOLD = """
import sys
from mobe_gguf.core.atomic import atomic_path
with atomic_path(sys.argv[1]) as part:
    with open(part, "wb") as file:
        file.write(b"first")
        file.flush()
        print("at it", flush=True)
        sys.stdin.readline()
        file.write(b" and whole")
"""


def holder(out: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing ``out``; it ends with a line on its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "at it\n"
    return process


@pytest.mark.usefixtures("impatient")
def test_another_process_is_refused(tmp_path: Path) -> None:
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(out)
    process = holder(out)
    for path in (out, link):
        with pytest.raises(MobeError, match=f"{path}: another run is writing it"):
            write(path)
    process.communicate("\n")
    assert process.returncode == 0 and out.read_text() == "first and whole"
    write(out)
    assert out.read_text() == "new" and names(tmp_path) == {"out", "link"}


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = holder(out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert names(tmp_path) == {".out.part"}
    write(out)
    assert out.read_text() == "new" and names(tmp_path) == {"out"}


def test_a_lock_on_what_was_renamed_guards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer ends between this one's opening of the temporary file and its lock: that file is the output now."""
    out, part = tmp_path / "out", tmp_path / ".out.part"
    part.write_text("the other's")
    flock = fcntl.flock

    def late(fd: int, how: int) -> None:
        if not out.exists():
            part.rename(out)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with atomic_path(out) as mine:
        mine.write_text("mine")
        assert out.read_text() == "the other's" and not mine.samefile(out)
    assert out.read_text() == "mine" and names(tmp_path) == {"out"}


def test_small_files_take_their_turns(tmp_path: Path) -> None:
    """Many at once, some of which fail: each file is of one writer, and whole."""
    out, faults = tmp_path / "out", []

    def work(letter: str) -> None:
        try:
            for i in range(60):
                try:
                    with atomic_path(out) as part, open(part, "w") as file:
                        for _ in range(4):
                            file.write(letter * 100)
                            file.flush()
                        if i % 7 == 0:
                            raise KeyError
                except KeyError:
                    pass
                text = out.read_text()
                assert len(text) == 400 and len(set(text)) == 1, text
        except BaseException as e:
            faults.append(e)

    write(out, "." * 400)
    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and names(tmp_path) == {"out"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_path(tmp_path / "out") as part:
        assert str(os.getpid()) in part.name
        part.write_text("new")
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_no_locks_are_not_another_holder(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock") as fd:
        assert fd is None
    monkeypatch.undo()
    with locked(tmp_path / "lock") as fd:
        assert fd is not None
        with pytest.raises(Busy), locked(tmp_path / "lock"):
            pass
