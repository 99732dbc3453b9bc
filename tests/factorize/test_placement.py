"""--placement: which sizes suit which machine, by arithmetic on the configs of published models."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from plan.configs import CONFIGS, PARAMETERS

from mobe_gguf.cli import main
from mobe_gguf.core.errors import UsageError
from mobe_gguf.factorize.placement import choose, fastest, hardware, place, sizes
from mobe_gguf.factorize.spec import Options
from mobe_gguf.factorize.target import Size
from mobe_gguf.models.families import family_of


def known(name: str) -> Any:
    """What of a model the arithmetic needs."""
    config = CONFIGS[name]
    family = family_of(config)
    return SimpleNamespace(
        n_expert=family.n_expert(config),
        n_expert_used=config["num_experts_per_tok"],
        n_ff_exp=family.n_ff_exp(config),
        n_embd=family.n_embd(config),
        moe_layers=tuple(family.moe_layers(config)),
        n_params=int(PARAMETERS[name] * 1e9),
        config={},
    )


def test_little_vram_gets_few_wide_bases_and_much_gets_many_narrow_ones():
    """DeepSeek-V3, experts in system memory."""
    model = known("deepseek-v3")
    units = 2 * len(model.moe_layers)
    few = fastest(model, hardware("hybrid", "512G", "24G", None, "1000G"), units)
    many = fastest(model, hardware("hybrid", "512G", "96G", None, "3350G"), units)
    assert few.size.bases <= 4 and few.size.rank >= 3584 and few.vram < 24e9
    assert many.size.bases >= 24 and many.size.rank <= 2816 and 24e9 < many.vram < 96e9
    assert many.read_ram < few.read_ram and many.read_vram > few.read_vram


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3", "kimi-k2"])
@pytest.mark.parametrize("placement", ["cpu", "gpu"])
def test_few_wide_bases_where_they_are_read_beside_a(name, placement):
    model = known(name)
    found = fastest(model, hardware(placement, "2000G", "2000G", None, None), 2 * len(model.moe_layers))
    assert found.size.bases <= 4 and found.size.rank > model.n_ff_exp


def test_the_bytes_are_those_of_the_shapes():
    """Qwen3-30B, m 2 r 1280 in q4_k (4.5 bits), by hand."""
    model = known("qwen3-30b-a3b")
    found = place(model, Size(2, 1280), ("q4_k", "q4_k"), 96, hardware("hybrid", "64G", "24G", "60G", "600G"))
    per = 4.5 / 8
    basis, a, down = 96 * 2 * 1280 * 2048 * per, 96 * 128 * 768 * 1280 * per, 48 * 128 * 768 * 2048 * per
    other = (model.n_params - 3 * 48 * 128 * 768 * 2048) * per
    assert found.vram == pytest.approx(basis + other + 2e9) and found.ram == pytest.approx(a + down)
    assert found.read_ram == pytest.approx((a + down) * 8 / 128)
    assert found.seconds == pytest.approx((basis + other) / (0.7 * 600e9) + (a + down) / 16 / 60e9)


def test_types_become_smaller_until_the_file_fits():
    model = known("qwen3-30b-a3b")
    types = [
        fastest(model, hardware("cpu", ram, "0", None, None), 96).transform_type
        for ram in ("32G", "15G", "12G")
    ]
    assert types == ["q4_k", "q3_k", "q2_k"]
    with pytest.raises(
        UsageError, match="nothing fits into 0 B of VRAM and 4.00 GB of RAM. The smallest: 2 bases"
    ):
        fastest(model, hardware("cpu", "4G", "0", None, None), 96)


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"gpt-oss-120b"}))
@pytest.mark.parametrize("share", [0.4, 0.62, 0.9])
def test_sizes_keep_the_share(name, share):
    model = known(name)
    n, p, d = model.n_expert, model.n_ff_exp, model.n_embd
    for size in sizes(model, share):
        kept = size.rank / d + size.bases * size.rank / (n * p)
        assert kept == pytest.approx(share, rel=0.051) and kept < 1
        assert size.rank % 256 == 0 and size.rank <= d and 1 < size.bases <= n


def test_wrong_usage():
    model, machine = known("qwen3-30b-a3b"), hardware("cpu", "64G", "0", None, None)
    for asked in (Options(bases=4), Options(activation="tanh"), Options(target=10**9, quant="q4_k")):
        with pytest.raises(UsageError, match="--placement chooses the form"):
            choose(model, machine, asked)
    with pytest.raises(UsageError, match="--vram 24G"):
        hardware("gpu", "64G", "0", None, None)


def test_the_command(model, tmp_path):
    """The plan has the sizes that were chosen, and no target."""
    path, out = model("qwen3_moe", hidden_size=128, moe_intermediate_size=64), tmp_path / "out"
    call = ["factorize", str(path), str(out), "--dry-run", "--json", "--placement", "cpu", "--ram", "8G"]
    done = CliRunner().invoke(main, [*call, "--target", "0.6"])
    assert done.exit_code == 0, done.output
    settings = json.loads(done.stdout[done.stdout.index("{") :])["settings"]
    assert settings["activation"] == "none" and settings["target"] is None and settings["for_basis"]
    assert f"{settings['bases']} bases of rank {settings['rank']}" in done.stderr
    assert CliRunner().invoke(main, [*call, "--bases", "2"]).exit_code == 2
    assert (
        "are for --placement"
        in CliRunner().invoke(main, ["factorize", str(path), str(out), "--vram", "8G"]).output
    )
