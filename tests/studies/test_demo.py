"""The demo with a tenth of its effort: what it leaves, that its numbers are sane, and that a second run keeps what it can."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from mobe_gguf import runtime
from mobe_gguf.cli import main
from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.factorize.plan import Options
from mobe_gguf.studies import demo

MODEL = resources.path("models") / demo.MODEL

QUICK = demo.Effort(steps=20, chunks=2, tokens=16)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    if not runtime.is_built():
        pytest.skip("the runtime is not installed: run mobe-gguf build")
    return demo.run(tmp_path_factory.mktemp("demo"), QUICK)


def by_quant(done: demo.Demo) -> dict[tuple[str, str], demo.DemoFile]:
    return {(file.model, file.quant): file for file in done.files}


def test_sizes(done: demo.Demo):
    files = by_quant(done)
    assert list(files) == list(demo.FILES)
    for file in done.files:
        assert file.path.stat().st_size == file.report.n_bytes
    for quant in ("f16", "q4_k"):
        original, mobe = files[demo.MODEL, quant], files[demo.MOBE, quant]
        assert mobe.report.n_bytes < original.report.n_bytes
        assert mobe.report.original_params == original.report.n_params
        # n 24, m 6, p = r = 96, d 256: gate and up keep r/d + m/n = 62.5 %, and the mix
        assert mobe.expert_params / original.expert_params == pytest.approx((2 * 0.625 + 1) / 3, abs=1e-3)


def test_perplexities(done: demo.Demo):
    """A model with its experts swapped or its mix misread is far worse than token frequencies are."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    heldout = (MODEL.parent / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    calibration = (MODEL.parent / "calibration.txt").read_text(encoding="utf-8")
    counts = Counter(tokenizer.encode(calibration).ids)
    total = sum(counts.values()) + tokenizer.get_vocab_size()
    ids = tokenizer.encode(heldout).ids
    unigram = math.exp(-sum(math.log((counts[i] + 1) / total) for i in ids) / len(ids))
    for file in done.files:
        assert math.isfinite(file.perplexity) and 1 < file.perplexity < unigram / 2, file
    original, mobe = by_quant(done)[demo.MODEL, "f16"], by_quant(done)[demo.MOBE, "f16"]
    assert mobe.perplexity < 1.5 * original.perplexity
    assert 0 < done.error < 0.3


def test_texts_and_table(done: demo.Demo):
    shown = [file for file in done.files if file.text]
    assert [(file.model, file.quant) for file in shown] == list(demo.SHOWN)
    for file in shown:
        assert file.text.startswith(demo.PROMPT) and len(file.text) > len(demo.PROMPT) + 5
        assert file.speed is not None and file.speed > 0
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(demo.render(done))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    for file in done.files:
        (line,) = [line for line in lines if line.startswith(f"{file.path.name} ")]
        assert f"{file.perplexity:.2f}" in line and f"{file.report.n_bytes / 1e6:.2f}" in line


def test_the_file_runs_in_python(done: demo.Demo):
    from llama_cpp import Llama

    llama = Llama(str(done.files[-1].path), n_ctx=64, n_threads=1, verbose=False)
    assert llama(demo.PROMPT, max_tokens=4, temperature=0)["choices"][0]["text"]


def test_factors_are_kept_or_made_anew(tmp_path: Path):
    out = tmp_path / "mobe"

    def is_kept(steps: int) -> bool:
        demo.factorize(MODEL, out, Options(bases=6, steps=steps, layers=(0,), projections=("up",)))
        kept = (out / "here before").exists()
        (out / "here before").touch()
        return kept

    assert not is_kept(1)
    assert is_kept(1)
    assert not is_kept(2)
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["mobe"]["settings"]["steps"] == 2


def test_what_is_not_ours_stays(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MobeError, match="in the way"):
        demo.factorize(MODEL, tmp_path, QUICK.options())
    assert (tmp_path / "config.json").exists()


def test_without_runtime_the_message_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mobe_gguf.runtime.install import Environment

    monkeypatch.setattr(Environment, "active", classmethod(lambda cls: cls.at(tmp_path / "nothing")))
    result = CliRunner().invoke(main, ["demo", str(tmp_path / "demo")])
    assert result.exit_code == 1 and result.output.strip().endswith("run mobe-gguf build")
    assert not (tmp_path / "demo").exists()


def test_a_program_that_fails_is_quoted(tmp_path: Path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(MobeError, match=r"llama-completion -m .*broken\.gguf .* failed \(exit code 1\):\n"):
        demo.complete(tmp_path / "broken.gguf", 1)
