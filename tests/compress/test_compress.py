"""One command from a model to a measured file: what becomes OUT, what a stop leaves, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mobe_gguf.cli import main
from mobe_gguf.compress import pipeline, rivals
from mobe_gguf.compress.pipeline import Compression, Wishes
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate.inspect import describe
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.plan.layout import read_layout

Maker = Callable[..., Path]

#: Large enough experts for a factorized form, small enough to be quick.
OPTIONS = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 16, "num_hidden_layers": 2}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "The keeper counted 12 ships; she'd never counted so many small ones before evening. " * 80
    )
    return path


@pytest.fixture
def source(model: Maker) -> Path:
    return model("qwen3_moe", **OPTIONS)


def wishes(text: Path, **more: object) -> Wishes:
    settled = {
        "ctx": 64,
        "chunks": 6,
        "eval_chunks": 4,
        "text": (text,),
        "eval_text": text,
        "threads": 1,
        "steps": 20,
    }
    return Wishes(**(settled | more))  # type: ignore[arg-type]


def test_the_better_of_both_becomes_out(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = Compression(source, out, wishes(text, quant="q4_0"), quiet=True).run()
    by_name = {result.names[row.facts.path.name]: row.divergence.kl.value for row in result.rows}
    assert {"plain", "mobe"} <= by_name.keys() and len(by_name) > 2
    assert out.is_file() and not Path(f"{out}.work").exists()
    limit = max(
        row.facts.n_bytes for row in result.rows if result.names[row.facts.path.name] in ("plain", "mobe")
    )
    fitting = {
        result.names[r.facts.path.name]: r for r in result.rows if r.facts.n_bytes <= limit * pipeline.SLACK
    }
    assert result.kind == min(fitting, key=lambda name: by_name[name])
    assert out.stat().st_size == fitting[result.kind].facts.n_bytes
    assert all(speed > 0 for speed in result.speeds.values())


def test_a_factorized_file_where_it_is_asked_for(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    asked = wishes(text, quant="q4_0", form="mobe", measure=False, bases=2, rank=32, activation="tanh")
    result = Compression(source, out, asked, quiet=True).run()
    assert result.kind == "mobe" and not result.rows
    shape = read_gguf(out).tensors["blk.0.ffn_gate_basis.weight"].shape
    assert shape == (2, 32, 64)
    assert not describe(out).problems


def test_the_size_is_kept(source: Path, text: Path, tmp_path: Path) -> None:
    out, size = tmp_path / "out.gguf", int(read_layout(source).parameters * 6.5 / 8)
    Compression(source, out, wishes(text, size=size, form="plain", measure=False), quiet=True).run()
    assert 0.8 * size < out.stat().st_size <= size


def test_a_killed_job_resumes_and_makes_the_same(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wishes(text, quant="q4_0", form="mobe", measure=False, bases=2, rank=32)
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    Compression(source, whole, asked, quiet=True).run()

    def stop(self: Compression, path: Path, form: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Compression, "_factorized", stop)
        with pytest.raises(KeyboardInterrupt):
            Compression(source, out, asked, quiet=True).run()
    assert not out.exists() and Path(f"{out}.work").is_dir()
    with pytest.raises(MobeError, match="--resume"):
        Compression(source, out, asked, quiet=True).run()
    with pytest.raises(UsageError, match="rank: the stopped job had 32, now it is 48"):
        Compression(
            source, out, wishes(text, quant="q4_0", form="mobe", measure=False, bases=2, rank=48), quiet=True
        ).run(True)
    with monkeypatch.context() as patch:  # what is finished is not made again
        patch.setattr(pipeline, "collect", lambda *_, **__: pytest.fail("gathered twice"))
        Compression(source, out, asked, quiet=True).run(resume=True)
    assert (
        out.read_bytes()[-1000:] == whole.read_bytes()[-1000:] and out.stat().st_size == whole.stat().st_size
    )


def test_rivals_are_of_about_the_size(source: Path) -> None:
    layout = read_layout(source)
    sizes = {quant: rivals.plain_form(layout, quant).n_bytes for quant in rivals.QUANTS}
    found = rivals.around(layout, sizes["q5_k_m"])
    assert found and all(sizes[quant] <= sizes["q5_k_m"] * rivals.LARGER for quant in found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "say how large the file may be"),
        (["--size", "1M", "--bpw", "3"], "leave one out"),
        (["--bpw", "99"], "expected bits per weight"),
        (["--quant", "q9"], "unknown type"),
        (["--size", "1K", "--form", "mobe"], "no factorized form of at most"),
    ],
)
def test_wrong_usage(options: list[str], said: str, source: Path, text: Path, tmp_path: Path) -> None:
    more = ["--text", str(text), "--ctx", "64", "--chunks", "4"]
    run = CliRunner().invoke(main, ["compress", str(source), str(tmp_path / "out.gguf"), *options, *more])
    assert run.exit_code in (1, 2) and said in run.output
    assert not (tmp_path / "out.gguf").exists()
