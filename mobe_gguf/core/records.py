"""Settings and results out of JSON: checked once, against the dataclass that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def record(kind: type[T], value: Any) -> T:
    """``value``, of ``json.loads``, as ``kind``: a dataclass, or a container of some.

    Fields that are missing have their defaults; what is not known is left out.  ValueError names the field, what was expected and
    what was found: ``Expected `int`, got `str` - at `$.steps```.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_path)
    except msgspec.ValidationError as e:
        raise ValueError(str(e)) from e


def plain(value: Any) -> Any:
    """What :func:`record` makes ``value`` of again: dictionaries, lists, strings and numbers; paths as strings."""
    return msgspec.to_builtins(value, enc_hook=str)


def _path(kind: type[Any], value: Any) -> Any:
    if kind is not Path or not isinstance(value, str):
        raise NotImplementedError(f"{kind} in a record")
    return Path(value)
