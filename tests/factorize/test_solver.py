"""Fits: what they reach, what they promise, how they fail."""

from __future__ import annotations

import pytest
import torch
from formula import combine_groups

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.formula import activate
from mobe_gguf.core.metric import Metric
from mobe_gguf.core.projected import SingularError
from mobe_gguf.factorize import solver
from mobe_gguf.factorize.scale import USUAL, balance
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.quant.small import LEAST


def shared_structure(n=12, p=24, d=40, m=3, r=24, activation="tanh", noise=0.1, seed=0):
    """Experts ``[n, p, d]`` made of m bases, the mixing leaning on one of them as real experts do, and some noise."""
    g = torch.Generator().manual_seed(seed)
    mix = 0.4 * torch.randn(n, m, generator=g)
    for i in range(n):
        mix[i, i * m // n] += 1
    basis = torch.randn(m, r, d, generator=g)
    w = torch.randn(n, p, r, generator=g) @ activate(combine_groups(mix, basis, 1), activation)
    return 0.02 * (w / w.std() + noise * torch.randn(n, p, d, generator=g))


def reconstruct(f, settings):
    return f.transform.float() @ activate(
        combine_groups(f.mix, f.basis.float(), settings.n_group), settings.activation
    )


def svd_error(w, kept):
    """Relative error of a truncated SVD of every expert at ``kept`` parameters in all."""
    n, p, d = w.shape
    rank = int(kept / n / (p + d))
    values = torch.linalg.svdvals(w)
    return float(values[:, rank:].square().sum() / values.square().sum())


@pytest.mark.parametrize("activation", ["none", "silu", "tanh"])
@pytest.mark.parametrize("mix", ["scalar", "row"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reported_error_is_that_of_the_stored_factors(activation, mix, groups, dtype):
    w = shared_structure()
    settings = Settings(4, 16, groups, activation, mix, steps=5, dtype=dtype)
    f = fit(w, settings)
    per_group = (12, 2) if mix == "scalar" else (12, 2, 16)
    assert f.mix.shape == (per_group if groups == 2 else (12, 4, *per_group[2:]))
    assert f.basis.shape == (4, 16, 40) and f.transform.shape == (12, 24, 16)
    assert f.basis.dtype == f.transform.dtype == dtype and f.mix.dtype == torch.float32
    error = (w - reconstruct(f, settings)).square().sum() / w.square().sum()
    assert f.error == pytest.approx(float(error), rel=1e-4)
    assert f.objective == pytest.approx(f.error, rel=1e-6)


@pytest.mark.parametrize("activation", ["none", "tanh"])
def test_experts_of_one_row_space_are_found_exactly(activation):
    """m = 1, f = none: W_i = A_i B has a closed form, which the start already is."""
    w = shared_structure(m=1, r=8, activation="none", noise=0.0)
    f = fit(w, Settings(1, 8, activation=activation, steps=150))
    assert f.error < (1e-9 if activation == "none" else 2e-3)


def test_as_many_bases_as_experts_lose_nothing():
    f = fit(shared_structure(), Settings(12, 24, activation="none", steps=100))
    assert f.error < 1e-5


def test_exact_structure_is_nearly_recovered():
    """The problem is not convex, so not to the last digit."""
    w = shared_structure(n=24, noise=0.0)
    assert fit(w, Settings(3, 24, steps=300)).error < 0.01


def test_better_than_svd_and_better_with_steps():
    w = shared_structure(n=24)
    errors = [fit(w, Settings(3, 24, steps=steps)).error for steps in (1, 40, 200)]
    kept = 24 * 24 * 24 + 3 * 24 * 40 + 24 * 3
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.25 * svd_error(w, kept)


def test_same_seed_same_factors():
    w, settings = shared_structure(), Settings(3, 16, steps=20, seed=5)
    a, b, c = (fit(w, s) for s in (settings, settings, Settings(3, 16, steps=20, seed=6)))
    assert (
        torch.equal(a.basis, b.basis) and torch.equal(a.mix, b.mix) and torch.equal(a.transform, b.transform)
    )
    assert not torch.equal(a.basis, c.basis)


def test_blocks_of_experts_give_the_same_fit():
    w = shared_structure()
    whole, blocks = (fit(w, Settings(3, 16, steps=15), block=b) for b in (12, 5))
    assert whole.error == pytest.approx(blocks.error, rel=1e-4)
    assert torch.allclose(whole.basis, blocks.basis, atol=1e-2)


def test_a_layer_that_does_not_fit_the_device_is_sent_over_in_blocks(monkeypatch):
    """By the memory that CUDA says is free; W stays where it is then, and a block is at least an expert."""
    w, settings = torch.randn(96, 24, 40), Settings(3, 16)
    parameters, expert = 6 * 4 * 3 * 16 * 40, 4 * (6 * 16 * 40 + 3 * 24 * 16 + 4 * 16 * 16)
    blocks = {}
    for share in (0.0, 3.0, 7.0):
        free = parameters + int(share * (expert + 4 * 24 * 40) / 0.6) + 10
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        problem = solver._place(w, settings, Metric(), torch.device("cuda:1"), None)
        assert problem.w is w
        blocks[share] = problem.block
    assert blocks == {0.0: 1, 3.0: 3, 7.0: 7}
    moved = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: moved.append(device) or x)
    assert solver._place(w, settings, Metric(), torch.device("cuda:1"), None).block == 96
    assert moved == [torch.device("cuda:1")]


def test_groups_are_independent():
    w = shared_structure()
    both = fit(w, Settings(4, 16, n_group=2, steps=10))
    w2 = w.clone()
    w2[6:] = w2[6:].flip(0)  # same standard deviation
    other = fit(w2, Settings(4, 16, n_group=2, steps=10))
    assert torch.allclose(both.basis[:2], other.basis[:2], atol=1e-4)
    assert not torch.allclose(both.basis[2:], other.basis[2:], atol=1e-2)


def test_w_is_kept_unless_it_may_be_overwritten():
    w = shared_structure()
    before = w.clone()
    first = fit(w, Settings(3, 8, steps=2))
    assert torch.equal(w, before)
    second = fit(w, Settings(3, 8, steps=2), overwrite_w=True)
    assert torch.equal(first.transform, second.transform)
    assert float(w.std()) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["diagonal", "expert", "full"])
def test_the_weighted_fit_is_better_where_it_counts(kind):
    w = shared_structure(noise=0.5)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(500, 40, generator=g) * torch.logspace(0, -2, 40)
    if kind == "full":  # as uneven, but no channel by itself shows it
        x = x @ torch.linalg.qr(torch.randn(40, 40, generator=g))[0]
    moment = x.T @ x / 500
    weight = {"diagonal": moment.diagonal(), "expert": moment.diagonal().repeat(12, 1, 1), "full": moment}[
        kind
    ]
    settings = Settings(3, 16, steps=60)
    plain, weighted = fit(w, settings), fit(w, settings, weight=weight)

    def output_error(f):
        return float(((w - reconstruct(f, settings)) @ x.T).square().sum())

    assert output_error(weighted) < 0.5 * output_error(plain)
    assert weighted.error > plain.error
    assert weighted.objective < plain.error


def test_progress_and_plateau():
    seen = []
    f = fit(
        shared_structure(m=1, r=8, activation="none", noise=0.3),
        Settings(1, 8, activation="none", steps=2000),
        on_step=lambda share, error: seen.append((share, error)),
    )
    shares, errors = zip(*seen, strict=True)
    assert list(shares) == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert list(errors) == sorted(errors, reverse=True) and errors[-1] == pytest.approx(f.error, rel=1e-3)
    assert f.steps < 1000, "a fit that started at its optimum must not use all its steps"


def test_divergence_is_retried_with_a_smaller_step_then_reported(monkeypatch):
    rates = []

    def diverge(problem, basis, mix, settings, report):
        rates.append(settings.rate)
        raise SingularError("the loss is not finite")

    monkeypatch.setattr(solver, "_descend", diverge)
    with pytest.raises(MobeError, match="layer 3 up: the fit diverged 3 times.*--seed"):
        fit(shared_structure(), Settings(3, 8), label="layer 3 up")
    assert rates == pytest.approx([0.3, 0.075, 0.01875])


@pytest.mark.parametrize(
    "settings, message",
    [
        (Settings(5, 8, n_group=2), "--bases 5 does not divide by --groups 2.*--bases 4 or --bases 6"),
        (Settings(5, 8, n_group=5), "12 experts cannot be split in 5"),
        (Settings(3, 41), "--rank 41 is more than the hidden size 40; expected 1 to 40"),
        (Settings(13, 8), "--bases 13 is more than the 12 experts"),
        (Settings(0, 8), "at least 1"),
        (Settings(3, 8, steps=0), "at least 1"),
        (Settings(3, 8, activation="relu"), "'relu' is unknown; known: none, silu, tanh"),
        (Settings(4, 8, n_group=2, mix_terms=3), "--mix-terms 3: an expert has 2 bases.*1 to 2"),
        (Settings(4, 8, mix_terms=0), "--mix-terms 0"),
        (Settings(3, 8, mix="column"), "'column' is unknown; known: scalar, row"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(UsageError, match=message):
        fit(shared_structure(), settings)


def test_equal_weights_are_refused():
    with pytest.raises(MobeError, match="experts: all weights are the same"):
        fit(torch.zeros(4, 6, 8), Settings(2, 4))


@pytest.mark.parametrize("mix", ["scalar", "row"])
@pytest.mark.parametrize("groups", [1, 2])
def test_few_terms_are_exact_zeros_and_chosen_well(mix, groups):
    """Experts made of two bases each, out of four: two terms lose little, and more than one is lost with one."""
    w = shared_structure(n=24, m=4, noise=0.05)
    full, two, one = (fit(w, Settings(4, 24, groups, mix=mix, steps=80, mix_terms=s)) for s in (None, 2, 1))
    for f, terms in ((full, 4 // groups), (two, 2), (one, 1)):
        used = (f.mix != 0) if mix == "scalar" else (f.mix != 0).any(-1)
        assert (used.sum(1) == terms).all()
    assert full.error <= two.error * 1.02 < one.error * 1.02
    settings = Settings(4, 24, groups, mix=mix)
    error = (w - reconstruct(one, settings)).square().sum() / w.square().sum()
    assert one.error == pytest.approx(float(error), rel=1e-4)


def test_the_terms_kept_are_those_of_the_largest_products():
    basis = torch.tensor([1.0, 10.0, 0.1])[:, None, None].expand(3, 2, 5)
    mix = torch.tensor([[1.0, -0.5, 3.0], [6.0, 0.5, 3.0]])
    assert solver._strongest(mix, basis, 1).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert solver._strongest(mix, basis, 2).tolist() == [[1, 1, 0], [1, 1, 0]]
    by_rows = torch.stack([mix, torch.tensor([[0.0, 0.0, 200.0], [0.0, 0.0, 0.0]])], -1)
    assert solver._strongest(by_rows, basis, 1)[..., 0].tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("mix", ["scalar", "row"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_linear_form_keeps_its_size_out_of_what_is_rounded(mix, transposed):
    """However small the experts are: their A has the size of ordinary weights, far above where scales become coarse."""
    w = shared_structure(activation="none") * 2.0**-10
    w[5] *= 2.0**-6
    w[7] = 0
    f = fit(w, Settings(3, 32, activation="none", mix=mix, steps=5, transposed=transposed))
    sizes = f.transform.square().mean((1, 2)).sqrt()
    usual = torch.arange(12) != 7
    assert (sizes[usual] > USUAL / 1.5).all() and (sizes[usual] < USUAL * 1.5).all()
    assert min(USUAL, f.basis.square().mean().sqrt()) > 8 * max(
        least for name, least in LEAST.items() if name != "nvfp4"
    )
    assert f.transform.isfinite().all() and f.mix.isfinite().all() and not f.transform[7].any()


def test_balance_changes_no_product():
    g = torch.Generator().manual_seed(3)
    a, alpha, basis = (torch.randn(*s, generator=g) for s in ((4, 6, 8), (4, 2), (2, 8, 10)))
    before = (a * 1e-3).bmm(combine_groups(alpha, basis, 1))
    new = a * 1e-3
    changed = balance(new, alpha)
    assert torch.equal(before, new.bmm(combine_groups(changed, basis, 1))) and not torch.equal(changed, alpha)
