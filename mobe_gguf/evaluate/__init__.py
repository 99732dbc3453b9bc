"""Compare GGUF files with the model that they were made of: KL divergence and perplexity, by llama-perplexity.

    rows = evaluate.compare("original-bf16.gguf", ["q4.gguf", "mobe-q4.gguf"], "text.txt", Settings(chunks=100))
    for row in rows:
        print(row.facts.path, row.facts.n_bytes, row.divergence.kl.value)

``measure`` runs llama-perplexity through ``tool``, and ``parse`` reads its output.  ``vocabulary`` checks that files
can be compared and counts tokens.  ``logits`` describes the file of logits that the reference's run leaves for the
other runs. ``facts`` gives sizes; ``report`` and ``plot`` show the rows.
"""

from __future__ import annotations

from mobe_gguf.evaluate.facts import Facts, facts_of
from mobe_gguf.evaluate.measure import EvalSettings, Row, compare, heldout, perplexity
from mobe_gguf.evaluate.parse import Divergence, Estimate

__all__ = [
    "Divergence",
    "Estimate",
    "Facts",
    "Row",
    "EvalSettings",
    "compare",
    "facts_of",
    "heldout",
    "perplexity",
]
