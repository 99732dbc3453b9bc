"""A self-contained HTML page: pictures as SVG, the same numbers as tables, no script, no network.

``data`` defines what a page may show, ``render`` makes HTML of it, ``charts`` draws the pictures.  ``files`` and
``texts`` read from GGUF files what ``sections`` puts on a page; each command adds its own sections.
"""

from __future__ import annotations

from mobe_gguf.evaluate.page.of_eval import of_eval
from mobe_gguf.evaluate.page.render import check, render, write

__all__ = ["check", "of_eval", "render", "write"]
