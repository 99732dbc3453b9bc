"""bench/methods.py: the even row has the number of bases that keeps the same share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.factorize.plan import Options, plan_checkpoint, settle
from mobe_gguf.models.checkpoint import Checkpoint

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("target, bases", [(0.5, 3), (0.626, 6), (0.87, 12)])
def test_even_bases(target, bases, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import methods

    model = resources.path("models") / "tiny-moe"
    assert methods.even_bases(model, target) == bases
    checkpoint = Checkpoint(model)
    plan = plan_checkpoint(checkpoint, settle(Options(bases=bases), checkpoint))
    assert plan.projected_after / plan.projected_before == pytest.approx(target, abs=0.01)
    with pytest.raises(MobeError, match="no number of bases of rank 96 keeps that share"):
        methods.even_bases(model, 0.3)
