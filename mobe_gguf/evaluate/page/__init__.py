"""One HTML page that needs nothing else: pictures as SVG, the same numbers as tables, no script, no network.

``data`` says what a page may show, ``render`` makes HTML of that, ``charts`` its pictures.  ``files`` and ``texts`` gather from GGUF
files what ``sections`` puts on a page; each command adds what only it knows.
"""

from __future__ import annotations

from mobe_gguf.evaluate.page.of_eval import of_eval
from mobe_gguf.evaluate.page.render import check, render, write

__all__ = ["check", "of_eval", "render", "write"]
