"""The directory of unfinished work: durable, locked, and usable again after any kill.

After a crash of the machine a file here is complete or absent: its content is on the disk before it gets its name, and
the name is synced, too (:func:`rename`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mobe_gguf.core.atomic import rename, sync, write_json
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.locks import Busy, locked
from mobe_gguf.core.progress import say


def work_directory(out: Path) -> Path:
    """The work directory beside ``out``.  UsageError if ``out`` cannot name a new directory: ``.``, ``/``, ``..``, empty."""
    if out.name in ("", ".."):
        raise UsageError(
            f"OUT is {str(out)!r}, a directory that is there already; name a new one, as {out / 'mobe'}"
        )
    return out.with_name(out.name + ".work")


W = TypeVar("W", bound="Workspace")


@dataclass(frozen=True)
class Workspace:
    """A directory of files and of JSON records that are written atomically."""

    path: Path

    @classmethod
    def beside(cls: type[W], out: Path) -> W:
        """The work directory of ``out``; raises UsageError like :func:`work_directory`."""
        return cls(work_directory(out))

    @contextlib.contextmanager
    def locked(self, token: str = "", finished: tuple[str, ...] = ()) -> Iterator[None]:
        """Create the directory and lock it: MobeError if a second run uses it.

        ``token``: written into the lock file, so that other machines recognize the directory.  ``finished``: patterns of
        finished work.  If the code inside fails and no file matches them, the directory is removed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as e:
            raise MobeError(
                f"{self.path}: unfinished work goes into a directory of this name, but it is a file; move it or choose another OUT"
            ) from e
        lock = self.path / "lock"
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(locked(lock))
            except Busy as e:
                raise MobeError(
                    f"{self.path}: another run is working on it; wait for it or choose another OUT"
                ) from e
            if held is None:
                say(f"note: {self.path} is on a file system without locks: start one run at a time")
            lock.write_text(token)  # not atomically: the lock is on this very file
            sync(lock)
            try:
                yield
            except BaseException:
                if finished and not any(self.any(pattern) for pattern in finished):
                    self.remove()
                raise

    def token(self) -> str:
        """The token of the run that holds the lock, or held it last.  OSError if there is none."""
        return (self.path / "lock").read_text()

    def any(self, pattern: str) -> bool:
        """Whether any file matches ``pattern``."""
        return any(self.path.glob(pattern))

    def read(self, name: str) -> Any:
        """The JSON that :meth:`write` wrote.  OSError if there is no such file, ValueError if it is not JSON."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def write(self, name: str, value: Any) -> None:
        """Write ``value`` as JSON, atomically."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path / name, value)

    def settled(
        self, name: str, settings: Mapping[str, Any], resume: bool, finished: tuple[str, ...]
    ) -> None:
        """Store ``settings`` as JSON ``name``.  If files match ``finished``, compare ``settings`` with the stored ones instead.

        UsageError if there is finished work without ``resume``, or a setting has changed: the message names the first
        one that differs, with both values.  MobeError if the stored settings cannot be read.
        """
        now = json.loads(json.dumps(settings, default=str))
        if not (self.path / name).is_file() or not any(self.any(pattern) for pattern in finished):
            self.write(name, now)
            return
        if not resume:
            raise UsageError(
                f"{self.path} holds unfinished work. Go on with it:\n  --resume\nor remove it:\n  rm -r {self.path}"
            )
        try:
            before = dict(self.read(name))
        except (OSError, ValueError, TypeError) as e:
            raise MobeError(
                f"{self.path / name}: cannot be read ({e}). Begin again:\n  rm -r {self.path}"
            ) from e
        for key, value in now.items():
            if before.get(key) != value:
                raise UsageError(
                    f"{self.path} was begun with {key.replace('_', '-')} {before.get(key)}, now it is {value}. Give the same, or remove the "
                    f"folder to begin again:\n  rm -r {self.path}"
                )

    def deliver(self, name: str, to: Path) -> None:
        """Move a finished file to its final name."""
        rename(self.path / name, to)

    def remove(self) -> None:
        """Remove the directory, when all is delivered or nothing is worth keeping."""
        shutil.rmtree(self.path, ignore_errors=True)
