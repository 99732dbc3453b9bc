"""The studies of MoBE's paper on a model at hand: how many bases, which activation, what an error means in KL divergence.

    rows = ablate.run(Path("model/"), Path("study/"), ablate.settle(checkpoint, ablate.Asked(steps=50)))

``study`` measures and keeps what it has, ``plot`` draws, ``report`` prints.
"""

from __future__ import annotations

from mobe_gguf.studies.ablate.study import Asked, Study, Trial, TrialResult, run, settle

__all__ = ["Asked", "TrialResult", "Study", "Trial", "run", "settle"]
