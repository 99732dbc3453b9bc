"""How the machine's speed is measured: any type, where llama.cpp keeps it, without a word on the terminal."""

from __future__ import annotations

import pytest

from mobe_gguf.runtime import speed


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0", "q4_k", "q3_k", "iq2_xxs"])
def test_rates(kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed, "BYTES", 1 << 20)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    assert speed.matrix_rate(kind, 1) > 0
    assert capfd.readouterr() == ("", "")


def test_where_weights_are_repacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of buffer is asked, and the ordinary one takes what the others refuse."""
    monkeypatch.setattr(speed, "BYTES", 1 << 20)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    kinds, placed = speed._extra_buffers(), []
    real = speed._placed

    def remember(ctx: object, kind: object) -> object:
        placed.append(kind)
        return real(ctx, kind)

    monkeypatch.setattr(speed, "_placed", remember)
    speed.matrix_rate("f32", 1)
    assert placed == [*kinds, None], "no buffer repacks f32"


def test_a_node_costs_something() -> None:
    assert 0 < speed.node_seconds(1) < 1e-3
