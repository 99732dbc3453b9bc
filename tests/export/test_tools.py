"""llama.cpp's own programs on MoBE files, beside those of ``parity/test_tools.py``: quantize, imatrix, split and merge,
bench, perplexity, server, and where weights are put."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from export.handmade import make_mobe
from mobe_gguf import runtime
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.export import Recipe, export, parse_quant
from mobe_gguf.formats.gguf import GgufFile, read_gguf

TOKENS = list(range(5, 45))


def run(tool: str, *options: Any) -> str:
    """Standard output and errors of one of the programs, which must end well."""
    command = [runtime.tool(tool), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools")
    (path / "text.txt").write_text(tiny.TEXT * 8)
    return path


@pytest.fixture(scope="module")
def checkpoint(model: Callable[..., Path], folder: Path) -> Path:
    """In float16, so that a GGUF file in f16 loses nothing; two groups, rows of whole blocks of 256; down as well."""
    sizes = dict(hidden_size=256, moe_intermediate_size=256, head_dim=64, num_experts=4, num_hidden_layers=2)
    return make_mobe(
        model("qwen3_moe", **sizes),
        folder / "mobe",
        m=4,
        g=2,
        dtype=torch.float16,
        projections=ALL_PROJECTIONS,
    )


@pytest.fixture(scope="module")
def f16(checkpoint: Path, folder: Path) -> Path:
    export(checkpoint, folder / "f16.gguf", Recipe("f16"), quiet=True)
    return folder / "f16.gguf"


def data(file: GgufFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return np.fromfile(file.path, np.uint8, info.n_bytes, offset=info.offset)


def same_tensors(ours: Path, theirs: Path) -> None:
    a, b = read_gguf(ours), read_gguf(theirs)
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert a.tensors[name].type == b.tensors[name].type, name
        np.testing.assert_array_equal(data(a, name), data(b, name), err_msg=name)


def logits(path: Path, **options: Any) -> np.ndarray:
    """``[len(TOKENS), vocabulary]``"""
    from llama_cpp import Llama

    options |= dict(n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    with closing(Llama(str(path), **options)) as llama:
        llama.eval(TOKENS)
        return llama.scores[: len(TOKENS)].copy()


def distance(truth: np.ndarray, got: np.ndarray) -> float:
    """Squared error over the squared truth."""
    assert np.isfinite(got).all()
    return float(np.square(got - truth).sum() / np.square(truth).sum())


@pytest.mark.parametrize("quant", ["q4_k", "q8_0"])
def test_quantize(quant: str, checkpoint: Path, f16: Path, tmp_path: Path) -> None:
    """The f16 file to another type: what export writes in that type at once."""
    run("llama-quantize", f16, tmp_path / "theirs.gguf", quant.upper(), 1)
    export(checkpoint, tmp_path / "ours.gguf", Recipe(parse_quant(quant)), refit=False, quiet=True)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    tensors = read_gguf(tmp_path / "theirs.gguf").tensors
    assert {t.type for n, t in tensors.items() if n.endswith(".mix")} == {"f32"}
    assert read_gguf(tmp_path / "theirs.gguf").keys["qwen3moe.mobe.group_count"] == 2
    # 0.003 and 0.26 measured: random weights, and now and then another expert is chosen
    error = distance(logits(f16), logits(tmp_path / "theirs.gguf"))
    assert 0 < error < {"q8_0": 0.02, "q4_k": 0.6}[quant], error


def test_quantize_dry_run(checkpoint: Path, f16: Path) -> None:
    """Its plan is export's."""
    said = run("llama-quantize", "--dry-run", f16, "Q4_K")
    types = dict(re.findall(r"\] (\S+) +- .*\((\w+)\)$", said, re.M))
    report = export(checkpoint, f16.with_name("x.gguf"), Recipe("q4_k_m"), dry_run=True, quiet=True)
    changed = {e.name: e.type for e in report.entries if e.type not in ("f16", "f32")}
    assert {name: t.lower() for name, t in types.items()} == changed and not f16.with_name("x.gguf").exists()
    megabytes = float(re.search(r"quant size += +([0-9.]+) MiB", said)[1])  # type: ignore[index]
    assert abs(megabytes - report.data_bytes / 2**20) < 0.01


def test_quantize_with_imatrix(checkpoint: Path, f16: Path, folder: Path, tmp_path: Path) -> None:
    """Collected on the MoBE file, even a quantized one, and used for it: by the tool as by export."""
    run("llama-quantize", f16, tmp_path / "q8_0.gguf", "Q8_0", 1)
    imatrix = tmp_path / "imatrix.gguf"
    options = ("-f", folder / "text.txt", "-c", 32, "--chunks", 4, "-t", 1, "-o", imatrix)
    run("llama-imatrix", "-m", tmp_path / "q8_0.gguf", *options)
    run("llama-quantize", "--imatrix", imatrix, f16, tmp_path / "theirs.gguf", "Q4_K", 1)
    recipe = Recipe("q4_k_m", imatrix=(str(imatrix),))
    export(checkpoint, tmp_path / "ours.gguf", recipe, refit=False, quiet=True)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_split_and_merge(f16: Path, tmp_path: Path) -> None:
    run("llama-gguf-split", "--split", "--split-max-size", "1M", f16, tmp_path / "split")
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 2
    run("llama-gguf-split", "--merge", parts[0], tmp_path / "merged.gguf")
    same_tensors(tmp_path / "merged.gguf", f16)
    np.testing.assert_array_equal(logits(parts[0]), logits(f16))


def test_bench(f16: Path) -> None:
    command = [
        runtime.tool("llama-bench"),
        "-m",
        f16,
        "-p",
        "8",
        "-n",
        "2",
        "-r",
        "1",
        "-t",
        "1",
        "-o",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    results = json.loads(done.stdout)
    assert [(r["n_prompt"], r["n_gen"]) for r in results] == [(8, 0), (0, 2)]
    file = read_gguf(f16)
    assert all(r["avg_ts"] > 0 for r in results)
    assert results[0]["model_n_params"] == sum(int(np.prod(t.shape)) for t in file.tensors.values())
    assert results[0]["model_size"] == sum(t.n_bytes for t in file.tensors.values())


PLACEMENTS = {
    "cpu-moe": ["--cpu-moe"],
    "n-cpu-moe": ["--n-cpu-moe", "1"],
    "ot": ["-ot", r"ffn_(gate|up|down)_basis=CPU"],
}


def perplexity(f16: Path, folder: Path, *options: str) -> tuple[str, str]:
    """The running estimates, and all that was said."""
    said = run(
        "llama-perplexity",
        "-m",
        f16,
        "-f",
        folder / "text.txt",
        "-c",
        32,
        "-b",
        64,
        "--chunks",
        4,
        "-t",
        1,
        *options,
    )
    return re.search(r"\[1\][0-9.]+,.*\[4\][0-9.]+", said)[0], said  # type: ignore[index]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_is_accepted_and_changes_no_number(placement: str, f16: Path, folder: Path) -> None:
    numbers, said = perplexity(f16, folder, *PLACEMENTS[placement], "--fit", "off", "-v")
    assert numbers == perplexity(f16, folder)[0]
    moved = set(re.findall(r"tensor (\S+) \(.*buffer type overridden to CPU", said))
    names = {name for name in read_gguf(f16).tensors}
    wanted = {
        "cpu-moe": {n for n in names if "_exps." in n},
        "n-cpu-moe": {n for n in names if "_exps." in n and n.startswith("blk.0.")},
        "ot": {n for n in names if "_basis." in n},
    }
    assert moved == wanted[placement]


def test_fit(f16: Path, folder: Path) -> None:
    """The projection counts the factors: their bytes, and no more than a few MiB of cache and buffers besides."""
    _, said = perplexity(f16, folder, "--fit", "on", "-v")
    projected = int(re.search(r"projected to use (\d+) MiB", said)[1])  # type: ignore[index]
    weights = sum(t.n_bytes for t in read_gguf(f16).tensors.values()) / 2**20
    assert weights - 1 <= projected <= weights + 8 and "successfully fit" in said


@pytest.mark.parametrize(
    "options",
    [dict(cpu_moe=True), dict(n_cpu_moe=1), dict(override_tensor={r"ffn_up_basis": "CPU"})],
    ids=lambda options: next(iter(options)),
)
def test_llama_cpp_takes_placements(options: dict[str, Any], f16: Path) -> None:
    np.testing.assert_array_equal(logits(f16, **options), logits(f16))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(override_tensor={"exps": "GPU9"}), "known: .*CPU"),
        (dict(n_cpu_moe=-1), "number of layers, got -1"),
    ],
)
def test_llama_cpp_explains_wrong_placements(options: dict[str, Any], words: str, f16: Path) -> None:
    with pytest.raises(ValueError, match=words):
        logits(f16, **options)


def test_experts_used(checkpoint: Path, f16: Path, tmp_path: Path) -> None:
    """What llama.cpp does with the key when a user overrides it, written into the file."""
    export(checkpoint, tmp_path / "three.gguf", Recipe("f16"), experts_used=3, quiet=True)
    keys = read_gguf(tmp_path / "three.gguf").keys
    assert keys == read_gguf(f16).keys | {"qwen3moe.expert_used_count": 3}
    got = logits(tmp_path / "three.gguf")
    np.testing.assert_array_equal(got, logits(f16, kv_overrides={"qwen3moe.expert_used_count": 3}))
    assert distance(logits(f16), got) > 0


def test_experts_used_of_groups(model: Callable[..., Path], tmp_path: Path) -> None:
    """Eight experts in two groups, of which a token uses one: four are the most."""
    source, options = model("deepseek_v3"), dict(allow_dense=True, dry_run=True, quiet=True)
    export(source, tmp_path / "x", Recipe("f32"), experts_used=4, **options)
    for k in (0, 5):
        with pytest.raises(UsageError, match=f"--experts-used {k}: expected 1 to 4, .* 1 of 2 groups of 4"):
            export(source, tmp_path / "x", Recipe("f32"), experts_used=k, **options)


@contextmanager
def server(model: Path) -> Iterator[str]:
    """A ``llama-server`` on a free port of this machine; yields its address."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["-m", model, "--host", "127.0.0.1", "--port", port, "-c", 64, "-t", 1, "-np", 1]
    log = model.with_name("server.log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            [str(o) for o in (runtime.tool("llama-server"), *options)], stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_server(f16: Path) -> None:
    question = json.dumps(
        {"prompt": TOKENS, "n_predict": 3, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    )
    with server(f16) as address:
        request = urllib.request.Request(
            f"{address}/completion", question.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    assert len(answer["tokens"]) == 3 and answer["tokens_evaluated"] == len(TOKENS)
    best = logits(f16)[-1]
    best[0] = -np.inf  # the end of text, which was to be ignored
    assert answer["tokens"][0] == int(best.argmax())
