"""Settings and results read from JSON, checked once against their dataclass."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def record(kind: type[T], value: Any) -> T:
    """Convert ``value``, from ``json.loads``, to ``kind``: a dataclass, or a container of dataclasses.

    Missing fields get their defaults; unknown ones are ignored.  ValueError names the field, what was expected and
    what was found: ``Expected `int`, got `str` - at `$.steps```.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_path, str_keys=True)  # keys of JSON are strings
    except msgspec.ValidationError as e:
        raise ValueError(str(e)) from e


def plain(value: Any) -> Any:
    """The inverse of :func:`record`: dictionaries, lists, strings and numbers; paths become strings."""
    return msgspec.to_builtins(value, enc_hook=str)


def _path(kind: type[Any], value: Any) -> Any:
    if kind is not Path or not isinstance(value, str):
        raise NotImplementedError(f"{kind} in a record")
    return Path(value)
