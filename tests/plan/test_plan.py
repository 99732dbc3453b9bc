"""Sizes, memory and order of what could be written of a model, against what is written and what the runtime takes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError
from mobe_gguf.export import Recipe, export
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.plan import cost, forms, memory, report
from mobe_gguf.plan.layout import Layout, read_layout
from mobe_gguf.plan.machine import PASSES, Machine, this_machine
from mobe_gguf.runtime import speed
from plan.configs import CONFIGS, PARAMETERS

Maker = Callable[..., Path]


def written(directory: Path, name: str) -> Path:
    """A bare config.json of one of the ten models."""
    path = directory / name / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIGS[name]))
    return path


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Layout]:
    """The layout of one of the ten models, by its config.json alone."""
    directory = tmp_path_factory.mktemp("configs")
    made: dict[str, Layout] = {}

    def get(name: str) -> Layout:
        if name not in made:
            made[name] = read_layout(written(directory, name))
        return made[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_known_models_are_those_that_they_publish(
    name: str, known: Callable[[str], Layout]
) -> None:
    assert known(name).parameters / 1e9 == pytest.approx(PARAMETERS[name], abs=6e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_a_config_alone_says_what_the_headers_say(family: str, model: Maker, tmp_path: Path) -> None:
    alone = tmp_path / "config.json"
    shutil.copy(model(family) / "config.json", alone)
    assert dict(read_layout(alone).tensors) == dict(read_layout(model(family)).tensors)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0"])
def test_sizes_are_those_of_the_exported_file_to_the_byte(
    family: str, quant: str, model: Maker, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    export(model(family), out, Recipe(quant), allow_dense=True, quiet=True)
    layout = read_layout(model(family))
    types = {name: info.type for name, info in read_gguf(out).tensors.items()}
    assert forms._size(layout, layout.tensors, types) == out.stat().st_size
    chosen = forms._types(layout, layout.tensors, Recipe(quant))
    assert chosen == types


def test_sizes_of_a_gguf_source(model: Maker, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    export(model("qwen3_moe"), out, Recipe("q8_0"), allow_dense=True, quiet=True)
    layout = read_layout(out)
    types = {name: info.type for name, info in read_gguf(out).tensors.items()}
    assert forms._size(layout, layout.tensors, types) == out.stat().st_size
    assert 8.5 <= layout.native < 16  # rows of down that no block fits are f16


def test_memory_beside_the_weights_is_what_the_runtime_takes(model: Maker, tmp_path: Path) -> None:
    """KV cache by the formula of plain attention; and the runtime, asked about the real file, says the same."""
    layout = read_layout(model("qwen3_moe"))
    beside = memory.beside_weights(layout, 1024)
    heads, size = layout.number("attention.head_count_kv"), layout.number("attention.key_length")
    rounding = 0.01 * 2**20  # the runtime says MiB with two decimals
    assert beside.states == pytest.approx(layout.n_layer * 2 * heads * size * 2 * 1024, abs=rounding)
    export(model("qwen3_moe"), tmp_path / "out.gguf", Recipe("q8_0"), allow_dense=True, quiet=True)
    real = memory.beside_weights(read_layout(tmp_path / "out.gguf"), 1024)
    assert real.states == beside.states
    assert real.compute == pytest.approx(beside.compute, rel=0.05)


def test_latent_attention_and_windows_are_counted_as_they_run(known: Callable[[str], Layout]) -> None:
    ctx = 8192
    latent = memory.beside_weights(known("deepseek-v3"), ctx)
    assert latent.states == 61 * (512 + 64) * 2 * ctx
    windows = memory.beside_weights(known("gpt-oss-120b"), ctx)
    full = 18 * 2 * 8 * 64 * 2
    assert windows.states == full * (ctx + 768)  # a window of 128 and a batch of 512, to a multiple of 256


def machine(ram: float, vram: float = 0) -> Machine:
    """A made-up machine: 80 GB/s for every type."""
    return Machine(int(ram), int(vram), 900e9, ram_bandwidth=80e9)


@pytest.mark.parametrize(
    ("name", "ram", "vram"),
    [
        ("qwen3-30b-a3b", 64e9, 0),
        ("qwen3-30b-a3b", 64e9, 8e9),
        ("deepseek-v3", 512e9, 24e9),
        ("mixtral-8x22b", 16e9, 0),
    ],
)
def test_what_lies_where_adds_up(name: str, ram: float, vram: float, known: Callable[[str], Layout]) -> None:
    layout, beside = known(name), memory.Beside(10**9, 10**8)
    for form in forms.forms(layout):
        c = cost.cost(layout, form, machine(ram, vram), beside)
        weights = sum(form.tensor_bytes(tensor) for tensor in form.shapes)
        assert c.vram + c.ram == weights + beside.states + beside.compute
        assert c.vram <= vram
        assert c.fits == (c.ram + cost.RESERVE <= ram)
        assert c.read_vram + c.read_ram < weights
        seconds = c.read_vram / (900e9 * 0.7) + c.read_ram / 80e9
        assert c.tokens_per_second == pytest.approx(1 / seconds)


def test_a_token_reads_the_experts_that_it_uses(known: Callable[[str], Layout]) -> None:
    layout = known("qwen3-30b-a3b")
    form = next(form for form in forms.forms(layout) if form.name == "q8_0")
    read = cost.cost(layout, form, machine(64e9), memory.Beside(0, 0)).read_ram
    active = 3.35e9 - 151936 * 2048  # published: 3.3 G active, the input embeddings among them
    assert 8 * read / active == pytest.approx(8.5, rel=0.02)


def test_factors_are_not_advised_where_they_cannot_pay(known: Callable[[str], Layout]) -> None:
    assert "4.25 bits" in forms.why_not_factorized(
        known("gpt-oss-120b")
    ) or "4 bits" in forms.why_not_factorized(known("gpt-oss-120b"))
    assert "8 experts" in (forms.why_not_factorized(known("mixtral-8x22b")) or "")
    assert forms.why_not_factorized(known("qwen3-30b-a3b")) is None
    assert not any(form.factorized for form in forms.forms(known("mixtral-8x22b")))


def test_factorized_forms_save_what_they_say(known: Callable[[str], Layout]) -> None:
    layout = known("qwen3-30b-a3b")
    n, p, d = layout.expert_shape()
    found = [form for form in forms.forms(layout) if form.factorized]
    assert found
    for form in found:
        gate = [
            form.shapes[name]
            for name in form.shapes
            if ".0.ffn_gate_" in name and not name.endswith("inp.weight")
        ]
        kept = sum(math.prod(shape) for shape in gate if shape != (n, form.bases)) / (n * p * d)
        assert kept == pytest.approx(form.kept)
        assert form.rank % 256 == 0


def test_what_fits_and_is_best_comes_first(known: Callable[[str], Layout]) -> None:
    layout, beside = known("qwen3-30b-a3b"), memory.Beside(10**9, 10**8)
    wishes = report.PlanWishes(size=int(14e9))
    costs = report.order([cost.cost(layout, f, machine(32e9), beside) for f in forms.forms(layout)], wishes)
    good = [c for c in costs if report.meets(c, wishes)]
    assert good and costs[: len(good)] == good
    assert all(c.form.n_bytes <= 14e9 for c in good)
    ranks = [c.kl / (report.CLEARLY if c.form.factorized else 1) for c in good]
    assert ranks == sorted(ranks)


def recommendations() -> list[list[str]]:
    """Rows of the table of ten models in docs/performance.md."""
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    table = text.split("<!-- ten models")[1].partition("\n\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("row", recommendations(), ids=lambda row: row[0])
def test_recommendations_for_known_models(row: list[str], known: Callable[[str], Layout]) -> None:
    """The table in the docs is what the plan says today, with the KV cache that it names."""
    name, memories, beside, form, size, speed, kl, factors = row
    ram, vram = (0.0 if m.strip() == "none" else float(m.removesuffix("GB")) for m in memories.split(","))
    states, compute = (float(x.removesuffix("GB")) for x in beside.split("+"))
    here = Machine(int(ram * 1e9), int(vram * 1e9), 900e9, ram_bandwidth=80e9 if vram else 60e9)
    parts, wishes = memory.Beside(int(states * 1e9), int(compute * 1e9)), report.PlanWishes()
    layout = known(name)
    costs = report.order([cost.cost(layout, f, here, parts) for f in forms.forms(layout)], wishes)
    best = costs[0]
    assert report.meets(best, wishes) and best.form.name == form
    assert f"{best.form.n_bytes / 1e9:.2f} GB" == size
    assert best.tokens_per_second == pytest.approx(float(speed), rel=0.02) and f"{best.kl:.4f}" == kl
    fitting = [c.kl for c in costs if c.form.factorized and report.meets(c, wishes)]
    assert factors == (f"{min(fitting):.4f}" if fitting else "-")


def test_all_ten_models_have_a_recommendation() -> None:
    assert {row[0] for row in recommendations()} == CONFIGS.keys()


def test_the_command(model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBE_GGUF_CACHE", str(tmp_path))
    monkeypatch.setattr("mobe_gguf.plan.machine.cache_dir", lambda: tmp_path)
    monkeypatch.setattr("mobe_gguf.runtime.speed.BYTES", 1 << 20)
    run = CliRunner().invoke(main, ["plan", str(model("qwen3_moe")), "--ram", "1G", "--ctx", "512"])
    assert run.exit_code == 0, run.output
    assert "Best: q8_0" in run.output and "mobe-gguf compress" in run.output
    run = CliRunner().invoke(main, ["plan", str(model("qwen3_moe")), "--json", "--ram", "1G", "--ctx", "512"])
    said = json.loads(run.output)
    assert (
        said["experts"]["n"]
        == json.loads((model("qwen3_moe") / "config.json").read_text())["num_local_experts"]
    )
    assert all(form["bytes"] > 0 for form in said["forms"])
    config = model("qwen3_moe") / "config.json"  # the command names the directory that the weights will be in
    run = CliRunner().invoke(main, ["plan", str(config), "--json", "--ram", "1G", "--ctx", "512"])
    assert f"mobe-gguf compress {config.parent} " in json.loads(run.output)["forms"][0]["command"]


def test_speeds_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobe_gguf.runtime.speed.BYTES", 1 << 20)
    asked = []
    rate = speed.matrix_rate
    monkeypatch.setattr(speed, "matrix_rate", lambda t, n: (asked.append(t), rate(t, n))[1])
    first = this_machine(["q4_k", "f16"], tmp_path / "machine.json")
    second = this_machine(["q4_k", "f16"], tmp_path / "machine.json")
    assert asked == ["q4_k", "f16"] * PASSES  # all types in turn
    assert first.rates == second.rates and all(value > 0 for value in first.rates.values())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "holds no list 'architectures'"),
        ('{"architectures": ["NoSuchForCausalLM"]}', "knows no architecture 'NoSuchForCausalLM'"),
        (
            '{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": "x"}',
            "cannot build Qwen3MoeForCausalLM",
        ),
    ],
)
def test_what_is_no_model_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(MobeError, match=said):
        read_layout(path)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 64,
                "num_hidden_layers": 1,
                "vocab_size": 100,
            }
        )
    )
    with pytest.raises(MobeError, match="no layer has routed experts"):
        read_layout(path).expert_shape()
