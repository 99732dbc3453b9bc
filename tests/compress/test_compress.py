"""One command from a model to a measured file: what becomes OUT, what a stop leaves, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mobe_gguf.cli import main
from mobe_gguf.compress import pipeline, rivals
from mobe_gguf.compress.pipeline import Compression
from mobe_gguf.compress.wishes import Wishes
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate.inspect import describe
from mobe_gguf.export import Recipe, export
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
    by_name = {name: row.divergence.kl.value for name, row in result.rows.items()}
    assert {"plain", "mobe"} <= by_name.keys() and len(by_name) > 2
    assert out.is_file() and not Path(f"{out}.work").exists()
    limit = max(result.rows[name].facts.n_bytes for name in ("plain", "mobe"))
    fitting = {name: row for name, row in result.rows.items() if row.facts.n_bytes <= limit}
    assert result.kind == min(fitting, key=lambda name: by_name[name])
    assert out.stat().st_size == fitting[result.kind].facts.n_bytes
    assert result.speeds.keys() == {*by_name, "original"} and all(s > 0 for s in result.speeds.values())
    card = (tmp_path / "README.md").read_text()
    assert "[out.gguf](out.gguf)" in card and f"KL divergence {by_name[result.kind]:.2f}"[:-1] in card


def test_a_page_of_it(source: Path, text: Path, tmp_path: Path) -> None:
    """With what was measured, and without; a page that cannot be written is said before the work."""
    common = [
        "--quant",
        "q4_0",
        "--form",
        "plain",
        "--text",
        text,
        "--eval-text",
        text,
        "--ctx",
        64,
        "--chunks",
        6,
        "-t",
        1,
    ]

    def call(name: str, *more: object) -> Result:
        out, page = tmp_path / f"{name}.gguf", tmp_path / f"{name}.html"
        arguments = ["compress", source, out, *common, "--report", page, "-q", *more]
        return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)

    assert call("a", "--eval-chunks", 4, "--no-rivals").exit_code == 0
    html = (tmp_path / "a.html").read_text()
    for key in ("quality", "bits", "errors", "routing", "sizes", "texts", "commands"):
        assert f'<section id="{key}">' in html
    assert "plain, rounded by moments" in html and f"llama-cli -m {tmp_path}/a.gguf" in html
    assert call("b", "--no-measure").exit_code == 0
    html = (tmp_path / "b.html").read_text()
    assert '<section id="bits">' in html and 'id="quality"' not in html
    assert not list(tmp_path.glob("*.work"))
    (tmp_path / "c.html").mkdir()
    refused = call("c")
    assert (
        refused.exit_code == 2
        and not (tmp_path / "c.gguf").exists()
        and "c.html is a directory" in refused.stderr
    )


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
    with pytest.raises(UsageError, match="--resume"):
        Compression(source, out, asked, quiet=True).run()
    with pytest.raises(UsageError, match="was begun with rank 32, now it is 48"):
        Compression(
            source, out, wishes(text, quant="q4_0", form="mobe", measure=False, bases=2, rank=48), quiet=True
        ).run(True)
    with monkeypatch.context() as patch:  # what is finished is not made again
        patch.setattr(pipeline, "collect", lambda *_, **__: pytest.fail("gathered twice"))
        Compression(source, out, asked, quiet=True).run(resume=True)
    assert (
        out.read_bytes()[-1000:] == whole.read_bytes()[-1000:] and out.stat().st_size == whole.stat().st_size
    )


def test_a_gguf_source(source: Path, text: Path, tmp_path: Path) -> None:
    """Moments, a plain and a factorized file out of a GGUF file, compared with the file itself; all of it in the file's types."""
    gguf = tmp_path / "source.gguf"
    export(source, gguf, Recipe("q8_0"), allow_dense=True, quiet=True)
    shutil.copy(source / "tokenizer.json", tmp_path)
    result = Compression(
        gguf, tmp_path / "out.gguf", wishes(text, quant="q4_0", rivals=False), quiet=True
    ).run()
    assert {"plain", "mobe"} == result.rows.keys() and result.original == gguf.stat().st_size
    for row in result.rows.values():
        assert (
            row.facts.n_bytes < 0.75 * result.original
        )  # attention and embeddings, too, are not left in q8_0
    assert 0 < result.rows["plain"].divergence.kl.value < 1


def test_a_plan_says_what_to_make(source: Path, text: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments])

    plan, out = tmp_path / "plan.json", tmp_path / "out.gguf"
    planned = run("plan", source, "--ram", "8G", "--vram", "0", "--ctx", 512, "--json")
    plan.write_text(planned.stdout)
    forms = json.loads(planned.stdout)["forms"]
    common = ("--text", text, "--ctx", 64, "--chunks", 6, "--no-measure", "--steps", 4, "-q")
    done = run("compress", source, out, "--plan", plan, "--plan-form", "q6_k", *common)
    assert done.exit_code == 0, done.output
    (q6,) = [form for form in forms if form["name"] == "q6_k"]
    assert out.stat().st_size == pytest.approx(q6["bytes"], rel=0.02)
    factorized = next(form for form in forms if form["factorized"])
    done = run("compress", source, out, "--plan", plan, "--plan-form", factorized["name"], *common)
    assert done.exit_code == 0, done.output
    basis = read_gguf(out).tensors["blk.0.ffn_up_basis.weight"].shape
    assert basis[:2] == (factorized["make"]["bases"], factorized["make"]["rank"])
    for options, said in (
        (("--plan", plan, "--quant", "q4_0"), "--plan says what to make, and so does --quant"),
        (("--plan-form", "q6_k"), "give its file with --plan"),
        (("--plan", plan, "--plan-form", "q7"), "--plan-form q7: the plan has q8_0"),
        (("--plan", text), "expected what this writes:\n  mobe-gguf plan MODEL --json"),
    ):
        done = run("compress", source, tmp_path / "no.gguf", *options, *common)
        assert done.exit_code in (1, 2) and said in done.output, done.output
    plan.write_text(json.dumps(json.loads(planned.stdout) | {"parameters": 1}))
    done = run("compress", source, tmp_path / "no.gguf", "--plan", plan, *common)
    assert done.exit_code == 1 and "with 1 parameters, MODEL has" in done.output


def test_killed_in_every_stage_the_result_is_the_same(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job, stopped in each stage in turn and taken up again: what it wrote by then is there, what follows is not."""
    asked = wishes(text, quant="q4_0", verify=False)
    whole, out = tmp_path / "whole" / "out.gguf", tmp_path / "out.gguf"
    whole.parent.mkdir()
    expected = Compression(source, whole, asked, quiet=True).run()
    stages = ("_plain", "_fit", "_factorized", "_original", "_rivals", "_best", "_finish", "_deliver")
    real = type("Real", (), {stop: staticmethod(getattr(Compression, stop)) for stop in stages})
    made: list[str] = []
    for number, stop in enumerate((*stages, "")):

        def killed(self: Compression, *arguments: object, stop: str = stop) -> object:
            made.append(stop)
            if stop == "_deliver":  # OUT is there, and the work folder still
                getattr(real, stop)(self, *arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if stop:
                patch.setattr(Compression, stop, killed)
                with pytest.raises(KeyboardInterrupt):
                    Compression(source, out, asked, quiet=True).run(resume=number > 0)
            else:
                result = Compression(source, out, asked, quiet=True).run(resume=True)
    assert made == list(stages)
    assert out.read_bytes() == whole.read_bytes() and result.kind == expected.kind
    assert {n: r.divergence.kl for n, r in result.rows.items()} == {
        n: r.divergence.kl for n, r in expected.rows.items()
    }
    assert (tmp_path / "README.md").read_text() == (whole.parent / "README.md").read_text()
    assert not Path(f"{out}.work").exists()


def test_an_importance_matrix_sees_a_part_of_every_text(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def run(name: str, *arguments: str) -> None:
        asked.append((name, *arguments))
        Path(arguments[arguments.index("-o") + 1]).write_bytes(b"x")

    monkeypatch.setattr(rivals.tool, "run", run)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.jsonl"]
    for path, letter in zip(texts, "abc", strict=True):
        path.write_text(letter * 60_000)
    rivals.imatrix(tmp_path / "o.gguf", texts, tmp_path / "im.gguf", 128, 100, 1)
    joined = (tmp_path / "imatrix.txt").read_text()
    assert joined.count("a") == joined.count("b") == 100 * 128 * 2 and "c" not in joined
    assert asked[0][asked[0].index("--chunks") + 1] == "100"
    layout = read_layout(source)
    assert rivals.enough_chunks(layout, 512) == 64 < rivals.enough_chunks(layout, 64)
    with pytest.raises(MobeError, match="--no-rivals"):
        rivals.imatrix(tmp_path / "o.gguf", texts[2:], tmp_path / "im.gguf", 128, 100, 1)


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
        (
            ["--bpw", "4", "--form", "mobe", "--bases", "8", "--rank", "48"],
            "of the parameters that they replace",
        ),
    ],
)
def test_wrong_usage(options: list[str], said: str, source: Path, text: Path, tmp_path: Path) -> None:
    more = ["--text", str(text), "--ctx", "64", "--chunks", "4"]
    run = CliRunner().invoke(main, ["compress", str(source), str(tmp_path / "out.gguf"), *options, *more])
    assert run.exit_code in (1, 2) and said in run.output
    bare = CliRunner().invoke(
        main, ["compress", str(source / "config.json"), str(tmp_path / "o.gguf"), "--bpw", "4"]
    )
    assert bare.exit_code == 2 and "give the directory with them" in bare.output
    assert not (tmp_path / "out.gguf").exists()


def test_the_steps_options_reach_the_file(source: Path, text: Path, tmp_path: Path) -> None:
    """Moments of an earlier run, and types that are named."""
    moments, out = tmp_path / "m.safetensors", tmp_path / "out.gguf"
    made = invoke("moments", source, moments, "--text", text, "--ctx", 64, "--chunks", 6, "-q")
    assert made.exit_code == 0, made.output
    common = (source, out, "--quant", "q4_0", "--text", text, "--form", "plain", "--no-measure", "-q")
    types = ("--tensor-type", "attn_q=q8_0", "--down-type", "q5_0", "--output-tensor-type", "f16")
    said = invoke("compress", *common, "--moments", moments, *types, "--token-embedding-type", "q8_0")
    assert said.exit_code == 0, said.output
    found = {t.name: t.type.lower() for t in read_gguf(out).tensors.values()}
    assert found["blk.0.attn_q.weight"] == found["token_embd.weight"] == "q8_0"
    assert found["blk.1.ffn_down_exps.weight"] == "q5_0" and found["output.weight"] == "f16"
    assert found["blk.0.ffn_gate_exps.weight"] == "q4_0"
    both = invoke("compress", *common, "--moments", moments, "--keep", 0.9)
    assert both.exit_code == 2 and "--keep" in both.output


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_killed_before_the_card(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is there without its card is not yet done."""
    out = tmp_path / "out.gguf"
    settled = wishes(text, quant="q4_0", form="plain", measure=False)
    with monkeypatch.context() as patch:
        patch.setattr("mobe_gguf.export.write_card", lambda subject: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Compression(source, out, settled, quiet=True).run()
    Compression(source, out, settled, quiet=True).run(resume=True)
    assert out.is_file() and "[out.gguf](out.gguf)" in (tmp_path / "README.md").read_text()
