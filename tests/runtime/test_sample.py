"""What the runtime's own text is: documents, tokens that are never drawn, the same text for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mobe_gguf.core import resources
from mobe_gguf.core.errors import MobeError
from mobe_gguf.export import Recipe, export
from mobe_gguf.runtime.apart import run_apart
from mobe_gguf.runtime.sample import Documents, Sampling, Writer, sample, write

SETTINGS = Sampling(tokens=400, ctx=32, parallel=4, threads=1, seed=3)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, built: None) -> Path:
    out = tmp_path_factory.mktemp("sample") / "q8_0.gguf"
    export(resources.path("models") / "tiny-moe", out, Recipe("q8_0"), dense=True, quiet=True)
    return out


def test_documents_end_where_they_should():
    found = Documents(Sampling(tokens=12, ctx=4, parallel=2, seed=1), start=[90], first=range(5, 9))
    first = [document[0] for document in found.open]
    assert set(first) <= set(range(5, 9)) and found.tokens == 2
    assert not found.put(0, 1)
    assert found.put(0, 2), "the start takes one of the four places"
    assert found.put(1, None), "the model ended it"
    assert found.done == [[first[0], 1, 2], [first[1]]]
    assert found.tokens == 6 and not found.enough
    assert found.all()[:2] == found.done and len(found.all()) == 4


def test_first_tokens_follow_the_seed():
    def first(seed: int) -> list[list[int]]:
        return Documents(Sampling(parallel=8, seed=seed), [], range(1000)).open

    assert first(1) == first(1) != first(2)


def test_same_seed_same_text(file: Path):
    told: list[int] = []
    one = sample(file, SETTINGS, told.append)
    assert one == sample(file, SETTINGS)
    assert one.documents != sample(file, replace(SETTINGS, seed=4)).documents
    assert 400 <= one.tokens < 400 + SETTINGS.parallel
    assert told == sorted(told) and told[-1] == one.tokens
    assert len(one.documents) >= 400 / 32 and all(one.documents)


def test_sequences_do_not_see_each_other(file: Path):
    """The same logits, but for rounding, alone and beside others, after what was in its place before."""

    def logits(beside: int) -> np.ndarray:
        writer = Writer(str(file), SETTINGS)
        rng = np.random.default_rng(beside)
        others = rng.integers(0, 1000, (8, 3)).tolist()
        writer.run([(0, others[place][:2]) for place in range(4)])  # forgotten
        for step, token in enumerate([77, 345, 12, 600]):
            parts = [(step, [others[place + 4][step % 3]]) for place in range(4)]
            last = writer.run([*parts[:1], (step, [token]), *parts[2:]])
        return np.ctypeslib.as_array(writer.lib.llama_get_logits_ith(writer.context, last[1]), (1024,)).copy()

    one, other = logits(1), logits(2)
    assert np.abs(one - other).max() < 1e-3 * np.abs(one).max()


def test_what_is_forbidden_is_never_drawn(file: Path):
    """A model that would otherwise write what is forbidden in every second place: half of the vocabulary."""
    writer = Writer(str(file), SETTINGS)
    forbidden = list(range(0, 1024, 2))
    with writer.samplers(forbidden) as samplers, writer.samplers([]) as free:
        drawn, otherwise = [], []
        for _ in range(100):
            at = writer.run([(0, [77]), (0, [78]), (0, [79]), (0, [80])])
            drawn += [
                writer.lib.llama_sampler_sample(s, writer.context, i)
                for s, i in zip(samplers, at, strict=True)
            ]
            otherwise.append(writer.lib.llama_sampler_sample(free[0], writer.context, at[0]))
    assert all(token % 2 for token in drawn) and any(token % 2 == 0 for token in otherwise)


def test_no_control_tokens(file: Path):
    writer = Writer(str(file), SETTINGS)
    documents = write(writer, SETTINGS, lambda done: None)
    assert not any(writer.ends(token) for document in documents.all() for token in document)
    assert writer.text([1023]) == "", "the end token has no text"
    assert all(len(document) <= 32 for document in documents.all())


def test_half_a_character_is_left_out(file: Path):
    writer = Writer(str(file), SETTINGS)
    part = next(t for t in range(256) if writer.text([t]) == "")
    assert writer.text([part, 77, part]) == writer.text([77]) != ""


def test_reasons(file: Path, tmp_path: Path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(MobeError, match=r"broken.gguf: the runtime does not run this file: .*rror"):
        sample(broken, SETTINGS)
    with pytest.raises(MobeError, match="ended with code|rror"):
        run_apart("mobe_gguf.runtime.sample", file, "no json", out=tmp_path / "none.json")


def test_an_exception_ends_the_program(file: Path, tmp_path: Path):
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(file, replace(SETTINGS, tokens=1_000_000, ctx=512), stop)
