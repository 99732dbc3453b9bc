"""Relative durations of a compression's stages, to estimate the time that is left."""

from __future__ import annotations

from mobe_gguf.compress import rivals
from mobe_gguf.compress.wishes import Wishes
from mobe_gguf.plan.layout import Layout

#: Tokens of the text that ships with the program.
TOKENS = 400_000
#: Seconds of a stage per parameter of the model, or per parameter and 1,000 tokens of text.
ROUND, FIT, WRITE, STORE, QUANTIZE = 9e-6, 9e-6, 4.5e-7, 1e-7, 1.5e-7
GATHER, SEQUENCE, PREDICT = 1.7e-7, 4e-7, 8e-8
#: Approximate number of steps after which a fit stops by itself.
STEPS = 170


def seconds(layout: Layout, wishes: Wishes, factors: bool) -> dict[str, float]:
    """Seconds of each stage, in order, on the machine where the constants were measured (2 cores, the shipped
    model)."""
    n, active = layout.parameters, _active(layout)
    there = sum(path.stat().st_size for path in wishes.text) / rivals.TOKEN_BYTES if wishes.text else TOKENS
    tokens = (there if wishes.chunks is None else wishes.chunks * wishes.ctx) / 1000
    scored = (wishes.eval_chunks or 500) * wishes.ctx / 1000
    made = {"moments": GATHER * tokens * active}
    sequence = SEQUENCE * tokens * active * wishes.sequential
    if wishes.form != "mobe":
        made["plain"] = ROUND * n + sequence
    if factors:
        made |= {"fit": FIT * n * min(1.0, (wishes.steps or STEPS) / STEPS), "write": WRITE * n + sequence}
    if not wishes.measure:
        return made
    made["original"] = STORE * n
    names = rivals.around(layout, wishes.size or layout.parameters // 2) if wishes.rivals else []
    if names:
        used = min(tokens, rivals.enough_chunks(layout, wishes.ctx) * wishes.ctx / 1000)
        made["imatrix"] = PREDICT * used * active
        made |= dict.fromkeys(names, QUANTIZE * n)
    files = len(names) + 1 + factors
    made["measure"] = PREDICT * scored * active * (files + 1)
    made["speed"] = 1.0 * (files + 1)
    return made


def _active(layout: Layout) -> float:
    """Parameters that a token uses."""
    shape = layout.expert_shape()
    experts = 3 * shape[0] * shape[1] * shape[2] * len(layout.expert_layers)
    return layout.parameters - experts * (1 - layout.n_expert_used / max(1, layout.n_expert))
