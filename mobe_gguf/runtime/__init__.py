"""The runtime: llama.cpp with the patches of this project, installed by ``mobe-gguf build``.

This module finds the runtime in the running interpreter's environment.  ``build`` installs it, ``ggml`` calls its
library.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mobe_gguf.core.errors import MobeError
from mobe_gguf.runtime.install import Environment, read_stamp

__all__ = ["is_built", "lib_dir", "source_tree", "tool", "use_conversion"]


def is_built() -> bool:
    """Whether a runtime is installed in this environment (by any version of the patches)."""
    return read_stamp(Environment.active()) is not None


def _installed() -> Environment:
    environment = Environment.active()
    if read_stamp(environment) is None:
        raise MobeError(
            f"the llama.cpp runtime is not installed in {sys.prefix} (there is no {environment.stamp}): "
            "run mobe-gguf build"
        )
    return environment


def source_tree() -> Path:
    """The installed parts of the patched llama.cpp tree: converter, ``gguf-py``, headers, chat templates."""
    return _installed().tree


def lib_dir() -> Path:
    """The directory of ``libllama.so``, ``libggml-base.so`` and the others."""
    return _installed().lib


def tool(name: str) -> Path:
    """Path of one of llama.cpp's programs, such as ``llama-cli``.

    Raises ``MobeError`` when the runtime is not installed, or was built without that program.
    """
    path = _installed().lib / name
    if not path.is_file() or path.name.startswith("lib"):
        # shared libraries are in the same directory
        known = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("lib"))
        hint = "; run mobe-gguf build --test-tools" if name.startswith("test-") else ""
        raise MobeError(f"the installed runtime has no program {name!r}; it has {', '.join(known)}{hint}")
    return path


def use_conversion() -> None:
    """Make ``import conversion`` and ``import gguf`` give the pinned llama.cpp's own packages.

    The converter needs the ``gguf`` of its own tree: PyPI's release with the same version number lacks hundreds of its
    names.  So both directories go to the front of ``sys.path``, and a ``gguf`` imported from elsewhere is dropped from
    ``sys.modules``.  Existing references to it still work; later imports get the tree's.  (Enum members of the two
    compare and hash alike, so values may pass between them.)

    Raises ``MobeError`` when another ``conversion`` is already imported, or there is no runtime.
    """
    tree = source_tree()
    _forget_other("gguf", tree / "gguf-py")
    if "conversion" in sys.modules and not _lies_in("conversion", tree):
        raise MobeError(
            f"a module named 'conversion' is already imported from {_origin('conversion')}, and the converter "
            f"of llama.cpp in {tree} has that name too; call it from a process without the other"
        )
    for path in (str(tree / "gguf-py"), str(tree)):
        if path in sys.path:
            sys.path.remove(path)
        sys.path.insert(0, path)


def _origin(module: str) -> str:
    return getattr(sys.modules[module], "__file__", None) or "an unknown place"


def _lies_in(module: str, directory: Path) -> bool:
    return Path(_origin(module)).is_relative_to(directory)


def _forget_other(package: str, directory: Path) -> None:
    """Drop ``package`` and its submodules from the import system unless they come from ``directory``."""
    if package in sys.modules and not _lies_in(package, directory):
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]
