"""One model in several files, split as llama-gguf-split does: ``out-00001-of-00003.gguf`` and so on.

Tensors stay in order; a file takes them while their padded data fit the limit.  The first file has all keys; every
file has ``split.no``, ``split.count`` and ``split.tensors.count``.

Finished files wait in the folder ``.out.gguf.parts`` beside the output.  They get their names when all are finished, so
a set of files with these names is complete.  The folder's ``state.json`` says what the files were made of.  An
interrupted export with the same model and options resumes at the unfinished file.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobe_gguf import __version__
from mobe_gguf.core.atomic import destination, held, rename, sync
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import describe_sizes
from mobe_gguf.core.workspace import Workspace
from mobe_gguf.export.journal import JOURNAL, Journal, Kept
from mobe_gguf.export.write import Encoded, not_written, write_gguf, write_into
from mobe_gguf.formats.gguf import ALIGNMENT, padded

#: ``split.count`` is a u16.
MAX_SHARDS = 65_535


def cut(tensors: Sequence[Encoded], limit: int | None, alignment: int = ALIGNMENT) -> list[list[Encoded]]:
    """``tensors`` in order, split into runs of at most ``limit`` bytes (None: one run), each tensor padded to
    ``alignment``.

    UsageError if a tensor alone is larger, or there are too many runs.
    """
    if limit is None:
        return [list(tensors)]
    shards: list[list[Encoded]] = [[]]
    size = 0
    for tensor in tensors:
        n_bytes = padded(tensor.nbytes, alignment)
        if n_bytes > limit:
            taken, allowed = describe_sizes(n_bytes, limit)
            raise UsageError(
                f"--split-max-size: tensor {tensor.tensor.name} alone takes {taken}, more than the {allowed} allowed; use at "
                f"least --split-max-size {-(-n_bytes // 10**6)}M"
            )
        if size + n_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n_bytes
    if len(shards) > MAX_SHARDS:
        raise UsageError(f"--split-max-size: that makes {len(shards)} files, GGUF knows {MAX_SHARDS} at most")
    return shards


def shard_paths(out: Path, n: int) -> list[Path]:
    """Names of the ``n`` files of ``out``; llama.cpp finds the others by the name of the first."""
    if n == 1:
        return [out]
    stem = out.name.removesuffix(".gguf")
    return [out.with_name(f"{stem}-{i + 1:05d}-of-{n:05d}.gguf") for i in range(n)]


def check_places(paths: Sequence[Path]) -> None:
    """MobeError if one of several files could not get its name in the end, because a link or something not a file is
    there."""
    for path in paths if len(paths) > 1 else ():
        destination(path)
        if path.is_symlink():
            raise MobeError(
                f"{path}: it is a symbolic link, and several files are not written through links; remove it or choose "
                "another OUT"
            )


def fingerprint(files: Iterable[Path], *settings: Any) -> str:
    """A string that is the same for the same files (name, size, time of change) and the same ``settings`` (by their
    repr)."""
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((__version__, sorted(state), settings)).encode()).hexdigest()


#: File in the folder of parts: what the parts were made of, and which are finished.
STATE = "state.json"


@dataclass
class Parts:
    """The folder where finished files of ``out`` wait.  ``key``: what they were made of, see :func:`fingerprint`."""

    out: Path
    key: str
    finished: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.out.with_name(f".{self.out.name}.parts")

    @property
    def state(self) -> Path:
        return self.folder / STATE

    def files(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder by a lock beside it (not in it: the folder may become the output).

        MobeError if another process is at work there.  On a file system without locks there is no protection.
        """
        lock = self.out.with_name(f".{self.out.name}.lock")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(lock, self.out))
            except OSError as e:
                raise MobeError(f"{lock}: cannot be written: {e.strerror or e}") from e
            stack.callback(lock.unlink, missing_ok=True)
            yield

    def load(self) -> None:
        """Take over the files that an interrupted run with the same key finished, if they have the recorded size."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            state = Workspace(self.folder).read(STATE)
            if state.get("key") == self.key:
                sizes = {path.name: path.stat().st_size for path in self.files()}
                self.finished = {n: s for n, s in state["finished"].items() if sizes.get(n) == s}

    def begin(self) -> None:
        """Make the folder, empty except for files that were taken over."""
        try:
            self.folder.mkdir(exist_ok=True)
            for path in self.files():
                if path.name not in self.finished and not _is_unfinished(path):
                    path.unlink()
            self._save()
        except OSError as e:
            raise MobeError(
                f"{self.folder}: cannot be used: {e.strerror or e}. Remove it:\n  rm -r {self.folder}"
            ) from e

    def finish(self, name: str) -> None:
        self.finished[name] = (self.folder / name).stat().st_size
        self._save()

    def _save(self) -> None:
        Workspace(self.folder).write(STATE, {"key": self.key, "finished": self.finished})

    def deliver(self, paths: Sequence[Path]) -> None:
        """Give all files their names and remove the folder.

        The first file is the one to load.  The first file of an older set is removed before anything else, and the new
        one comes last.  If the process is stopped in between, there is no first file, so two sets are never mixed.
        """
        if len(paths) > 1:
            paths[0].unlink(missing_ok=True)
        for path in reversed(paths):
            Workspace(self.folder).deliver(path.name, path)
        shutil.rmtree(self.folder)

    def remove_if_useless(self) -> None:
        """Remove the folder if it holds no finished file, for then there is nothing to resume."""
        if not self.finished and not (self.folder / JOURNAL).exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def finished_files(self) -> list[Path]:
        """All files in the folder but unfinished ones."""
        return [path for path in self.files() if not _is_unfinished(path)]

    def unfinished(self) -> int:
        """Bytes of a file that an interrupted run began, and that the next one copies from."""
        return max((path.stat().st_blocks * 512 for path in self.files() if _is_unfinished(path)), default=0)


def _is_unfinished(path: Path) -> bool:
    """Whether the file in the folder of parts belongs to ``journal``."""
    return path.name == JOURNAL or path.suffix in (".part", ".earlier")


def left_by(out: Path, finished: str) -> str:
    """Message about the files that a stopped run left; ``finished``: what the files are called."""
    folder = Parts(out, "").folder
    return (
        f"{finished} kept in {folder}, the same command resumes from there"
        if folder.exists()
        else "nothing was written"
    )


def write_shards(
    parts: Parts,
    shards: Sequence[Sequence[Encoded]],
    writer_of: Callable[[int], Any],
    on_tensor: Callable[[Encoded], None],
    journal_of: Callable[[Path, str], Journal] | None = None,
) -> list[Path]:
    """Write the files that are not finished yet, then deliver all; returns their paths.

    ``writer_of(i)`` makes the ``gguf.GGUFWriter`` of file i, with keys and tensor table.  ``journal_of(folder, name)``:
    the journal by which an unfinished file is resumed, too.  MobeError as :func:`write_gguf`; what is finished is kept
    then.
    """
    paths = shard_paths(parts.out, len(shards))
    parts.begin()
    try:
        for i, (path, tensors) in enumerate(zip(paths, shards, strict=True)):
            if path.name in parts.finished:
                for tensor in tensors:
                    on_tensor(tensor)
                continue
            kept = f"{len(parts.finished)} of {len(paths)} files are finished and kept in {parts.folder}"
            left = f"{kept}, the same command resumes from there" if parts.finished else "nothing was written"
            if journal_of is None:
                write_gguf(parts.folder / path.name, writer_of(i), list(tensors), on_tensor, left)
            else:
                _write_by_journal(journal_of(parts.folder, path.name), writer_of(i), tensors, on_tensor)
            parts.finish(path.name)
        parts.deliver(paths)
    except OSError as e:
        raise MobeError(
            f"{e.filename or parts.folder}: cannot be written: {e.strerror or e}; what is finished is kept in {parts.folder}"
        ) from e
    finally:
        parts.remove_if_useless()
    return paths


def _write_by_journal(
    journal: Journal, writer: Any, tensors: Sequence[Encoded], on_tensor: Callable[[Encoded], None]
) -> None:
    """Write one file; after a stop its rounded tensors stay."""
    journal.begin()
    try:
        write_into(journal.part, writer, tensors, on_tensor, lambda tensor: Kept(tensor, journal))
        sync(journal.part)
        rename(journal.part, journal.folder / journal.name)
    except OSError as e:
        kept = f"rounded tensors are kept in {journal.folder}, the same command resumes from there"
        raise not_written(journal.part, e, kept) from e
    (journal.folder / JOURNAL).unlink(missing_ok=True)
    journal.earlier.unlink(missing_ok=True)
