"""``mobe-gguf ablate``: what is measured agrees with the factors, a stopped study goes on, nothing else stays behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner, Result

from mobe_gguf import runtime
from mobe_gguf.cli import main
from mobe_gguf.core import resources
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.formula import combine
from mobe_gguf.evaluate import heldout
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.studies import ablate
from mobe_gguf.studies.ablate import study as studies

FAST = ("--steps", 3, "--no-kl", "--layers", 1, "--projections", "up")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("qwen3_moe", tmp_path_factory.mktemp("model") / "qwen3_moe")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["ablate", *map(str, arguments)])


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_defaults(model):
    study = ablate.settle(Checkpoint(model), ablate.Asked(divergence=False))
    assert study.layers == (0, 1, 2) and study.projections == ("gate", "up")
    assert study.bases == (1, 2, 4) and study.activations == ("none", "silu", "tanh") and study.text is None
    trials = [(t.bases, t.activation) for t in study.trials()]
    assert trials == [(1, "tanh"), (2, "tanh"), (4, "tanh"), (2, "none"), (2, "silu")], "each once"


def test_wide_compares_sizes_of_equal_parameters(model, tmp_path):
    asked = (*FAST, "--bases", "2", "--activations", "tanh", "--wide", "--json")
    result = call(model, tmp_path / "out", *asked)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "sizes.png").stat().st_size > 10_000
    rows = [row for row in json.loads(result.stdout)["rows"] if row["trial"]["rank"] is not None]
    assert {(row["trial"]["bases"], row["trial"]["activation"]) for row in rows} == {
        (m, f) for m in (1, 2, 3, 4) for f in ("tanh", "none")
    }
    for row in rows:
        assert row["rank"] == row["trial"]["rank"] and row["kept"] == pytest.approx(0.75, rel=0.05)
    assert len({row["rank"] for row in rows}) == 4


@pytest.mark.parametrize("shape", [(128, 768, 2048), (24, 96, 256), (8, 96, 96), (8, 14336, 4096)])
def test_equal_sizes(shape):
    n, p, d = shape
    found = studies.equal_sizes(n, p, d)
    share = min(p / d + 0.25, 0.75)
    assert len(found) >= 3 and all(m <= n // 2 and 1 <= r <= d for m, r in found)
    for m, r in found:
        assert r / d + m * r / (n * p) == pytest.approx(share, rel=0.05)


def test_what_is_measured_is_what_the_solver_makes(model, tmp_path):
    result = call(model, tmp_path / "out", *FAST, "--bases", "2,4", "--activations", "silu", "--json")
    assert result.exit_code == 0, result.stderr
    assert names(tmp_path / "out") == {"ablation.json", "bases.png", "activations.png", "values.png"}
    assert names(tmp_path) == {"out"}
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out" / "ablation.json").read_text())
    rows = {(row["trial"]["bases"], row["trial"]["activation"]): row for row in found["rows"]}
    assert set(rows) == {(2, "tanh"), (4, "tanh"), (2, "silu")}
    w = Checkpoint(model).expert_stack(1, "up")
    factors = fit(w, Settings(2, 48, activation="silu", steps=3))
    row = rows[2, "silu"]
    assert row["errors"] == {"1.up": pytest.approx(factors.error, rel=1e-4)} and row["divergence"] is None
    assert row["kept"] == pytest.approx(48 / 64 + 2 / 8)
    u = combine(factors.mix, factors.basis)
    after = torch.nn.functional.silu(u)
    for values, counts in ((u, row["before"]), (after, row["after"])):
        assert sum(counts) == u.numel()
        low = sum(counts[: studies.BINS // 2])
        assert low == pytest.approx(int((values < 0).sum()), abs=20)
        inner = sum(c for c, e in zip(counts, found["bin_edges"], strict=False) if -1 <= e + 1e-9 < 1)
        assert inner == pytest.approx(int((values.abs() < 1).sum()), abs=20)
    far = [
        sum(c for c, e in zip(row[name], found["bin_edges"], strict=False) if e < -0.31)
        for name in ("before", "after")
    ]
    assert far[0] > 0 and far[1] == 0, "silu is never below -0.28"


def test_a_table(model, tmp_path):
    page = tmp_path / "page.html"
    more = ("--bases", 2, "--activations", "tanh", "--no-plot", "--report", page)
    result = call(model, tmp_path / "out", *FAST, *more)
    assert result.exit_code == 0, result.stderr
    html = page.read_text()
    assert all(f'<section id="{key}">' in html for key in ("errors", "layers", "values", "commands"))
    assert 'id="divergence"' not in html and "2 bases, tanh" in html
    assert names(tmp_path / "out") == {"ablation.json"}
    assert "100.0%" in result.stdout and "layers 1, up, 3 steps" in result.stdout
    assert "[1/1] bases-002-tanh: error 0." in result.stderr


@pytest.mark.parametrize("at", ["before the factors", "after the factors"])
def test_a_stopped_study_goes_on(at, model, tmp_path, monkeypatch):
    out, arguments = tmp_path / "out", (*FAST, "--bases", "2,4", "--activations", "tanh", "--no-plot")
    whole = tmp_path / "whole"
    assert call(model, whole, *arguments).exit_code == 0
    measure, name, done = studies._measure, "_measure" if at == "before the factors" else "_values", []
    original = getattr(studies, name)

    def stop(*args, **kwargs):
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(studies, name, stop)
    stopped = call(model, out, *arguments)
    assert stopped.exit_code == 130 and "--resume" in stopped.stderr and not out.exists()
    assert "holds an unfinished study. Add --resume" in call(model, out, *arguments).stderr
    monkeypatch.setattr(studies, name, original)
    changed = call(model, out, *arguments[:-1], "--resume", "--seed", 1, "--no-plot")
    assert changed.exit_code == 1 and "seed is 1 now, but the study in" in changed.stderr
    calls: list[str] = []

    def counted(*args):
        calls.append(args[3].name)
        return measure(*args)

    monkeypatch.setattr(studies, "_measure", counted)
    resumed = call(model, out, *arguments, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert calls == ["bases-004-tanh"], "what is measured stays measured"
    assert (out / "ablation.json").read_bytes() == (whole / "ablation.json").read_bytes()
    assert names(tmp_path) == {"out", "whole"}


@pytest.mark.skipif(not runtime.is_built(), reason="the runtime is not installed: run mobe-gguf build")
def test_divergence_grows_with_the_error(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(heldout().read_text(encoding="utf-8")[:12_000] + "\n", encoding="utf-8")
    source, out = resources.path("models") / "tiny-moe", tmp_path / "out"
    arguments = ("--layers", 0, "--bases", "2,12", "--activations", "tanh", "--steps", 8, "--text", text)
    result = call(source, out, *arguments, "--chunks", 2, "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    rows = {row["trial"]["bases"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows[2]["error"] > 2 * rows[12]["error"]
    assert rows[2]["divergence"][0] > 2 * rows[12]["divergence"][0] > 0
    assert names(out) == {"ablation.json", "bases.png", "activations.png", "values.png", "divergence.png"}
    assert names(tmp_path) == {"out", "text.txt"}


def test_refusals(model, tmp_path):
    out = tmp_path / "out"
    for given, message, code in (
        (["--bases", "2,x"], "expected whole numbers", 2),
        (["--bases", "9"], "--bases 9: expected 1 to 8", 2),
        (["--activations", "relu"], "'relu' is unknown", 2),
        (["--layers", "7"], "layer 7 has no routed experts", 2),
        (["--projections", "left"], "'left' is unknown", 2),
        (["--imatrix", "absent.gguf"], "no such file", 1),
    ):
        result = call(model, out, "--no-kl", "--no-plot", *given)
        assert (result.exit_code, message in " ".join(result.stderr.split())) == (code, True), result.stderr
    assert not any(tmp_path.iterdir())
    out.mkdir()
    assert "exists already" in call(model, out, *FAST).stderr
    with pytest.raises(UsageError):
        ablate.settle(Checkpoint(model), ablate.Asked(bases=(0,), divergence=False))
