"""Arithmetic before the work: the published ratios, defaults, layer lists."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.layers import format_layers, parse_layers
from mobe_gguf.core.records import record
from mobe_gguf.factorize.plan import (
    check_saving,
    default_bases,
    make_plan,
    parameters,
    plan_checkpoint,
    settle,
    wide_size,
)
from mobe_gguf.factorize.solver import Settings
from mobe_gguf.factorize.spec import JobSettings, Options, resume_settings
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.families import family_of

#: The configs of the published models, as far as a plan needs them, and their parameters (model cards).
PUBLISHED = {
    "Qwen3-235B-A22B": (
        dict(
            model_type="qwen3_moe",
            num_hidden_layers=94,
            num_experts=128,
            hidden_size=4096,
            moe_intermediate_size=1536,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
        235.1e9,
        dict(n_basis=32),
        0.24,
    ),
    "DeepSeek-V3": (
        dict(
            model_type="deepseek_v3",
            num_hidden_layers=61,
            n_routed_experts=256,
            hidden_size=7168,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            moe_layer_freq=1,
        ),
        671.0e9,
        dict(n_basis=64),
        0.30,
    ),
    "Kimi-K2": (
        dict(
            model_type="kimi_k2",
            num_hidden_layers=61,
            n_routed_experts=384,
            hidden_size=7168,
            moe_intermediate_size=2048,
            first_k_dense_replace=1,
            moe_layer_freq=1,
        ),
        1026.5e9,
        dict(n_basis=128, n_group=2),
        0.25,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_reductions(name):
    """Table 1 of arXiv 2508.05257."""
    config, total, settings, expected = PUBLISHED[name]
    family = family_of(config)
    p, layers = family.n_ff_exp(config), len(family.moe_layers(config))
    plan = make_plan(
        Settings(rank=p, **settings),
        n=family.n_expert(config),
        p=p,
        d=family.n_embd(config),
        units=2 * layers,
        moe_layers=layers,
        model_parameters=int(total),
    )
    assert round(plan.model_shed_share, 2) == expected


def test_a_plan_counts_what_a_checkpoint_holds(model):
    path = model("deepseek_v3")
    checkpoint = Checkpoint(path)
    settings = settle(Options(bases=4, groups=2, layers=(2,)), checkpoint)
    plan = plan_checkpoint(checkpoint, settings)
    assert plan.projected_before == 2 * 8 * 48 * 64
    assert plan.projected_after == 2 * (8 * 48 * 48 + 4 * 48 * 64 + 8 * 2)
    assert plan.experts_before == 2 * 3 * 8 * 48 * 64
    assert plan.model_before * 4 == pytest.approx((path / "model.safetensors").stat().st_size, rel=0.02)
    assert plan.output_bytes == 4 * plan.model_after


@pytest.mark.parametrize(
    "n, g, expected", [(128, 1, 32), (256, 1, 64), (60, 1, 15), (8, 1, 2), (2, 1, 1), (384, 2, 96)]
)
def test_default_bases(n, g, expected):
    assert default_bases(n, g) == expected


def test_defaults(model):
    settings = settle(Options(), Checkpoint(model("qwen3_moe")))
    assert (settings.bases, settings.rank, settings.groups) == (2, 48, 1)
    assert settings.layers == (0, 1, 2) and settings.projections == ("gate", "up")
    assert record(JobSettings, json.loads(json.dumps(settings.to_json()))) == settings
    assert len(settings.units()) == 6


def test_rank_is_less_than_d_where_experts_are_wide(model):
    assert settle(Options(), Checkpoint(model("olmoe", intermediate_size=80))).rank == 32


def test_layers_must_have_experts(model):
    with pytest.raises(UsageError, match="layer 0 has no routed experts.*are 1-2"):
        settle(Options(layers=(0, 1)), Checkpoint(model("deepseek_v2")))


@given(st.sets(st.integers(0, 99), min_size=1))
def test_layer_lists_round_trip(layers):
    layers = tuple(sorted(layers))
    assert parse_layers(format_layers(layers)) == layers


@pytest.mark.parametrize(
    "text", ["", "a", "3-1", "1-", "-1", "1--2", "0-3;7", "1,,2", "0-9999999999", "9" * 5000]
)
def test_bad_layer_lists(text):
    with pytest.raises(UsageError, match="0-3,7"):
        parse_layers(text)


def test_resume_takes_what_is_not_said_and_refuses_what_changed(model):
    old = settle(Options(bases=4, steps=7), Checkpoint(model("qwen3_moe")))
    assert resume_settings(old, Options()) == old
    assert resume_settings(old, Options(bases=4, layers=(0, 1, 2))) == old
    for options, message in (
        (Options(bases=2), "--bases is 2 now, but .* started with 4"),
        (Options(steps=500), "--steps is 500 now, but .* started with 7"),
        (Options(layers=(1,)), "--layers is 1 now, but .* started with 0-2"),
        (Options(imatrix="abc"), "--imatrix is abc now, but .* started with none"),
    ):
        with pytest.raises(MobeError, match=message):
            resume_settings(old, options)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((128, 768, 2048), (2, 1280)),  # Qwen3-30B
        ((128, 1536, 4096), (4, 2304)),  # Qwen3-235B
        ((256, 2048, 7168), (4, 3584)),  # DeepSeek-V3
        ((24, 96, 256), (2, 128)),  # the shipped model
    ],
)
def test_wide_sizes(shape, size):
    """In whole blocks, about as many parameters as the paper's sizes."""
    n, p, d = shape
    found = wide_size(n, p, d)
    assert (found.bases, found.rank) == size
    kept = parameters(Settings(*size), n, p, d) / (n * p * d)
    assert kept == pytest.approx(p / d + 0.25, rel=0.05)


@pytest.mark.parametrize("shape", [(32, 2880, 2880), (8, 14336, 4096), (8, 48, 64), (2, 3, 5), (1, 1, 1)])
def test_wide_sizes_save_where_the_papers_do_not(shape):
    n, p, d = shape
    found = wide_size(n, p, d)
    assert 1 <= found.rank <= d and found.bases <= n
    if d > 5:
        assert parameters(Settings(found.bases, found.rank), n, p, d) < 0.8 * n * p * d


def test_factors_larger_than_the_experts_are_refused(model):
    """Experts as wide as the model; the sizes that the message names are taken."""
    checkpoint = Checkpoint(model("qwen3_moe", moe_intermediate_size=64))
    with pytest.raises(
        UsageError, match=r"125% of the parameters of the 8 experts of 64 x 64.*--bases"
    ) as refused:
        check_saving(settle(Options(), checkpoint), checkpoint)  # the paper's sizes
    said = str(refused.value).split()
    bases, rank = (int(said[said.index(name) + 1].rstrip(",")) for name in ("--bases", "--rank"))
    for options in (Options(bases=bases, rank=rank), Options(wide=True), Options(target=0.6)):
        found = settle(options, checkpoint)
        check_saving(found, checkpoint)
        assert options.target or plan_checkpoint(checkpoint, found).shed > 0


def test_wide_is_for_who_says_nothing_of_the_form(model):
    checkpoint = Checkpoint(model("qwen3_moe"))
    found = settle(Options(wide=True, steps=3), checkpoint)
    assert (found.bases, found.rank, found.activation) == (3, 32, "none")
    for said in ({"bases": 2}, {"rank": 40}, {"activation": "tanh"}, {"mix": "row"}, {"groups": 2}):
        assert settle(Options(wide=True, **said), checkpoint) == settle(Options(**said), checkpoint)
    assert settle(Options(), checkpoint).activation == "tanh"
