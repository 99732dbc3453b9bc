"""Commands that are killed (SIGKILL) before they touch a file: everywhere, one touch after the other.

    python tests/fuzz/kills.py [--points 100] [--command NAME]

Each command runs once to count how often it opens, renames, links or removes something in its folder.  Then it is killed at points
spread over these.  After each kill its output must be absent or whole; the same command again, with --resume where there is work, must
give the very bytes of the run that was not killed, and leave nothing else behind.  Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch
from export.handmade import make_mobe

from mobe_gguf.cli import main as command_line
from mobe_gguf.core.errors import run_program
from mobe_gguf.core.progress import bar, console
from mobe_gguf.models.checkpoint import Checkpoint

#: What touches files, as Python's audit events name it.
TOUCHES = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.truncate",
    "shutil.copyfile",
)

#: Name -> words of the command; MODEL, MOBE and OUT are put in.
COMMANDS = {
    "factorize": "factorize MODEL OUT --steps 2 --dtype f32 -q",
    "export": "export MOBE OUT.gguf --quant q8_0 --no-verify --no-refit -q",
    "export-split": "export MOBE OUT.gguf --quant f16 --no-verify --split-max-size 100K -q",
    "reconstruct": "reconstruct MOBE OUT -q",
    "moments": "moments MODEL OUT.safetensors --text TEXT --ctx 32 --chunks 4 -q",
    "compress": "compress MODEL OUT.gguf --quant q4_0 --text TEXT --eval-text TEXT --ctx 64 --chunks 4 --eval-chunks 4 --threads 1 "
    "--steps 2 -q",
    "compress-plain": "compress MODEL OUT.gguf --quant q4_0 --form plain --no-measure --text TEXT --ctx 64 --chunks 4 -q",
}


class Touches:
    """An audit hook that counts what is done in ``folder``, and at ``limit`` kills the process."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.limit, self.on = str(folder), 0, -1, False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or event not in TOUCHES or not any(self.folder in str(a) for a in args[:2]):
            return
        if self.count == self.limit:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def child(work: Callable[[], int]) -> tuple[int, int]:
    """``work()`` in a fork: its exit code (minus the signal), and what it said in a byte pipe."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.write(write, work().to_bytes(8, "little"))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    said = os.read(read, 8)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int.from_bytes(said, "little")


def contents(folder: Path) -> dict[str, str]:
    """Checksum of each file; job records of where and when are left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".safetensors", ".gguf")
    }


def run(words: list[str], touches: Touches, limit: int = -1) -> tuple[int, int]:
    def work() -> int:
        torch.set_num_threads(1)
        touches.on, touches.count, touches.limit = True, 0, limit
        command_line(words, standalone_mode=False)
        return touches.count

    return child(work)


def check(name: str, words: list[str], folder: Path, touches: Touches, points: int) -> list[str]:
    """Faults of one command."""
    code, total = run(words, touches)
    if code:
        return [f"{name}: it fails without a kill, exit code {code}"]
    expected, names = contents(folder), sorted(path.name for path in folder.iterdir())
    faults = []
    limits = sorted({i * total // points for i in range(points)})
    with bar(name, len(limits)) as progress:
        for limit in limits:
            shutil.rmtree(folder)
            folder.mkdir()
            code, _ = run(words, touches, limit)
            left = {k: v for k, v in contents(folder).items() if ".work" not in k and "/." not in f"/{k}"}
            if code != -signal.SIGKILL:
                faults.append(f"{name}, point {limit}: exit code {code} instead of a kill")
            if "split" not in name and any(expected.get(k) != v for k, v in left.items()):
                faults.append(f"{name}, point {limit}: a file that is not whole has its name: {sorted(left)}")
            if contents(folder) != expected:  # else it was killed behind the end of its work
                again = (
                    [*words, "--resume"] if any(folder.glob("*.work/*")) and name != "export-split" else words
                )
                code, _ = run(again, touches)
                if code:
                    faults.append(f"{name}, point {limit}: again it ends with {code}")
                elif contents(folder) != expected or sorted(p.name for p in folder.iterdir()) != names:
                    more = sorted({p.name for p in folder.iterdir()} ^ set(names))
                    faults.append(f"{name}, point {limit}: again it gives other files; {more}")
            progress.advance(1)
    console.print(
        f"{name}: {len(limits)} of {total} points, {len(faults)} faults", markup=False, highlight=False
    )
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=100, help="kills of each command")
    parser.add_argument("--command", choices=COMMANDS, action="append", help="this one alone; repeatable")
    options = parser.parse_args()
    faults = []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        source = tiny.make_model("qwen3_moe", base / "model", num_hidden_layers=2)
        Checkpoint(source).check_whole()
        mobe = make_mobe(source, base / "mobe")
        (base / "text.txt").write_text(tiny.TEXT * 4)
        folder = base / "made"
        touches = Touches(folder)
        places = {"MODEL": source, "MOBE": mobe, "TEXT": base / "text.txt"}
        for command in options.command or COMMANDS:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            words = [
                str(places.get(w, folder / w.replace("OUT", "out") if w.startswith("OUT") else w))
                for w in COMMANDS[command].split()
            ]
            faults += check(command, words, folder, touches, options.points)
    for fault in faults:
        console.print(fault, markup=False, highlight=False)
    return 1 if faults else 0


if __name__ == "__main__":
    run_program(main)
