"""Layer numbers in options and messages: ``0-3,7``."""

from __future__ import annotations

import re

from mobe_gguf.core.errors import UsageError


def parse_layers(text: str, option: str = "--layers") -> tuple[int, ...]:
    """``"0-3,7"`` -> (0, 1, 2, 3, 7), sorted; UsageError names the ``option`` and shows the form expected.

    Numbers have at most four digits, because ranges are expanded here, before the model's layer count is known.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UsageError(
                f"{option}: cannot read {part.strip()!r}; expected numbers below 10000 and ranges such as 0-3,7"
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def format_layers(layers: tuple[int, ...]) -> str:
    """(0, 1, 2, 3, 7) -> ``"0-3,7"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
