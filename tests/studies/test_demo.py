"""The demo with a tenth of its effort: what it leaves, that its numbers are sane, and that a stopped one resumes."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from mobe_gguf import runtime
from mobe_gguf.cli import main
from mobe_gguf.compress.pipeline import Compression
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.studies import demo

MODEL = resources.path("models") / demo.MODEL

QUICK = demo.Effort(steps=4, chunks=16, eval_chunks=2, tokens=16)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    if not runtime.is_built():
        pytest.skip("the runtime is not installed: run mobe-gguf build")
    directory, patch = tmp_path_factory.mktemp("demo"), pytest.MonkeyPatch()
    finish = Compression._finish

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with patch.context() as p:
        p.setattr(Compression, "_finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            demo.run(directory, QUICK)
    assert Compression._finish is finish and (directory / f"{demo.MODEL}.gguf.work").is_dir()
    return demo.run(directory, QUICK)


def test_what_is_left(done: demo.Demo) -> None:
    out, rows = done.result.out, done.result.rows
    assert sorted(p.name for p in out.parent.iterdir()) == ["README.md", out.name]
    assert out.stat().st_size == rows[done.result.kind].facts.n_bytes <= demo.SIZE
    assert {"plain", "mobe"} < rows.keys() and done.result.original > 3 * demo.SIZE


def test_perplexities(done: demo.Demo) -> None:
    """A model with its experts swapped or its mix misread is far worse than token frequencies are."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    heldout = (MODEL.parent / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    calibration = (MODEL.parent / "calibration.txt").read_text(encoding="utf-8")
    counts = Counter(tokenizer.encode(calibration).ids)
    total = sum(counts.values()) + tokenizer.get_vocab_size()
    ids = tokenizer.encode(heldout).ids
    unigram = math.exp(-sum(math.log((counts[i] + 1) / total) for i in ids) / len(ids))
    for row in done.result.rows.values():
        d = row.divergence
        assert 1 < d.perplexity.value < unigram / 2 and d.perplexity.value < 1.3 * d.reference.value
        assert 0 < d.kl.value < 0.3


def test_text_and_table(done: demo.Demo) -> None:
    assert done.text.startswith(demo.PROMPT) and len(done.text) > len(demo.PROMPT) + 5
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(demo.render(done))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    for name, row in done.result.rows.items():
        label = {"plain": "plain, rounded", "mobe": "MoBE, rounded"}.get(name, f"{name}, llama-quantize")
        (line,) = [line for line in lines if line.startswith(label)]
        assert f"{row.divergence.perplexity.value:.3f}" in line
        assert f"{row.facts.n_bytes / 1e6:.2f} MB" in line
        assert f"{done.result.speeds[name]:.1f}" in line and ("<- OUT" in line) == (name == done.result.kind)
    assert any(line.startswith("original, 16 bits") for line in lines)


def test_the_file_runs_in_python(done: demo.Demo) -> None:
    from llama_cpp import Llama

    llama = Llama(str(done.result.out), n_ctx=64, n_threads=1, verbose=False)
    assert llama(demo.PROMPT, max_tokens=4, temperature=0)["choices"][0]["text"]


def test_the_command_that_is_shown_asks_for_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []

    class Stop(Exception):
        pass

    def remember(self: Compression, model: Path, out: Path, wishes: object, *_: object) -> None:
        asked.append((model, out, wishes))
        raise Stop

    monkeypatch.setattr(Compression, "__init__", remember)
    words = demo.Effort().command(tmp_path / "out.gguf").split()
    assert words[:2] == ["mobe-gguf", "compress"]
    monkeypatch.chdir(MODEL.parent.parent)
    CliRunner().invoke(main, words[1:])
    ((model, out, wishes),) = asked
    assert model == Path("models") / demo.MODEL or model == MODEL
    assert out == tmp_path / "out.gguf"
    expected = demo.Effort().wishes()
    assert wishes == expected or wishes.description() == expected.description()  # type: ignore[attr-defined]


def test_without_runtime_the_message_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobe_gguf.runtime.install import Environment

    monkeypatch.setattr(Environment, "active", classmethod(lambda cls: cls.at(tmp_path / "nothing")))
    result = CliRunner().invoke(main, ["demo", str(tmp_path / "demo")])
    assert result.exit_code == 1 and result.output.strip().endswith("run mobe-gguf build")
    assert not (tmp_path / "demo").exists()


def test_a_program_that_fails_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(MobeError, match=r"llama-completion -m .*broken\.gguf .* failed \(exit code 1\):\n"):
        demo.complete(tmp_path / "broken.gguf", 1)
