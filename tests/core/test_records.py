"""Settings out of JSON: what is written is read, what is of another type is named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from mobe_gguf.core.records import plain, record


@dataclass(frozen=True)
class Inner:
    size: int
    share: float | int | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    layers: tuple[int, ...]
    inner: dict[str, Inner] = field(default_factory=dict)
    pair: tuple[float, float] | None = None


def test_what_was_written_is_read() -> None:
    value = Outer("a", (1, 2), {"x": Inner(3, 0.5), "y": Inner(3, 7)}, (1.0, 2.0))
    found = record(Outer, json.loads(json.dumps(asdict(value) | {"of another version": 1})))
    assert found == value and type(found.inner["y"].share) is int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "a"}, "missing required field `layers`"),
        ({"name": 1, "layers": []}, "Expected `str`, got `int` - at `$.name`"),
        ({"name": "a", "layers": [True]}, "Expected `int`, got `bool` - at `$.layers[0]`"),
        ({"name": "a", "layers": [], "inner": {"x": {"size": "3"}}}, "got `str` - at `$.inner[...].size`"),
        ([], "Expected `object`, got `array`"),
    ],
)
def test_what_is_wrong_is_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        record(Outer, value)
    assert message in str(error.value)


def test_numbers_as_keys():
    """JSON makes strings of them."""

    @dataclass(frozen=True)
    class Shares:
        of: dict[int, float]

    assert record(Shares, json.loads(json.dumps(plain(Shares({3: 0.5}))))) == Shares({3: 0.5})
