"""Files that travel with the package: the patches, the kernel sources, the tiny model."""

from __future__ import annotations

from pathlib import Path

from mobe_gguf.core.errors import MobeError

#: The resources.  A checkout has them at its top, a wheel in ``mobe_gguf/_data`` (see ``setup.py``).
NAMES = ("patches", "native", "models")

_PACKAGE = Path(__file__).resolve().parents[1]


def path(name: str) -> Path:
    """The directory of resource ``name``, one of NAMES.

    Raises ``MobeError`` when this installation lacks it (it is damaged or repackaged).
    """
    if name not in NAMES:
        raise ValueError(f"unknown resource {name!r}; known: {', '.join(NAMES)}")
    installed = _PACKAGE / "_data" / name
    checkout = _PACKAGE.parent / name
    if installed.is_dir():
        return installed
    if (_PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    raise MobeError(
        f"this installation of mobe-gguf holds no {name!r} directory (looked for {installed} and {checkout}); "
        "reinstall it: python -m pip install --force-reinstall mobe-gguf"
    )
