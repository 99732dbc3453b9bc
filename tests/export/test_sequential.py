"""``export --sequential``: experts rounded for what the rounded layers before them put out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobe_gguf.calibrate import pairs
from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.export import Recipe, export, parse_override, parse_quant
from mobe_gguf.export import sequential as module
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.runtime import ggml

from .gguf_sources import raw

Maker = Callable[..., Path]

SIZE = {"moe_intermediate_size": 64, "hidden_size": 128}
TEXT = resources.path("models") / "calibration.txt"
CHUNKS = 8
#: Few levels, so that there is an error to make up for.
QUANT = "q8_0", "q2_0"


@pytest.fixture(scope="module")
def moments(model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moments") / "m.safetensors"
    collect(model("qwen3_moe", **SIZE), TEXT, out, chunks=CHUNKS, quiet=True)
    return out


def write(path: Path, out: Path, moments: Path, experts: str = QUANT[1], **options: Any) -> Path:
    overrides = tuple(parse_override(f"ffn_{x}_exps={experts}") for x in ("gate", "up", "down"))
    recipe = Recipe(parse_quant(QUANT[0]), moments=str(moments), overrides=overrides)
    export(path, out, recipe, dense=True, quiet=True, **options)
    return out


def experts(file: Path, layer: int, projection: str) -> torch.Tensor:
    return tensor(file, f"blk.{layer}.ffn_{projection}_exps.weight")


def tensor(file: Path, name: str) -> torch.Tensor:
    info = read_gguf(file).tensors[name]
    data = raw(info).reshape(*info.shape[:-1], -1)
    return torch.from_numpy(ggml.dequantize(data, info.type, info.shape[-1]))


def states(path: Path, *, file: Path | None = None, skip: int = 0) -> torch.Tensor:
    """The last hidden states of ``path`` with the experts of ``file``, by the whole model in transformers; ``skip`` leaves out the
    chunks that were seen."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if file is not None:
        for i, layer in enumerate(model.model.layers):
            parts = [experts(file, i, x) for x in ("gate", "up", "down")]
            with torch.no_grad():
                layer.mlp.experts.gate_up_proj.copy_(torch.cat(parts[:2], 1))
                layer.mlp.experts.down_proj.copy_(parts[2])
                layer.mlp.gate.weight.copy_(tensor(file, f"blk.{i}.ffn_gate_inp.weight"))
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(TEXT.read_text()).input_ids)[
        : 512 * (CHUNKS + skip)
    ]
    with torch.no_grad():
        found: torch.Tensor = model.model(ids.view(-1, 512)[skip:]).last_hidden_state
    return found


def kept_states(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The states ``[2, chunks, ctx, d]`` after the last layer of both models, of each run."""
    found: list[torch.Tensor] = []
    monkeypatch.setattr(
        pairs.PairedRun, "_output", lambda _, after: found.append(after.tensor.float().clone())
    )
    return found


def check_states(path: Path, got: torch.Tensor, expected: torch.Tensor) -> None:
    """States that were run, before the last norm, are transformers' ``expected`` ones, after it."""
    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        got = net.model.norm(got)
    assert float((got - expected).norm() / expected.norm()) < 2e-5


def test_the_whole_model_comes_nearer(model: Maker, moments: Path, tmp_path: Path) -> None:
    """On the text, and on one that neither moments nor run have seen."""
    path = model("qwen3_moe", **SIZE)
    plain = write(path, tmp_path / "plain.gguf", moments)
    ours = write(path, tmp_path / "ours.gguf", moments, sequential=(TEXT,), chunks=CHUNKS)
    assert plain.stat().st_size == ours.stat().st_size
    for skip, gain in ((0, 0.9), (CHUNKS, 0.95)):
        right = states(path, skip=skip)
        errors = [float((states(path, file=f, skip=skip) - right).square().sum()) for f in (plain, ours)]
        assert errors[1] < gain * errors[0], errors
    assert not (tmp_path / "ours.gguf.rounding").exists()


def test_what_is_run_is_what_is_stored(
    model: Maker, moments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states of the two models are those of transformers with the original's and with the file's experts."""
    path, ran = model("qwen3_moe", **SIZE), kept_states(monkeypatch)
    ours = write(path, tmp_path / "ours.gguf", moments, sequential=(TEXT,), chunks=CHUNKS)
    for got, file in zip(ran[0], (None, ours), strict=True):
        check_states(path, got, states(path, file=file))


def test_down_makes_up_for_the_rest(
    model: Maker, moments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs alone in gate and up; down, which has many levels, takes back a part of the error, also on unseen text."""
    path, errors = model("qwen3_moe", **SIZE), []
    overrides = tuple(parse_override(f"ffn_{x}_exps=q1_0") for x in ("gate", "up"))
    recipe = Recipe(parse_quant("q8_0"), moments=str(moments), overrides=overrides)
    right = states(path, skip=CHUNKS)
    for name in ("ours", "own"):
        if name == "own":  # each expert for its own
            monkeypatch.setattr(pairs.Sums, "_common", lambda *_: 0.0)
        out = tmp_path / f"{name}.gguf"
        export(path, out, recipe, dense=True, quiet=True, sequential=(TEXT,), chunks=CHUNKS)
        errors.append(float((states(path, file=out, skip=CHUNKS) - right).square().sum()))
    assert errors[0] < 0.9 * errors[1], errors


def test_layers_that_do_more_than_add(
    model: Maker, moments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where experts' outputs are changed before they are added, down makes up for other experts, and what is run is what is stored."""
    path, complete = model("qwen3_moe", **SIZE), pairs.OneModel._complete
    monkeypatch.setattr(pairs.OneModel, "_complete", lambda self, answers: complete(self, answers) and False)
    ran = kept_states(monkeypatch)
    plain = write(path, tmp_path / "plain.gguf", moments)
    ours = write(path, tmp_path / "ours.gguf", moments, sequential=(TEXT,), chunks=CHUNKS)
    right = states(path)
    errors = [float((states(path, file=f) - right).square().sum()) for f in (plain, ours)]
    assert errors[1] < 0.9 * errors[0], errors
    check_states(path, ran[0][1], states(path, file=ours))


def test_the_router_keeps_more_choices(
    model: Maker, moments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a text that neither moments nor run have seen."""
    path, kept = model("qwen3_moe", **SIZE), []
    ours = write(path, tmp_path / "ours.gguf", moments, sequential=(TEXT,), chunks=CHUNKS)
    monkeypatch.setattr(module.Sequential, "_refitted", lambda *_: [])
    without = write(path, tmp_path / "without.gguf", moments, sequential=(TEXT,), chunks=CHUNKS)
    right = choices(path, None)
    for file in (ours, without):
        kept.append(float((choices(path, file) == right).all(-1).float().mean()))
    assert kept[0] > kept[1], kept


def choices(path: Path, file: Path | None) -> torch.Tensor:
    """The experts ``[layers, tokens, k]``, in order, that tokens of another part of the text choose."""
    found: list[torch.Tensor] = []
    layer = AutoModelForCausalLM.from_pretrained(path).model.layers[0].mlp.experts.__class__
    forward = layer.forward

    def look(self: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found.append(index.sort(-1).values)
        answer: torch.Tensor = forward(self, x, index, weights)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", look)
        states(path, file=file, skip=CHUNKS)
    return torch.stack(found)


def test_many_levels_need_no_correction(model: Maker, moments: Path, tmp_path: Path) -> None:
    path = model("qwen3_moe", **SIZE)
    ours = write(path, tmp_path / "ours.gguf", moments, "q8_0", sequential=(TEXT,), chunks=CHUNKS)
    for layer in range(Checkpoint(path).n_layer):
        for x in ("gate", "up", "down"):
            right = torch.stack(
                [Checkpoint(path).expert(layer, x, e).float() for e in range(Checkpoint(path).n_expert)]
            )
            assert float((experts(ours, layer, x) - right).norm() / right.norm()) < 0.02


def check_continues(make: Callable[[Path], Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``make(out)``, stopped in its second layer and called again, writes the same file and does not run the first layer again."""
    whole = make(folder / "whole.gguf")
    codes, seen = module.Sequential._codes, []

    def stop(self: Any, layer: int) -> Any:
        seen.append(layer)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return codes(self, layer)

    monkeypatch.setattr(module.Sequential, "_codes", stop)
    again = folder / "again.gguf"
    with pytest.raises(KeyboardInterrupt):
        make(again)
    assert not again.exists() and (folder / "again.gguf.rounding" / "layer-000.safetensors").is_file()
    make(again)
    assert seen[2] == seen[1] == 1, "the finished layer is not run again"
    assert again.read_bytes() == whole.read_bytes()


def test_a_stopped_run_continues(
    model: Maker, moments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model("qwen3_moe", **SIZE)
    make = lambda out: write(path, out, moments, sequential=(TEXT,), chunks=CHUNKS)  # noqa: E731
    check_continues(make, tmp_path, monkeypatch)


def sums_of(lost: torch.Tensor, rounded: torch.Tensor) -> pairs.Sums:
    found = pairs.Sums(lost.shape[1], rounded.shape[1], "cpu")
    found.add(lost, rounded, torch.arange(len(lost)) >= len(lost) // 2)
    return found


def test_solution() -> None:
    """W* is what least squares gives from the rounded model's inputs to the original's outputs."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=g)
    rounded = x + 0.5 * torch.randn(4000, 12, generator=g) @ torch.randn(12, 12, generator=g)
    w = torch.randn(5, 12, generator=g)
    more, s = sums_of((x - rounded) @ w.T, rounded).solve(torch.zeros(12, 12), 1.0)
    expected = torch.linalg.lstsq(rounded.double(), (x @ w.T).double()).solution.T
    assert float((w + more - expected).norm() / expected.norm()) < 3 * pairs.RIDGE
    assert float((w - expected).norm() / expected.norm()) > 0.1
    assert abs(float(s.diagonal().mean()) - 1) < 1e-5
    more, _ = pairs.Sums(5, 12, "cpu").solve(torch.eye(12), 1.0)
    assert not more.any(), "an expert without tokens keeps its matrix"


@pytest.mark.parametrize("signal", [0.0, 0.3, 30.0])
def test_chance_is_not_fitted(signal: float) -> None:
    """What is lost and has little to do with the inputs: on other tokens the solution never does harm, and does its best, nearly."""
    g = torch.Generator().manual_seed(1)
    inside, way = torch.randn(2, 600, 40, generator=g), signal * torch.randn(6, 40, generator=g) / 40**0.5
    lost = [x @ way.T + torch.randn(600, 6, generator=g) for x in inside]
    more, _ = sums_of(lost[0], inside[0]).solve(torch.zeros(40, 40), 0.0)
    plain = torch.linalg.lstsq(inside[0], lost[0]).solution.T

    def left(found: torch.Tensor) -> float:
        return float((lost[1] - inside[1] @ found.T).square().sum() / lost[1].square().sum())

    best = min(left(q * plain) for q in torch.linspace(0, 1, 101).tolist())
    assert left(more) < min(1.002, best + 0.005), (left(more), best)
    if not signal:
        assert left(plain) > 1.03, "least squares alone does harm"


def test_wrong_use(model: Maker, moments: Path, tmp_path: Path) -> None:
    path, out = model("qwen3_moe", **SIZE), tmp_path / "out.gguf"
    with pytest.raises(UsageError, match="--moments"):
        export(path, out, Recipe(parse_quant("q4_0")), dense=True, quiet=True, sequential=(TEXT,))
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises((UsageError, MobeError), match="short.txt"):
        write(path, out, moments, sequential=(short,))
    assert not list(tmp_path.glob("out*"))
