"""Text to calibrate on, sampled from the model itself, for a model whose kind of text is not at hand.

Zechun Liu et al. sample what they train quantized models on (LLM-QAT, arXiv 2305.17888), Williams et al. what they calibrate by
(arXiv 2410.17170).  ``docs/calibration.md`` has figures.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from mobe_gguf.core.atomic import atomic_path, check_output
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.progress import bar
from mobe_gguf.formats.gguf import read_model
from mobe_gguf.runtime.sample import Sampled, Sampling, sample


def sample_text(model: Path, out: Path, settings: Sampling, quiet: bool = False) -> Sampled:
    """Write what the GGUF file ``model`` writes by itself to ``out``: documents with an empty line between them.

    UsageError if ``settings`` do not fit the model; MobeError if the file cannot be read or the runtime fails to run it.
    """
    check_output(out, [model])
    _check(model, settings)
    began = time.monotonic()
    done, next_line = 0, 0.0
    with atomic_path(out) as part, bar("sample", settings.tokens, quiet) as progress:

        def tell(now: int) -> None:
            nonlocal done, next_line
            now, spent = min(now, settings.tokens), time.monotonic() - began
            rate = f"{now / spent:.0f} tokens/s"
            progress.update(f"sample, {rate}")
            # few lines in a log, at first more of them
            due = not progress.is_live and (spent > next_line or now == settings.tokens)
            progress.advance(now - done, rate if due else None)
            done, next_line = now, 1.5 * spent if due else next_line

        found = sample(model, settings, tell)
        part.write_text("\n\n".join(found.documents) + "\n", encoding="utf-8")
    return found


def _check(model: Path, settings: Sampling) -> None:
    if not 0 < settings.temperature < math.inf:
        raise UsageError(f"--temp {settings.temperature}: expected a number above 0")
    longest = read_model(model).arch_number("context_length")
    if longest and settings.ctx > longest:
        raise UsageError(
            f"--ctx {settings.ctx}: {model} knows texts of at most {longest} tokens; give a smaller one"
        )
