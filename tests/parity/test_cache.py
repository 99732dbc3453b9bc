"""``--mobe-cache`` in llama.cpp's programs and in scripts: the same tokens with every size, and without it what was before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from export.handmade import make_mobe

from mobe_gguf import runtime
from mobe_gguf.core import resources
from mobe_gguf.export import Recipe, export, parse_quant

#: Bytes of one matrix of 96 x 256 in q8_0, and what goes with it: the model has 4 layers of gate and up, 24 experts.
EACH = 96 * 272 + 600
ALL = 24 * EACH * 8


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """The shipped model with random experts."""
    folder = tmp_path_factory.mktemp("cache")
    mobe = make_mobe(resources.path("models") / "tiny-moe", folder / "mobe", m=6)
    export(mobe, folder / "mobe.gguf", Recipe(parse_quant("q4_k")), quiet=True)
    return folder / "mobe.gguf"


def open_model(path: Path, mobe_cache: int = 0):
    runtime.lib_dir()
    from llama_cpp import Llama

    options = dict(n_ctx=128, n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    return Llama(str(path), mobe_cache=mobe_cache, **options)


def scores(path: Path, mobe_cache: int, n: int = 24) -> np.ndarray:
    """Logits of a prompt of 40 tokens in one call, then of ``n`` more, one by one."""
    with closing(open_model(path, mobe_cache)) as model:
        tokens = model.tokenize((resources.path("models") / "heldout.txt").read_bytes()[:2000], add_bos=False)
        model.eval(tokens[:40])
        for token in tokens[40 : 40 + n]:
            model.eval([token])
        return model.scores[: 40 + n].copy()


def test_every_size_gives_the_same(gguf):
    sizes = [8 * EACH, 40 * EACH, ALL]
    found = [scores(gguf, size) for size in sizes]
    assert all(np.array_equal(found[0], other) for other in found[1:])
    plain = scores(gguf, 0)
    # the prompt does without it; the tokens after it are rounded to 8 bits once more
    assert np.array_equal(plain[:40], found[0][:40])
    changed = ((found[0] - plain)[40:] ** 2).sum(1) / (plain[40:] ** 2).sum(1)
    # (experts of random numbers pass every rounding on, tenfold and more: the operator alone is held to 2e-4)
    assert 0 < np.median(changed) < 2e-2


def test_contexts_have_caches_of_their_own(gguf):
    """Two at once, in two threads: neither sees the other's matrices."""
    expected = scores(gguf, 16 * EACH)
    found: dict[int, np.ndarray] = {}
    workers = [
        threading.Thread(target=lambda i=i: found.update({i: scores(gguf, 16 * EACH)})) for i in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(expected, found[i]) for i in range(2))


@pytest.mark.parametrize("size", [-1, 1.5, "2M", None])
def test_what_is_no_number_of_bytes_in_a_script(gguf, size):
    with pytest.raises(ValueError, match=f"mobe_cache is a number of bytes, such as .*, got {size!r}"):
        open_model(gguf, size)


def complete(gguf: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ} | variables
    command = [
        runtime.tool("llama-completion"),
        "-m",
        gguf,
        "-p",
        "And God said",
        "-n",
        "16",
        "-c",
        "64",
        "-t",
        "1",
    ]
    fixed = ("--temp", "0", "-no-cnv", "--ignore-eos", "-v")
    return subprocess.run(
        [*command, *fixed, *options], capture_output=True, text=True, errors="replace", env=env, timeout=120
    )


def test_the_option_and_its_variable(gguf):
    texts = set()
    for options, variables in (
        (("--mobe-cache", "300K"), {}),
        (("--mobe-cache", "1G"), {}),
        ((), {"LLAMA_ARG_MOBE_CACHE": "1.5M"}),
    ):
        done = complete(gguf, *options, **variables)
        assert done.returncode == 0, done.stderr[-2000:]
        assert re.search(r"MiB: \d+ formed matrices for each of 8 projections", done.stderr), done.stderr[
            -3000:
        ]
        texts.add(done.stdout)
    # the program may end before it has printed its last words
    shortest = min(texts, key=len)
    assert len(shortest) > len("And God said") + 8 and all(
        text.startswith(shortest.rstrip()) for text in texts
    )


def test_too_small_and_of_no_use_is_said(gguf, tmp_path):
    assert "hold no matrix of each" in complete(gguf, "--mobe-cache", "10K").stderr
    mobe = make_mobe(resources.path("models") / "tiny-moe", tmp_path / "mobe", m=6, activation="none")
    export(mobe, tmp_path / "none.gguf", Recipe(parse_quant("q4_k")), quiet=True)
    assert "of no use" in complete(tmp_path / "none.gguf", "--mobe-cache", "10M").stderr


@pytest.mark.parametrize("size", ["much", "-5", "3Q", "", "nan"])
def test_a_size_that_is_none(gguf, size):
    done = complete(gguf, "--mobe-cache", size)
    assert done.returncode != 0 and "no size" in done.stderr + done.stdout


def test_llama_bench(gguf):
    command = [runtime.tool("llama-bench"), "-m", gguf, "-p", "0", "-n", "4", "-r", "1", "-t", "1", "-v"]
    done = subprocess.run([*command, "--mobe-cache", "2M"], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0 and "formed matrices for each of 8" in done.stderr, done.stderr[-2000:]


def test_hits_are_counted_in_the_log(gguf):
    """By the library, when the context goes: in a process of its own, whose messages are read."""
    code = f"""
from llama_cpp import Llama
model = Llama({str(gguf)!r}, n_ctx=64, n_threads=1, mobe_cache={ALL}, verbose=True)
for token in (5, 6, 7, 8, 5, 6, 7, 8):
    model.eval([token])
model.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = re.search(r"(\d+) matrices asked for, (\d+) of them found", done.stderr)
    assert found, done.stderr[-2000:]
    assert int(found[1]) == 8 * 8 * 4 and 0 < int(found[2]) < int(found[1])
