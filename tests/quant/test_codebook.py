"""Whole rows in codebook types: what is stored is what was meant, and the error in the metric falls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mobe_gguf.core.errors import MobeError
from mobe_gguf.quant.rounding import codebook
from mobe_gguf.quant.rounding import codebook_native as native
from mobe_gguf.quant.rounding.codebook_blocks import CODEBOOKS
from mobe_gguf.quant.rounding.rounder import Rounder
from mobe_gguf.runtime import ggml


def stack(n: int = 256, experts: int = 2, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and second moments of inputs that lie mostly in half of the directions."""
    generator = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(experts, rows, n, generator=generator)
    a = torch.randn(experts, n, n // 2, generator=generator)
    s = a @ a.mT / n + 0.05 * torch.eye(n)
    return w, s / s.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]


def relative(w: torch.Tensor, s: torch.Tensor, data: np.ndarray, name: str) -> float:
    q = torch.from_numpy(ggml.dequantize(data, name, w.shape[-1]))
    r = w - q
    return float(((r @ s) * r).sum() / ((w @ s) * w).sum())


def stock(w: torch.Tensor, s: torch.Tensor, name: str) -> np.ndarray:
    return np.stack(
        [ggml.quantize(x.numpy(), name, y.diagonal().numpy().copy()) for x, y in zip(w, s, strict=True)]
    )


@pytest.mark.parametrize("name", CODEBOOKS)
def test_less_error_than_the_librarys_and_as_stated(name):
    w, s = stack()
    done = codebook.round_matrices(w, s, name, sweeps=2)
    errors = list(done.errors.values())
    assert errors[0] == pytest.approx(relative(w, s, stock(w, s, name), name), rel=1e-3)
    assert errors[-1] == pytest.approx(relative(w, s, done.data, name), rel=1e-3)
    assert errors == sorted(errors, reverse=True) or done.errors["size kept"] < 1.2 * errors[-2]
    assert errors[-1] < 0.8 * errors[0]
    q = torch.from_numpy(ggml.dequantize(done.data, name, 256))
    sizes = ((q @ s) * q).sum(-1) / ((w @ s) * w).sum(-1)
    assert torch.allclose(sizes, torch.ones_like(sizes), atol=5e-3)


def test_rows_of_several_blocks():
    w, s = stack(n=512, experts=1, rows=8)
    w[:, :, 256:] *= 3
    done = codebook.round_matrices(w, s, "iq2_xs", sweeps=3, keep_size=False)
    errors = list(done.errors.values())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(relative(w, s, done.data, "iq2_xs"), rel=1e-3)
    assert errors[-1] < 0.7 * errors[0]


def test_the_descents_residual_stays_true():
    """A second sweep from the same codes, with the residual computed anew, finds no less than one that goes on would."""
    w, s = stack(n=512, experts=1, rows=4)
    state = codebook.State.of("iq2_s", stock(w, s, "iq2_s")[0], 1, 512, "cpu")
    sw, cost = w @ s, []
    for _ in range(3):
        q = state.values()
        cost.append(float((((w - q) @ s) * (w - q)).sum()))
        codebook.descend(s, sw, state, reach=1)
    assert cost == sorted(cost, reverse=True)


def test_rows_of_zeros_stay():
    w, s = stack(rows=3)
    w[0, 1] = 0
    done = codebook.round_matrices(w, s, "iq2_xs", sweeps=1)
    assert not ggml.dequantize(done.data, "iq2_xs", 256)[0, 1].any()


def test_values_that_are_not_finite():
    w, s = stack(rows=3)
    w[1, 2, 3] = float("nan")
    with pytest.raises(MobeError, match="blk.0.ffn_up_exps.weight: value nan at row 2, column 3"):
        codebook.round_matrices(w, s, "iq2_xs", name="blk.0.ffn_up_exps.weight")


@pytest.mark.parametrize("name", ["iq1_s", "iq1_m", "iq2_xs", "iq2_s", "iq3_xxs"])
def test_the_compiled_search_and_torchs_agree(name, monkeypatch):
    if not native.available(torch.zeros(1)):
        pytest.skip("there is no C compiler")
    w, s = stack(rows=6)
    done = codebook.round_matrices(w, s, name, sweeps=1)
    monkeypatch.setattr(native, "available", lambda like: False)
    expected = codebook.round_matrices(w, s, name, sweeps=1)
    # sums are taken in another order, so a tie may go the other way and pull what follows
    assert (done.data == expected.data).mean() > 0.95
    assert list(done.errors.values()) == pytest.approx(list(expected.errors.values()), rel=0.01)


def test_rows_do_not_depend_on_each_other():
    w, s = stack(rows=6)
    whole = codebook.round_matrices(w, s, "iq2_xs", sweeps=1).data
    part = codebook.round_matrices(w[:, 2:4], s, "iq2_xs", sweeps=1).data
    assert (whole[:, 2:4] == part).mean() > 0.95


@pytest.mark.parametrize("name", ["iq1_s", "iq3_s"])
def test_what_export_calls(name):
    w, s = stack(experts=1)
    data, outcome = Rounder(s[0]).encode(w[0], name)
    assert data.shape == (w.shape[1], ggml.type_info(name).row_bytes(256))
    assert outcome.after < 0.8 * outcome.before < 0.8 * outcome.size
    damped = s + outcome.damping * torch.eye(256)
    assert outcome.after / outcome.size == pytest.approx(relative(w, damped, data[None], name), rel=1e-2)
