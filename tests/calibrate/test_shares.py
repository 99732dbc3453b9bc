"""A text shared out over processes or a cluster gives the moments of one run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mobe_gguf.calibrate import moments as module
from mobe_gguf.calibrate import roots, shares
from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.moments import Moments

CTX, CHUNKS = 32, 7


def gathered(path: Path, text: Path, out: Path, **options) -> Moments:
    collect(path, [text], out, **{"ctx": CTX, "chunks": CHUNKS, "quiet": True} | options)
    return Moments(out)


def values(moments: Moments, name: str) -> torch.Tensor:
    found = moments.find(name)
    s = (found.root @ found.root.mT).double()
    if found.rest is not None:
        s += torch.diag_embed(found.rest.double())
    return s * moments.scale(name)


def assert_same(got: Moments, expected: Moments, tolerance: float = 1e-3) -> None:
    assert got.names == expected.names and len(got.names) > 10
    for name in got.names:
        mine, one = values(got, name), values(expected, name)
        assert float((mine - one).norm() / one.norm()) < tolerance, name
        assert torch.equal(got.tokens(name), expected.tokens(name))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_two_processes(family, model, text, tmp_path):
    """Dense matrices, shared experts and heads, too; the coverage of experts is that of all shares."""
    path = model(family)
    ours = gathered(path, text, tmp_path / "ours", device="cpu,cpu", keep=1)
    one = gathered(path, text, tmp_path / "one", keep=1)
    assert_same(ours, one)
    assert ours.about["coverage"] == one.about["coverage"] and ours.about["shares"] == 2
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".work"] == []


def test_gradients_are_in_the_order_of_the_text(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NEEDED", 0)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    monkeypatch.setattr(shares, "shares_for", lambda place: 3)
    monkeypatch.setattr(module, "shares_for", lambda place: 3)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    path = model("qwen3_moe")
    collect(
        path, [text, other], tmp_path / "ours", ctx=CTX, chunks=CHUNKS, gradients=True, keep=1, quiet=True
    )
    monkeypatch.setattr(module, "shares_for", lambda place: 1)
    collect(path, [text, other], tmp_path / "one", ctx=CTX, chunks=CHUNKS, gradients=True, keep=1, quiet=True)
    got, one = Moments(tmp_path / "ours"), Moments(tmp_path / "one")
    for layer in (0, 1):
        mine, theirs = got.gradients(layer), one.gradients(layer)
        assert torch.equal(mine["index"], theirs["index"])
        ratio = mine["down"].float() / theirs["down"].float()
        assert float(ratio.std() / ratio.mean()) < 0.2  # each share has a mean of its own


@pytest.mark.parametrize("most", [16, 1024])
def test_few_directions(most, model, text, tmp_path, monkeypatch):
    """The strongest ones of all shares, and the right diagonal."""
    monkeypatch.setattr(module, "shares_for", lambda place: 2)
    for room in (roots, shares):
        monkeypatch.setattr(room, "MOST", most)
    path = model("qwen3_moe")
    ours = gathered(path, text, tmp_path / "ours", rank=16)
    whole = gathered(path, text, tmp_path / "whole", keep=1) if most > 16 else None
    name = "blk.1.ffn_up_exps.weight"
    assert ours.shape(name)[2] == 16
    if whole is not None:
        mine, s = values(ours, name), values(whole, name)
        diagonals = mine.diagonal(dim1=1, dim2=2), s.diagonal(dim1=1, dim2=2)
        assert torch.allclose(*diagonals, rtol=0.02, atol=float(diagonals[1].mean()) * 0.01)
        best = torch.linalg.eigvalsh(s)[:, -16:].sum(1)
        found = ours.find(name).root.double().square().sum((1, 2)) * ours.scale(name)
        assert torch.all(found < best * 1.02) and torch.all(found > best * 0.9)


def stops(job, i, device, on_step):
    if i == 1:
        raise MobeError("stopped")
    return shares.run_share(job, i, device, on_step)


def test_a_share_that_fails_is_run_again(model, text, tmp_path, monkeypatch):
    """Another run goes on with the shares of the first, on whatever devices; finished ones are not run again."""
    path, out = model("olmoe"), tmp_path / "m"
    run, ran = shares.run_share, []
    with monkeypatch.context() as m:
        m.setattr(module, "shares_for", lambda place: 2)
        m.setattr(
            shares,
            "run_share",
            lambda job, i, *a: stops(job, i, *a) if i else (ran.append(i), run(job, i, *a))[1],
        )
        with pytest.raises(MobeError, match="stopped"):
            gathered(path, text, out)
    monkeypatch.setattr(shares, "run_share", lambda job, i, *a: (ran.append(i), run(job, i, *a))[1])
    ours = gathered(path, text, out, resume=True)
    assert ran in ([0, 1], [1]) and ours.about["shares"] == 2
    assert_same(ours, gathered(path, text, tmp_path / "one"), 0.05)


def test_on_a_cluster(model, text, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mobe-gguf[ray]'")
    path = model("qwen3_moe")
    monkeypatch.setattr(module, "shares_for", lambda place: 2)
    ours = gathered(path, text, tmp_path / "ours", ray="local", keep=1)
    assert_same(ours, gathered(path, text, tmp_path / "one", keep=1))
