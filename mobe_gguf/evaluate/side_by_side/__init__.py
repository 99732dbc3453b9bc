"""Two GGUF files answer the same prompt on one page: two llama-servers behind one small web server, all on loopback.

``http`` serves the page (``index.html``, ``page.css``, ``page.js``) and forwards requests to the two servers.
``compare`` starts and ends all three together.
"""

from __future__ import annotations

from mobe_gguf.evaluate.side_by_side.compare import Running, running

__all__ = ["Running", "running"]
