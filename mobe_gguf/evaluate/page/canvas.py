"""A small SVG picture: shapes, text of known size, ticks of axes.

Text is set in a monospaced font, so its width follows from its length (``WIDE`` is for the widest such font in use).
Colors are CSS classes; the page defines them for light, dark and print.
"""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

from mobe_gguf.evaluate.labels import Box

#: Font size in pixels, and the width of a letter as a share of it.
FONT, WIDE = 11.5, 0.605
#: Height of a line of text.
LINE = 15.0


def width_of(text: str) -> float:
    """Pixels that ``text`` takes."""
    return len(text) * FONT * WIDE


class Canvas:
    """A picture of ``width`` pixels; the height is known when :meth:`svg` is called.  ``label``: what a screen reader says."""

    def __init__(self, width: float, label: str):
        self.width = width
        self.root = ET.Element("svg", {"role": "img", "aria-label": label})

    def shape(self, tag: str, style: str, **attributes: float | str) -> ET.Element:
        """Add an element of CSS class ``style``; underscores in attribute names become hyphens."""
        texts = {
            name.replace("_", "-"): value if isinstance(value, str) else f"{value:.2f}"
            for name, value in attributes.items()
        }
        return ET.SubElement(self.root, tag, {"class": style, **texts})

    def line(self, x0: float, y0: float, x1: float, y1: float, style: str) -> None:
        self.shape("line", style, x1=x0, y1=y0, x2=x1, y2=y1)

    def path(self, points: list[tuple[float, float]], style: str) -> None:
        self.shape("polyline", style, points=" ".join(f"{x:.2f},{y:.2f}" for x, y in points))

    def text(self, x: float, y: float, text: str, anchor: str = "start", style: str = "t") -> None:
        """Write ``text``, vertically centred at ``y``."""
        self.shape("text", style, x=x, y=y + 0.35 * FONT, text_anchor=anchor).text = text

    def mark(self, series: int, x: float, y: float, size: float, said: str) -> None:
        """Draw a point: circle, diamond, square or triangle by its series; ``said`` is shown under the mouse
        pointer."""
        s, style = size, f"m c{series % 8}"
        if series % 4 == 0:
            found = self.shape("circle", style, cx=x, cy=y, r=s)
        else:
            corners = {
                1: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
                2: ((-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)),
                3: ((0, -1.25), (1.15, 0.9), (-1.15, 0.9)),
            }[series % 4]
            points = " ".join(f"{x + s * dx:.2f},{y + s * dy:.2f}" for dx, dy in corners)
            found = self.shape("polygon", style, points=points)
        ET.SubElement(found, "title").text = said

    def cell(self, box: Box, share: float | None, said: str, style: str = "cell") -> None:
        """Draw a rectangle with a color of strength ``share`` (0 to 1); ``said`` is shown under the mouse pointer."""
        x0, y0, x1, y1 = box
        strength = {} if share is None else {"fill_opacity": 0.08 + 0.92 * min(1.0, max(0.0, share))}
        found = self.shape("rect", style, x=x0, y=y0, width=x1 - x0, height=y1 - y0, **strength)
        ET.SubElement(found, "title").text = said

    def svg(self, height: float) -> str:
        self.root.set("viewBox", f"0 0 {self.width:g} {math.ceil(height)}")
        return ET.tostring(self.root, encoding="unicode")


def short(text: str, length: int) -> str:
    """``text`` cut to at most ``length`` characters by leaving out its middle."""
    if len(text) <= length:
        return text
    end = (length - 1) * 2 // 3
    return text[: length - 1 - end] + "…" + text[len(text) - end :]


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """Round numbers from ``low`` to ``high``, both positive: 1, 2, 5 times powers of ten, or fewer if these are too
    many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [k * 10.0**e for e in decades for k in steps if low <= k * 10.0**e <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def number(value: float) -> str:
    """A tick's number as text: ``0.005``, ``12``, ``1e-06``."""
    return f"{value:.6g}"
