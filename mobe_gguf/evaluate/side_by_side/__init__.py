"""Two GGUF files answer the same prompt in one page: two llama-servers behind one small web server, all on loopback.

``http`` serves the page (``index.html``, ``page.css``, ``page.js``) and passes requests on to the two servers; ``compare`` holds all
three together and ends them together.
"""

from __future__ import annotations

from mobe_gguf.evaluate.side_by_side.compare import Running, running

__all__ = ["Running", "running"]
