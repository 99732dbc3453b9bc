"""Executors with functions that are no fits: results, stopping, workers that die, and what another process opens."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.executors import Place, Stopped, Work, each
from mobe_gguf.core.progress import Bar

PIECES = [(i, "x") for i in range(6)]


@dataclass(frozen=True)
class Folder:
    """A context, and its address: pieces leave a file each."""

    path: Path

    def open(self) -> Folder:
        (self.path / f"opened-{os.getpid()}").touch()
        return self


def note(context: Folder, number: int, word: str, device: str, on_step) -> tuple[int, str, int]:
    on_step(0.5, 0.1)
    (context.path / f"piece-{number}").write_text(device)
    return number, word + device, os.getpid()


def fails_at(which: int, error: BaseException, context: Folder, number: int, word: str, device: str, on_step):
    """The piece ``which`` fails once the first is at work, which then works until it is stopped."""
    begun = context.path / "begun"
    if number == which:
        while not begun.exists():
            time.sleep(0.01)
        raise error
    begun.touch()
    try:
        while True:
            on_step(0.5, 0.1)
            time.sleep(0.01)
    except Stopped:
        (context.path / "stopped").touch()
        raise


def dies(context: Folder, number: int, word: str, device: str, on_step):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return note(context, number, word, device, on_step)


def call(do, folder: Path, place: Place, pieces=PIECES):
    work = Work(do, Folder(folder), lambda: Folder(folder), lambda piece: f"piece {piece[0]}", 1)
    return list(each(work, list(pieces), place, Bar("test", len(pieces), None, True)))


@pytest.mark.parametrize("place", [Place(workers=2), Place(("cpu", "cpu"))], ids=["threads", "processes"])
def test_every_piece_once(place, tmp_path):
    found = call(note, tmp_path, place)
    assert sorted(number for number, _, _ in found) == [0, 1, 2, 3, 4, 5]
    assert {said for _, said, _ in found} == {"xcpu"}
    assert {p.name for p in tmp_path.glob("piece-*")} == {f"piece-{i}" for i in range(6)}
    processes = {pid for _, _, pid in found}
    opened = {int(p.name.removeprefix("opened-")) for p in tmp_path.glob("opened-*")}
    assert processes == ({os.getpid()} if len(place.devices) == 1 else opened), "once a process"


@pytest.mark.parametrize("place", [Place(workers=2), Place(("cpu", "cpu"))], ids=["threads", "processes"])
def test_a_failure_stops_the_others(place, tmp_path):
    with pytest.raises(MobeError, match="piece 1 is bad"):
        call(partial(fails_at, 1, MobeError("piece 1 is bad")), tmp_path, place, PIECES[:2])
    assert (tmp_path / "stopped").exists()


def test_what_a_device_says_is_one_line(tmp_path):
    with pytest.raises(MobeError) as error:
        call(partial(fails_at, 1, RuntimeError("out of memory\nand more")), tmp_path, Place(("cpu", "cpu")), PIECES[:2])  # fmt: skip
    assert error.value.message.startswith("piece 1: cpu failed: out of memory. Finished units are kept")


def test_a_process_that_dies_is_told(tmp_path):
    with pytest.raises(MobeError, match="piece 1: the process that worked on cpu died"):
        call(dies, tmp_path, Place(("cpu", "cpu")), PIECES[:3])


def test_nothing_to_do_starts_nothing(tmp_path):
    before = threading.active_count()
    assert call(note, tmp_path, Place(("cpu", "cpu")), []) == []
    assert threading.active_count() == before and not list(tmp_path.iterdir())
