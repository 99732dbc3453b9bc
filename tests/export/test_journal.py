"""An export that rounds by moments resumes inside a file: what was rounded stays, and the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.export import Recipe, Report, export, rounding_time
from mobe_gguf.export.journal import JOURNAL
from mobe_gguf.export.rounding import MomentsEncoder

Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def source(model: Maker) -> Path:
    return model("qwen3_moe", moe_intermediate_size=64)


@pytest.fixture(scope="module")
def moments(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moments") / "m.safetensors"
    collect(source, resources.path("models") / "calibration.txt", out, chunks=12, quiet=True)
    return out


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are rounded; at the name in ``stop`` the run ends."""
    names: list[str] = []
    real = MomentsEncoder.open

    def open_one(self: MomentsEncoder) -> object:
        names.append(self.name)
        if len(names) == limit[0]:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(MomentsEncoder, "open", open_one)
    return names


#: At this tensor the run ends; 0 for none.
limit = [0]


def made(source: Path, moments: Path, out: Path, stop: int = 0) -> Report:
    limit[0] = stop
    return export(source, out, Recipe("q4_0", moments=str(moments)), dense=True, quiet=True)


def test_rounded_tensors_stay(source: Path, moments: Path, tmp_path: Path, opened: list[str]) -> None:
    whole = made(source, moments, tmp_path / "whole.gguf")
    every = list(opened)
    assert len(every) > 5 and not (tmp_path / ".whole.gguf.parts").exists()
    out, parts = tmp_path / "out.gguf", tmp_path / ".out.gguf.parts"
    seen: list[str] = []
    for stop in (1, 3, 3):  # the first tensor of all; then two more each time
        opened.clear()
        with pytest.raises(KeyboardInterrupt):
            made(source, moments, out, stop)
        seen += opened[:-1]
        assert not out.exists() and parts.exists() == bool(seen)
    opened.clear()
    report = made(source, moments, out)
    assert [*seen, *opened] == every and len(seen) == 4
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not parts.exists() and not (tmp_path / ".out.gguf.lock").exists()
    assert report.rounded == whole.rounded and report.notes == whole.notes


def test_what_is_damaged_or_of_another_run_is_rounded_again(
    source: Path, moments: Path, tmp_path: Path, opened: list[str]
) -> None:
    out, parts = tmp_path / "out.gguf", tmp_path / ".out.gguf.parts"
    with pytest.raises(KeyboardInterrupt):
        made(source, moments, out, 4)
    part = parts / "out.gguf.part"
    part.write_bytes(part.read_bytes()[:-100] + bytes(100))  # the third tensor's end
    third = opened[2]
    opened.clear()
    made(source, moments, out)
    assert third in opened and "" not in opened
    first = out.read_bytes()
    opened.clear()
    with pytest.raises(KeyboardInterrupt):
        made(source, moments, out, 4)
    (parts / JOURNAL).write_text("{")
    opened.clear()
    made(source, moments, out)
    assert out.read_bytes() == first and len(opened) > 5
    with pytest.raises(KeyboardInterrupt):
        made(source, moments, out, 4 + len(opened))
    opened.clear()
    limit[0] = 0
    export(source, out, Recipe("q5_0", moments=str(moments)), dense=True, quiet=True)  # other types
    assert len(opened) > 5 and not parts.exists()


def test_a_full_disk_leaves_what_is_rounded(
    source: Path, moments: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"

    def full(self: MomentsEncoder) -> object:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MomentsEncoder, "open", full)
        with pytest.raises(MobeError, match="the disk is full"):
            made(source, moments, out)
    assert not out.exists()
    made(source, moments, out)
    assert out.exists() and not (tmp_path / ".out.gguf.parts").exists()


def test_a_dry_run_says_how_long_rounding_takes(
    source: Path, moments: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured once for each type and row length, and grows with the rows."""
    limit[0] = 0
    monkeypatch.setattr("mobe_gguf.export.rounding_time.cache_dir", lambda: tmp_path / "cache")
    tried: list[str] = []
    real = rounding_time._trial
    monkeypatch.setattr(
        rounding_time, "_trial", lambda tensor, by: (tried.append(tensor.type), real(tensor, by))[1]
    )
    recipe = Recipe("q4_0", moments=str(moments))
    first = export(source, tmp_path / "o.gguf", recipe, dense=True, quiet=True, dry_run=True)
    assert first.rounding_seconds is not None and first.rounding_seconds > 0 and tried
    count = len(tried)
    again = export(source, tmp_path / "o.gguf", recipe, dense=True, quiet=True, dry_run=True)
    assert len(tried) == count and again.rounding_seconds == pytest.approx(first.rounding_seconds)
    assert not opened and not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
    plain = export(source, tmp_path / "o.gguf", Recipe("q4_0"), dense=True, quiet=True, dry_run=True)
    assert plain.rounding_seconds is None
