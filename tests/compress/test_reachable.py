"""All that the steps can do is reachable by options of compress, or left out for a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from mobe_gguf.cli import COMMANDS, main
from mobe_gguf.core.progress import Stages
from mobe_gguf.evaluate import facts_of
from mobe_gguf.formats.gguf import read_gguf, read_model
from mobe_gguf.plan.forms import Given, factorized_forms
from mobe_gguf.plan.layout import read_layout

STEPS = ("moments", "factorize", "export", "eval", "verify")

#: Options of a step that have another name in compress.
OTHER_NAME = {
    ("moments", "--rank"): "--moments",  # a file made with it
    ("factorize", "--published"): "--bases --rank --activation",
    ("factorize", "--for"): "--basis-type --transform-type",
    ("factorize", "--for-basis"): "--basis-type",
    ("factorize", "--for-transform"): "--transform-type",
    **dict.fromkeys(
        (("factorize", x) for x in ("--placement", "--ram", "--vram", "--bandwidth", "--vram-bandwidth")),
        "--plan",  # of plan, for that machine
    ),
    ("export", "--target-size"): "--size",
    ("export", "--target-bpw"): "--bpw",
    ("export", "--quant-rest"): "--quant",
    ("export", "--dense"): "--form",
    ("export", "--sequential"): "--text --no-sequential",
    ("eval", "--text"): "--eval-text",
    ("eval", "--chunks"): "--eval-chunks",
    ("eval", "--plot"): "--report",
    ("verify", "--model"): "--verify",
}

#: Options that compress lacks.
LEFT_OUT = {
    (
        "factorize",
        "--method",
    ): "the other methods are for comparison (ablate); export has no form of their own for them",
    ("factorize", "--objective"): "there are always moments, and fitting to them is what measures best",
    ("factorize", "--imatrix"): "moments hold what an importance matrix has, and more",
    ("factorize", "--dtype"): "the factors are unfinished work; they are kept in f32",
    ("factorize", "--dry-run"): "plan says what would come out",
    ("factorize", "-v"): "as --dry-run",
    ("export", "--imatrix"): "moments hold what an importance matrix has, and more",
    ("export", "--original"): "it is MODEL",
    ("export", "--source"): "it is MODEL",
    ("export", "--wab"): "factors of others are exported as they are; compress fits its own",
    ("export", "--wab-layers"): "as --wab",
    ("export", "--dry-run"): "plan says what would come out",
    ("export", "-v"): "the output is a table of the result, not of tensors",
    ("eval", "--card"): "the card always has what was measured",
    ("eval", "--keep-logits"): "they are of a 16-bit copy of MODEL, which is not kept either",
    ("eval", "--experts"): "all files would run once more; eval says it of the two that matter",
    ("verify", "--sums"): "there are no checksums of a file that is new",
    ("verify", "--layers"): "more layers than the first ones are a matter of verify --model",
}

Maker = Callable[..., Path]


def options(name: str) -> dict[str, click.Option]:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return {param.opts[0]: param for param in command.params if isinstance(param, click.Option)}


def test_every_option_of_a_step_is_reachable() -> None:
    ours = options("compress")
    steps = {(step, option) for step in STEPS for option in options(step)}
    assert steps >= OTHER_NAME.keys() | LEFT_OUT.keys(), "an entry is of no option"
    for step, option in sorted(steps):
        same, other, reason = option in ours, OTHER_NAME.get((step, option)), LEFT_OUT.get((step, option))
        if other is None and reason is None:
            assert same, f"{step} {option}: compress has no such option, and no reason is given"
        if other is not None:
            assert set(other.split()) <= ours.keys(), (step, option)
    assert set(STEPS) < set(COMMANDS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The keeper counted 12 ships; she'd never counted so many small ones before. " * 80)
    return path


@pytest.fixture
def source(model: Maker) -> Path:
    return model("qwen3_moe", hidden_size=64, moe_intermediate_size=32, num_experts=16, num_hidden_layers=2)


@pytest.fixture
def compress(source: Path, text: Path, tmp_path: Path) -> Callable[..., Result]:
    def run(*more: object, out: str = "out.gguf") -> Result:
        common = (
            "--text",
            text,
            "--eval-text",
            text,
            "--ctx",
            64,
            "--chunks",
            6,
            "--eval-chunks",
            4,
            "-t",
            1,
        )
        words = ["compress", source, tmp_path / out, *common, "-q", *more]
        return CliRunner().invoke(main, [str(word) for word in words])

    return run


def test_the_form_of_the_factors(compress: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    """Groups, mix, layers and projections reach the file, whose size the plan's forms foretell."""
    form = ("--form", "mobe", "--bases", 4, "--rank", 32, "--groups", 2, "--mix", "row")
    which = ("--layers", "1", "--projections", "up,down", "--quant", "q8_0", "--steps", 4, "--no-measure")
    done = compress(*form, *which, "--seed", 3, "--no-card", "--base-model", "a/b", "--experts-used", 1)
    assert done.exit_code == 0, done.output
    file = read_gguf(tmp_path / "out.gguf")
    assert file.tensors["blk.1.ffn_up_basis.mix"].shape == (16, 2, 32)
    assert file.tensors["blk.1.ffn_down_basis.weight"].shape == (4, 64, 32)
    factorized = {name for name in file.tensors if "_basis." in name}
    assert len(factorized) == 4
    assert file.keys["qwen3moe.expert_used_count"] == 1 and file.keys["qwen3moe.mobe.group_count"] == 2
    assert not list(tmp_path.glob("*README.md"))
    given = Given(
        bases=4, rank=32, groups=2, by_row=True, layers=(1,), projections=("up", "down"), quant="q8_0",
        basis_type="q4_0", transform_type="q4_0",
    )  # fmt: skip
    (expected,) = factorized_forms(read_layout(source), given)
    assert {n: t.shape for n, t in file.tensors.items()} == dict(expected.shapes)


def test_sizes_of_each_layer_by_a_share(compress: Callable[..., Result], tmp_path: Path) -> None:
    done = compress(
        *("--form", "mobe", "--target", "0.6", "--quant", "q8_0", "--steps", 12, "--no-measure", "--no-refit")
    )
    assert done.exit_code == 0, done.output
    tensors = read_gguf(tmp_path / "out.gguf").tensors
    units = [(layer, projection) for layer in (0, 1) for projection in ("gate", "up")]
    factors = [
        math.prod(tensors[f"blk.{layer}.ffn_{projection}_{kind}.weight"].shape)
        for layer, projection in units
        for kind in ("exps", "basis")
    ]
    assert 0.5 < sum(factors) / (len(units) * 16 * 32 * 64) <= 0.6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--groups", 5), "5"),
        (("--layers", "7"), "layer 7 has no routed experts"),
        (("--target", "1M"), "expected a share"),
        (("--target", "0.5", "--bases", 2), "leave out --bases or --target"),
        (("--projections", "gate,side"), "'side' is unknown"),
        (("--split-max-size", "10K"), "at least 1M"),
        (("--rest-from", "README.md"), "for --form mobe"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_work(
    words: tuple[object, ...], said: str, compress: Callable[..., Result], tmp_path: Path
) -> None:
    done = compress("--quant", "q4_0", *words)
    assert done.exit_code == 2 and said in done.output, done.output
    assert not list(tmp_path.glob("out.*"))


def test_several_files(
    compress: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is split in the end, its card names the first file, and measurements see the whole."""
    monkeypatch.setattr("mobe_gguf.compress.split.UNIT", 1)
    monkeypatch.setattr("mobe_gguf.compress.pipeline.check_limit", lambda limit: None)
    asked: list[str] = []
    from mobe_gguf.evaluate import tool

    real = tool.run

    def run(name: str, *arguments: str, **more: object) -> object:
        if name == "llama-gguf-split":  # it knows megabytes alone: the limit here makes files of few tensors
            asked.append(arguments[2])
            arguments = ("--split", "--split-max-tensors", "12", *arguments[3:])
        return real(name, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(tool, "run", run)
    done = compress("--quant", "q4_0", "--form", "plain", "--no-rivals", "--split-max-size", "20K", "--json")
    assert done.exit_code == 0, done.output
    files = sorted(tmp_path.glob("out-*.gguf"))
    assert asked == ["20000M"] and len(files) > 1 and not (tmp_path / "out.gguf").exists()
    assert f'"out": "{files[0]}"' in done.output
    assert len(read_model(files[0]).tensors) == sum(len(read_gguf(path).tensors) for path in files)
    card = (tmp_path / "README.md").read_text()
    assert f"[{files[0].name}]({files[0].name})" in card and "KL divergence" in card
    assert facts_of(files[0]).n_bytes == sum(path.stat().st_size for path in files)
    assert not (tmp_path / "out.gguf.work").exists()


def test_times_of_all_runs_add_up() -> None:
    """A killed stage's time counts, and so do stages that an earlier run finished."""
    kept: dict[str, float] = {}
    first = Stages({"a": 1.0, "b": 1.0}, keep=kept.update)
    with first.stage("a"):
        pass
    with pytest.raises(KeyboardInterrupt), first.stage("b"):
        raise KeyboardInterrupt
    assert kept.keys() == {"a", "b"}
    second = Stages({"a": 1.0, "b": 1.0}, {"a": 10.0, "b": 5.0}, kept.update)
    second.skip("a")
    with second.stage("b"):
        pass
    assert kept["a"] == 10.0 and kept["b"] > 5.0
