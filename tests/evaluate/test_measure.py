"""Real runs of llama-perplexity: its numbers against an own computation, and what is refused before and during."""

from __future__ import annotations

import os
import struct
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from mobe_gguf import evaluate
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate import EvalSettings, Row, logits, report, tool
from mobe_gguf.evaluate.facts import facts_of
from mobe_gguf.evaluate.vocabulary import count_tokens, read_vocabulary
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.runtime.install import Environment

SETTINGS = EvalSettings(ctx=64, chunks=16, threads=1)


@pytest.fixture(scope="module")
def rows(files: dict[str, Path], text: Path) -> dict[str, Row]:
    seen: list[Row] = []
    names = ("q2_k", "q8_0", "mobe", "f16")
    paths = [files[name] for name in names]
    found = evaluate.compare(files["f16"], paths, text, SETTINGS, quiet=True, on_row=seen.append)
    assert found == seen and [row.facts.path for row in found] == paths
    return dict(zip(names, found, strict=True))


def test_order(rows: dict[str, Row]):
    kl = {name: row.divergence.kl.value for name, row in rows.items()}
    assert kl["f16"] < kl["q8_0"] < kl["q2_k"] / 5 and kl["q2_k"] < kl["mobe"] / 5  # its factors are noise
    assert rows["q8_0"].divergence.top1.value > rows["q2_k"].divergence.top1.value
    for row in rows.values():
        d, p = row.divergence, row.divergence.percentiles
        assert row.chunks == 16 and row.scored == 16 * 31 and row.seconds > 0
        assert p["Minimum"] <= p["Median"] <= p["99.0%"] <= p["Maximum"]
        assert d.ratio.value == pytest.approx(d.perplexity.value / d.reference.value, rel=1e-4)
        assert 0 <= d.delta_p.value <= 1 and 0 <= d.top1.value <= 1


def test_reference_against_itself(rows: dict[str, Row]):
    """Not exactly zero: the reference's logits are kept in 16 bits."""
    d = rows["f16"].divergence
    assert abs(d.kl.value) < 1e-5 and d.percentiles["Maximum"] < 1e-3
    assert d.top1.value == 1 and d.delta_p.value < 1e-4
    assert d.ratio.value == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("name", "rel"), [("mobe", 0.04), ("q2_k", 0.06)])
def test_numbers_are_those_of_an_own_computation(name, rel, files, text, rows):
    """Other batches mean other orders of sums, which now and then choose another expert.  q2_k is near the reference, so
    that is a larger part of its distance."""
    reference, tokens = log_probabilities(files["f16"], text)
    own, _ = log_probabilities(files[name], text)
    kl = (np.exp(reference) * (reference - own)).sum(-1).ravel()
    own_next, reference_next = (
        np.take_along_axis(a, tokens[..., None], -1).ravel() for a in (own, reference)
    )
    d = rows[name].divergence
    assert d.kl.value == pytest.approx(kl.mean(), rel=rel)
    assert d.kl.error == pytest.approx(kl.std(ddof=1) / len(kl) ** 0.5, rel=rel)
    assert d.percentiles["Median"] == pytest.approx(np.median(kl), rel=rel)
    assert d.percentiles["90.0%"] == pytest.approx(np.quantile(kl, 0.9), rel=rel)
    assert np.log(d.perplexity.value) == pytest.approx(-own_next.mean(), rel=0.01)
    assert np.log(d.reference.value) == pytest.approx(-reference_next.mean(), rel=0.001)
    rms = np.sqrt(((np.exp(own_next) - np.exp(reference_next)) ** 2).mean())
    assert d.delta_p.value == pytest.approx(rms, rel=rel)
    assert d.top1.value == pytest.approx((own.argmax(-1) == reference.argmax(-1)).mean(), abs=0.01)


def log_probabilities(path: Path, text: Path) -> tuple[np.ndarray, np.ndarray]:
    """[chunks, evaluated tokens, vocabulary] of each chunk's second half, and the tokens that follow."""
    from llama_cpp import Llama

    ctx, chunks = SETTINGS.ctx, SETTINGS.chunks
    first = ctx // 2
    values, following = [], []
    with closing(
        Llama(str(path), n_ctx=ctx, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)
    ) as model:
        tokens = model.tokenize(text.read_bytes().removesuffix(b"\n"), add_bos=False)
        assert len(tokens) == count_tokens(path, text.read_bytes())
        for i in range(chunks):
            chunk = tokens[i * ctx : (i + 1) * ctx]
            model.reset()
            model.eval(chunk)
            scores = model.scores[first : ctx - 1].astype(np.float64)
            scores = scores - scores.max(-1, keepdims=True)
            values.append(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
            following.append(chunk[first + 1 :])
    return np.stack(values), np.array(following)


def test_perplexity(files: dict[str, Path], text: Path, rows: dict[str, Row]):
    found = evaluate.perplexity(files["q2_k"], text, SETTINGS)
    assert found.value == pytest.approx(rows["q2_k"].divergence.perplexity.value, rel=1e-4)
    assert found.error == pytest.approx(rows["q2_k"].divergence.perplexity.error, rel=1e-3)


def test_facts(files: dict[str, Path], rows: dict[str, Row]):
    for name, path in files.items():
        facts = rows[name].facts
        assert facts.n_bytes == path.stat().st_size and facts.factorized is (name == "mobe")
        assert facts.original_params == rows["f16"].facts.n_params
    assert rows["f16"].facts.bits_per_weight == pytest.approx(16, abs=0.1)
    mobe = rows["mobe"].facts
    assert mobe.bits_per_weight > mobe.bits_per_original_weight and mobe.n_params < mobe.original_params


def test_split_files_count_as_one(files: dict[str, Path], tmp_path: Path):
    split = ("--split", "--split-max-tensors", "20", str(files["q2_k"]), str(tmp_path / "part"))
    tool.run("llama-gguf-split", *split)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    whole, found = facts_of(files["q2_k"]), facts_of(parts[0])
    assert len(parts) > 2 and found.n_bytes == sum(part.stat().st_size for part in parts)
    assert (found.n_params, found.tensor_bytes) == (whole.n_params, whole.tensor_bytes)
    with pytest.raises(MobeError, match="name the first part, as .*-00001-of-"):
        facts_of(parts[1])
    parts[2].unlink()
    with pytest.raises(MobeError, match="part-00003.* cannot be read"):
        facts_of(parts[0])


def test_remarks_on_what_is_compared(files, text, monkeypatch, capsys):
    """Another beginning of texts, and chunks longer than the model was trained on."""
    other = replace(read_vocabulary(files["q8_0"]), begin=7)
    vocabulary = {files["f16"]: read_vocabulary(files["f16"]), files["q8_0"]: other}
    monkeypatch.setattr("mobe_gguf.evaluate.measure.read_vocabulary", vocabulary.get)
    evaluate.compare(files["f16"], [files["q8_0"]], text, EvalSettings(2050, 1, 1))
    said = "".join(capsys.readouterr().err.split())
    assert "q8_0.ggufbeginsatextwithtoken7," in said
    assert "wastrainedon2048atmost;askfor--ctx2048" in said


def test_logging_variables_of_the_user_do_not_matter(files, text, monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_LOG_JSONL", "1")
    (row,) = evaluate.compare(files["f16"], [files["q8_0"]], text, EvalSettings(64, 4, 1), quiet=True)
    assert row.divergence.perplexity.value > 1


# the reference's logits


def test_logits_are_kept_or_removed(files, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    short = EvalSettings(ctx=64, chunks=4, threads=1)
    evaluate.compare(files["q8_0"], [], text, short, quiet=True)
    assert not list(tmp_path.iterdir())
    evaluate.compare(files["q8_0"], [], text, short, keep_logits=tmp_path / "kept", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    layout = logits.LogitsLayout(len(read_vocabulary(files["q8_0"]).tokens), 64, 4)
    layout.check(tmp_path / "kept", signed=True)
    with open(tmp_path / "kept", "rb+") as file:
        file.truncate(layout.n_bytes - 1)
    with pytest.raises(MobeError, match="Is the disk full"):
        layout.check(tmp_path / "kept")


def test_kept_logits_serve_the_same_run_only(files, text, tmp_path, monkeypatch):
    """llama-perplexity itself takes context, chunks and tokens from the file and asks for no more."""
    kept, short = tmp_path / "kept", EvalSettings(ctx=64, chunks=4, threads=1)
    evaluate.compare(files["f16"], [], text, short, keep_logits=kept, quiet=True)
    (row,) = evaluate.compare(
        files["f16"], [files["q2_k"]], text, short, keep_logits=kept, reuse_logits=True, quiet=True
    )
    assert row.divergence.kl.value > 0.001
    again = dict(keep_logits=kept, reuse_logits=True)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[100:])
    for what, reference, its_text, settings in (
        ("another reference", files["q8_0"], text, short),
        ("another text", files["f16"], other, short),
        ("another settings", files["f16"], text, replace(short, options=("-ngl", "0"))),
        ("Is the disk full", files["f16"], text, replace(short, chunks=5)),
    ):
        assert what in refused(monkeypatch, reference, [files["q2_k"]], its_text, settings, **again)
    with open(kept, "rb+") as file:
        file.truncate(logits.LogitsLayout(len(read_vocabulary(files["q8_0"]).tokens), 64, 4).n_bytes)
    assert "is not noted" in refused(monkeypatch, files["f16"], [files["q2_k"]], text, short, **again)


def test_a_model_against_itself_whatever_the_environment_says(files, text, monkeypatch):
    """Flash attention, batch and cache are the same in both runs; what is left is what a figure cannot be better than."""
    monkeypatch.setenv("LLAMA_ARG_UBATCH", "32")
    monkeypatch.setenv("LLAMA_ARG_CACHE_TYPE_K", "q8_0")
    monkeypatch.setenv("LLAMA_ARG_FLASH_ATTN", "off")
    (row,) = evaluate.compare(files["f16"], [files["f16"]], text, EvalSettings(64, 8, 1), quiet=True)
    assert abs(row.divergence.kl.value) < 5 * 10.0 ** -(report.FLOOR_DIGITS + 1)
    assert report.with_error(row.divergence.kl) in ("0.0000 ± 0.0000", "0.00000 ± 0.00000")


@pytest.mark.parametrize("keep", [False, True])
def test_no_room_is_said_before_anything_runs(files, text, tmp_path, monkeypatch, keep):
    monkeypatch.setattr(logits.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(tool, "run", never)
    with pytest.raises(MobeError, match="logits take 1.02 MB, 1.00 kB are free"):
        kept = tmp_path / "kept" if keep else None
        evaluate.compare(files["q8_0"], [files["q2_k"]], text, SETTINGS, keep_logits=kept, quiet=True)


def never(*_: object, **__: object) -> None:
    raise AssertionError("it ran")


# refused before anything runs


def refused(monkeypatch, reference, paths, text, settings=SETTINGS, **options) -> str:
    monkeypatch.setattr(tool, "run", never)
    with pytest.raises(MobeError) as caught:
        evaluate.compare(reference, paths, text, settings, quiet=True, **options)
    return caught.value.message


def test_other_vocabularies(files, text, tmp_path, monkeypatch):
    other = tiny.make_model("qwen3_moe", tmp_path / "model")
    export(other, tmp_path / "other.gguf", Recipe(parse_quant("f16")), allow_dense=True, quiet=True)
    message = refused(monkeypatch, files["f16"], [files["q8_0"], tmp_path / "other.gguf"], text)
    assert "other.gguf" in message and "it has 384 tokens, the reference 1024" in message

    tokens = read_vocabulary(files["q2_k"]).tokens
    at = next(i for i, token in enumerate(tokens) if len(token) > 4 and token.isalpha() and token.isascii())
    old, data = struct.pack("<Q", len(tokens[at])) + tokens[at], files["q2_k"].read_bytes()
    assert old in data
    (tmp_path / "same-size.gguf").write_bytes(data.replace(old, old[:8] + tokens[at].swapcase(), 1))
    message = refused(monkeypatch, files["f16"], [tmp_path / "same-size.gguf"], text)
    name = tokens[at].decode()
    assert f"token {at} is '{name.swapcase()}', in the reference '{name}'" in message


def test_texts_and_settings(files, text, tmp_path, monkeypatch):
    def message(settings: EvalSettings, path: Path = text) -> str:
        return refused(monkeypatch, files["f16"], [files["q8_0"]], path, settings)

    n_tokens = count_tokens(files["f16"], text.read_bytes())
    there = n_tokens // 64
    assert f"{n_tokens} tokens, {there} chunks of 64, but {(there + 1) * 64} are needed" in message(
        EvalSettings(64, there + 1)
    )
    assert f"but {2 * n_tokens} are needed for 2 chunks" in message(EvalSettings(n_tokens))
    assert "93 tokens would be evaluated, at least 100 are needed: --chunks 4" in message(EvalSettings(64, 3))
    assert "expected at least 4 tokens and 1 chunk" in message(EvalSettings(2))
    assert "expected at least 4 tokens and 1 chunk" in message(EvalSettings(64, 0))
    assert "no-such.txt: cannot be read: No such file" in message(SETTINGS, tmp_path / "no-such.txt")
    with pytest.raises(UsageError):
        evaluate.perplexity(files["f16"], text, EvalSettings(64, 3))


def test_files_that_are_none(files, text, tmp_path, monkeypatch):
    (tmp_path / "text.gguf").write_text("no GGUF, but long enough to be one")
    assert "not a GGUF file" in refused(monkeypatch, files["f16"], [tmp_path / "text.gguf"], text)
    assert "cannot be read" in refused(monkeypatch, tmp_path / "nothing.gguf", [files["f16"]], text)
    kept = tmp_path / "none" / "kept"
    message = refused(monkeypatch, files["f16"], [files["f16"]], text, keep_logits=kept)
    assert f"{kept}: there is no directory" in message
    os.mkfifo(tmp_path / "pipe")
    message = refused(monkeypatch, files["f16"], [files["f16"]], text, keep_logits=tmp_path / "pipe")
    assert "pipe: it is a pipe, expected a file or none" in message
    monkeypatch.setattr(Environment, "active", classmethod(lambda cls: cls.at(tmp_path / "nowhere")))
    assert "run mobe-gguf build" in refused(monkeypatch, files["f16"], [files["f16"]], text)


# failures of the program


def test_output_that_is_not_understood(files, text, monkeypatch):
    run = tool.run

    def changed(name: str, *arguments: str, on_stdout=None) -> tool.Finished:
        done = run(name, *arguments, on_stdout=on_stdout)
        return tool.Finished(done.stdout.replace("Mean    KLD", "Average KLD"), done.stderr)

    monkeypatch.setattr(tool, "run", changed)
    settings = EvalSettings(ctx=64, chunks=4, threads=1)
    with pytest.raises(MobeError) as caught:
        evaluate.compare(files["q8_0"], [files["q2_k"]], text, settings, quiet=True)
    assert "q2_k.gguf: it printed no value of kl after 4 of 4 chunks:\n" in caught.value.message
    assert "kl_divergence: computing over 4 chunks" in caught.value.message


def test_a_program_that_fails_is_quoted(files, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(MobeError, match=r"broken\.gguf .*failed \(exit code 1\):\n(.*\n)+.*mobe-gguf build"):
        tool.run("llama-perplexity", "-m", str(tmp_path / "broken.gguf"), "-f", str(tmp_path / "none"))
