"""Install a compiled runtime into a Python environment, and report what is installed there.

Layout for an environment with site-packages S, scripts directory B and prefix P:

    S/llama_cpp/                 the Python package of the patched source distribution
    S/llama_cpp/lib/             shared libraries and tools, side by side: they find each other by $ORIGIN
    S/llama_cpp_python-V.dist-info/   so that pip lists it, and can uninstall it
    B/llama-cli ...              links into S/llama_cpp/lib
    P/share/mobe-gguf/llama.cpp/ the parts of the source tree that Python code reads: converter, gguf-py, headers
    P/share/mobe-gguf/runtime.json    the stamp: key, options, every file with its size; written last

An installed runtime does not refer to the cache directory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mobe_gguf.core.atomic import write_json
from mobe_gguf.core.errors import MobeError
from mobe_gguf.runtime.compile import BuildOptions
from mobe_gguf.runtime.source import Pin, remove

#: Version of the stamp's format and of this layout.
FORMAT = 1

#: Parts of ``vendor/llama.cpp`` that are installed beside the compiled runtime.
TREE_PARTS = (
    "LICENSE",
    "convert_hf_to_gguf.py",
    "conversion",
    "gguf-py",
    "include",
    "ggml/include",
    "models/templates",
)


@dataclass(frozen=True)
class Environment:
    """Where a runtime is installed: site-packages, scripts directory and data directory."""

    libraries: Path
    scripts: Path
    data: Path

    @classmethod
    def active(cls) -> Environment:
        """The environment of the running interpreter."""
        return cls(
            libraries=Path(sysconfig.get_path("platlib")),
            scripts=Path(sysconfig.get_path("scripts")),
            data=Path(sysconfig.get_path("data")) / "share" / "mobe-gguf",
        )

    @classmethod
    def at(cls, prefix: Path) -> Environment:
        """A plain directory: its ``site-packages`` on PYTHONPATH makes the runtime importable."""
        return cls(prefix / "site-packages", prefix / "bin", prefix / "share" / "mobe-gguf")

    @property
    def package(self) -> Path:
        return self.libraries / "llama_cpp"

    @property
    def lib(self) -> Path:
        return self.package / "lib"

    @property
    def tree(self) -> Path:
        return self.data / "llama.cpp"

    @property
    def stamp(self) -> Path:
        return self.data / "runtime.json"

    def check_writable(self) -> None:
        """Raise ``MobeError`` unless this process may install here."""
        marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
        if self == Environment.active() and sys.prefix == sys.base_prefix and marker.exists():
            raise MobeError(
                f"{sys.prefix} belongs to the operating system's package manager: "
                "make a virtual environment (python3 -m venv env), install mobe-gguf there, and build from it"
            )
        for directory in (self.libraries, self.scripts, self.data):
            there = next(parent for parent in (directory, *directory.parents) if parent.exists())
            if not os.access(there, os.W_OK):
                raise MobeError(
                    f"cannot install into {directory}: {there} is not writable; "
                    "make a virtual environment (python3 -m venv env), install mobe-gguf there, and build from it"
                )


def read_stamp(environment: Environment) -> dict[str, Any] | None:
    """The stamp of the runtime in ``environment``; None if there is no complete runtime with a stamp of this format."""
    try:
        stamp = json.loads(environment.stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.get("format") == FORMAT else None


def is_whole(environment: Environment, stamp: dict[str, Any]) -> bool:
    """Whether every file that ``stamp`` lists exists with the right size."""
    roots = asdict(environment)
    try:
        return all(
            os.stat(os.path.join(roots[root], name)).st_size == size
            for root, files in stamp["files"].items()
            for name, size in files.items()
        )
    except OSError:
        return False


def install(
    environment: Environment,
    tree: Path,
    build: Path,
    pin: Pin,
    version: str,
    options: BuildOptions,
    stamp: dict[str, Any],
) -> None:
    """Install what was compiled in ``build`` from ``tree`` (the source distribution's top directory).

    ``version``: the version that pip will list.  Replaces any llama-cpp-python in the environment.

    The new runtime is copied completely before the old one is touched.  Then a few renames replace the old one; there is
    no stamp meanwhile.  An interruption before the renames leaves the old runtime in place.  One during the renames leaves
    no stamp, so the result is not mistaken for a complete runtime.  ``stamp`` gets the format and the file list and is
    written last.
    """
    for directory in (environment.libraries, environment.scripts, environment.data):
        directory.mkdir(parents=True, exist_ok=True)
    info = environment.libraries / f"{pin.name.replace('-', '_')}-{version}.dist-info"
    links = [environment.scripts / tool for tool in options.tools]
    with _beside(environment.package, environment.tree, info) as (package, parts, metadata_dir):
        shutil.copytree(
            tree / "llama_cpp",
            package,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "lib"),
        )
        _copy_binaries(build / "bin", package / "lib", options.tools)
        for name in TREE_PARTS:
            _copy(tree / "vendor" / "llama.cpp" / name, parts / name)
        _write_metadata(metadata_dir, tree, pin, version)
        elsewhere = [
            *links,
            *(environment.tree / file.relative_to(parts) for file in _files(parts)),
            environment.stamp,
        ]
        rows = [
            *(_record(environment.package.name, package, file) for file in _files(package)),
            *(f"{info.name}/{file.relative_to(metadata_dir).as_posix()},," for file in _files(metadata_dir)),
            *(f"{os.path.relpath(file, environment.libraries)},," for file in elsewhere),
            f"{info.name}/RECORD,,",
        ]
        (metadata_dir / "RECORD").write_text("\n".join(rows) + "\n", encoding="utf-8")
        named = {_place(environment, row.split(",")[0]) for row in rows}
        stale = _installed_files(environment, pin) - named
        environment.stamp.unlink(missing_ok=True)
    for link in links:
        _link(link, environment.lib / link.name)
    for path in stale:
        path.unlink(missing_ok=True)
    for other in environment.libraries.glob(f"{pin.name.replace('-', '_')}-*.dist-info"):
        if other != info:
            remove(other)
    files = {
        "libraries": _sizes(environment.libraries, [environment.package, info]),
        "scripts": _sizes(environment.scripts, links),
        "data": _sizes(environment.data, [environment.tree]),
    }
    write_json(environment.stamp, {"format": FORMAT, **stamp, "files": files})


@contextmanager
def _beside(*finals: Path) -> Iterator[list[Path]]:
    """``with _beside(a, b) as (x, y)``: fill the directories x and y; on success they replace a and b, one after the other.

    Programs that run from the old directories keep running: the old files are unlinked, never overwritten.
    """
    new = [final.with_name(f".{final.name}.new") for final in finals]
    try:
        for path in new:
            remove(path)
            path.mkdir(parents=True)
        yield new
    except BaseException:
        for path in new:
            shutil.rmtree(path, ignore_errors=True)
        raise
    for path, final in zip(new, finals, strict=True):
        _swap(path, final)


def _swap(new: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    remove(old)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    remove(old)


def _place(environment: Environment, name: str) -> Path:
    """Path of a file, given its name in RECORD."""
    return Path(os.path.normpath(environment.libraries / name))


def _installed_files(environment: Environment, pin: Pin) -> set[Path]:
    """Files of any llama-cpp-python installed in the environment, by its RECORD; files outside its directories are left
    out."""
    found = set()
    for distribution in metadata.distributions(name=pin.name, path=[str(environment.libraries)]):
        for file in distribution.files or ():
            path = _place(environment, str(file))
            roots = (environment.libraries, environment.scripts, environment.data)
            if any(map(path.is_relative_to, roots)):
                found.add(path)
    return found


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(
            source,
            target,
            symlinks=True,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "tests"),
        )
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _copy_binaries(source: Path, target: Path, tools: Sequence[str]) -> None:
    """Copy the shared libraries, with their version links, and ``tools``."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.glob("lib*")) + [source / tool for tool in tools]:
        _copy(path, target / path.name)


def _link(link: Path, target: Path) -> None:
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(target, link.parent))
    os.replace(part, link)


def _files(directory: Path) -> Iterator[Path]:
    return (
        path for path in sorted(directory.rglob("*")) if "__pycache__" not in path.parts and not path.is_dir()
    )


def _sizes(root: Path, paths: Sequence[Path]) -> dict[str, int]:
    """Size of every file of ``paths`` (files and directories below ``root``), by its path from ``root``."""
    found = [file for path in paths for file in (_files(path) if path.is_dir() else [path])]
    return {file.relative_to(root).as_posix(): file.stat().st_size for file in found}


def _write_metadata(info: Path, tree: Path, pin: Pin, version: str) -> None:
    """Write the package's metadata directory, except for RECORD (PEP 376, 427)."""
    text = (tree / "PKG-INFO").read_text(encoding="utf-8")
    (info / "METADATA").write_text(
        text.replace(f"\nVersion: {pin.version}\n", f"\nVersion: {version}\n", 1), encoding="utf-8"
    )
    (info / "INSTALLER").write_text("mobe-gguf\n", encoding="utf-8")
    _copy(tree / "LICENSE.md", info / "licenses" / "LICENSE.md")


def _record(name: str, root: Path, file: Path) -> str:
    """Line of RECORD for ``file`` below ``root``; ``name`` is its final name."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
    return f"{name}/{file.relative_to(root).as_posix()},sha256={digest},{file.stat().st_size}"
