"""The pinned source distribution: downloaded with pip, kept in the cache, checked on every use."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import sha256
from mobe_gguf.core.progress import bar, say

#: Environment variable for the cache directory; the default is ``$XDG_CACHE_HOME/mobe-gguf`` or ``~/.cache/mobe-gguf``.
CACHE_VARIABLE = "MOBE_GGUF_CACHE"


@dataclass(frozen=True)
class Pin:
    """One source distribution: name on the package index, version, checksum and size of the archive."""

    name: str
    version: str
    sha256: str
    size: int

    @property
    def top(self) -> str:
        """The archive's only top directory."""
        return f"{self.name.replace('-', '_')}-{self.version}"

    @property
    def filename(self) -> str:
        return f"{self.top}.tar.gz"


#: llama-cpp-python, which carries the whole llama.cpp tree in ``vendor/llama.cpp``.
LLAMA_CPP = Pin(
    name="llama-cpp-python",
    version="0.3.36",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    size=76_589_250,
)


def cache_dir() -> Path:
    """Where downloads and build trees are kept.  All of it may be deleted at any time."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mobe-gguf"


def fetch(pin: Pin, cache: Path, env: Mapping[str, str]) -> Path:
    """The archive of ``pin`` in ``cache``, downloaded unless a complete one is there already.

    ``env``: environment variables for pip.  Raises ``MobeError`` when there is no pip, the download fails, or the
    downloaded file has another checksum.
    """
    archive = cache / pin.filename
    if archive.is_file():
        if sha256(archive) == pin.sha256:
            return archive
        say(f"{archive}: checksum differs from the pinned one, downloading again")
        archive.unlink()
    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as scratch:
        arrived = _pip_download(pin, Path(scratch), archive, env)
        found = sha256(arrived)
        if found != pin.sha256:
            raise MobeError(
                f"{pin.filename} as downloaded is not the pinned file: expected sha256 {pin.sha256}, got {found}; "
                "look at pip's index settings (pip config list) and run mobe-gguf build again"
            )
        os.replace(arrived, archive)
    return archive


def unpack(archive: Path, pin: Pin, target: Path) -> None:
    """Unpack the archive's top directory as ``target``, which must not exist.

    The archive's ``.git`` is left out, because tools would take the tree for a checkout of another repository.
    Raises ``MobeError`` when the archive is broken or has another top directory.
    """
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=target.parent) as scratch:
        try:
            with tarfile.open(archive) as tar:
                # Python before 3.10.12 and 3.11.4 has no filter; the archive's checksum has been verified by now
                tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
                git = f"{pin.top}/.git/"
                tar.extractall(scratch, members=(member for member in tar if not member.name.startswith(git)))
        except (tarfile.TarError, EOFError) as error:
            raise MobeError(
                f"cannot unpack {archive}: {error}; delete it and run mobe-gguf build again"
            ) from error
        top = Path(scratch) / pin.top
        if not top.is_dir():
            raise MobeError(
                f"{archive} holds no directory {pin.top}; delete it and run mobe-gguf build again"
            )
        os.replace(top, target)


def _pip_download(pin: Pin, scratch: Path, archive: Path, env: Mapping[str, str]) -> Path:
    """Download ``pin`` below ``scratch`` with pip; all of pip's settings (index, proxy, certificates) apply."""
    if importlib.util.find_spec("pip") is None:
        raise MobeError(
            f"pip is needed to download {pin.name}=={pin.version} and is not installed in {sys.prefix}: "
            f"run {sys.executable} -m ensurepip, or put {pin.filename} into {archive.parent} yourself"
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    arrived, unfinished = scratch / "arrived", scratch / "tmp"
    unfinished.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--progress-bar", "off", "--no-deps"]
    # for this package only: the tools that pip needs to read its metadata may be wheels
    command += ["--no-binary", pin.name, "--require-hashes", "-r", str(requirements), "-d", str(arrived)]
    with open(scratch / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**env, "TMPDIR": str(unfinished)},
        )
        try:
            _watch(process, pin, unfinished)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            tail = "".join(log.readlines()[-15:]).rstrip()
            raise MobeError(
                f"pip could not download {pin.name}=={pin.version} (exit code {process.returncode}):\n{tail}\n"
                f"mend pip's access to a package index, or put {pin.filename} into {archive.parent}, "
                "and run mobe-gguf build again"
            )
    return arrived / pin.filename


def _watch(process: subprocess.Popen[bytes], pin: Pin, unfinished: Path) -> None:
    """Show how many bytes pip has written so far, until it exits."""
    total = pin.size / 1e6
    say(f"downloading {pin.name} {pin.version} ({total:.0f} MB)")
    with bar("download (MB)", round(total)) as progress:
        shown, size = 0, 0
        while process.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(OSError):  # pip renames and removes files meanwhile
                size = sum(path.stat().st_size for path in unfinished.glob(f"*/{pin.filename}"))
            if size / 1e6 >= shown + 1:
                progress.advance(int(size / 1e6) - shown)
                shown = int(size / 1e6)


def remove(path: Path) -> None:
    """Delete a directory tree or file if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
