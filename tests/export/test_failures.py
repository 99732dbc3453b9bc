"""What goes wrong: the message, the exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from models.editing import edit_config, edit_tensors
from safetensors.torch import load_file, save_file

from export.handmade import make_mobe
from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError
from mobe_gguf.export import Recipe, export, write
from mobe_gguf.export.refit import BLOCK_BYTES
from mobe_gguf.formats.gguf import read_gguf

Maker = Callable[..., Path]


def run(*args: Any) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command; fails if it ends in a traceback."""
    result = CliRunner().invoke(main, ["export", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint after ``change`` to its tensors."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_command(mobe: Maker, tmp_path: Path) -> None:
    """Report on stderr, JSON on stdout."""
    code, out, err = run(
        mobe("qwen2_moe"), tmp_path / "out.gguf", "--quant", "Q8_0", "--json", "--basis-type", "f16"
    )
    assert code == 0
    report = json.loads(out)
    assert report["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert {row["class"] for row in report["classes"]} >= {"A", "B", "mix", "down", "attention", "embeddings"}
    assert [row["types"] for row in report["classes"] if row["class"] == "B"] == [{"f16": 6}]
    assert report["fallbacks"][0].keys() == {"tensor", "row", "wanted", "type"}
    assert "bits per weight" in err and "qwen2" in err and "q8_0 -> f16" in err
    total = next(line.split() for line in err.splitlines() if line.startswith("all "))
    assert float(total[-2]) > 0 and 8 < float(total[-1]) < 20
    assert all(len(line) <= 100 for line in err.splitlines() if line[:1].isalpha() and "  " in line)


@pytest.mark.parametrize("options", [(), ("--dense",), ("--split-max-size", "300K")])
def test_a_dry_run_knows_the_size(options: tuple[str, ...], mobe: Maker, tmp_path: Path) -> None:
    arguments = (mobe("qwen2_moe"), tmp_path / "out.gguf", "--quant", "q8_0", "--json", *options)
    planned = json.loads(run(*arguments, "--dry-run")[1])
    assert planned["bytes"] > planned["tensor_bytes"] and not any(tmp_path.iterdir())
    written = json.loads(run(*arguments)[1])
    assert planned["bytes"] == written["bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*.gguf"))
    assert (planned["written"], written["written"]) == (False, True)


def test_quiet(mobe: Maker, tmp_path: Path) -> None:
    assert run(mobe("qwen2_moe"), tmp_path / "out.gguf", "--quant", "f16", "-q") == (0, "", "")


def test_an_ordinary_model_names_the_next_command(model: Maker, tmp_path: Path) -> None:
    source = model("olmoe")
    code, out, err = run(source, tmp_path / "out.gguf", "--quant", "q4_k")
    assert code == 1 and not out
    assert f"mobe-gguf factorize {source} " in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quant", "q4_9"], "q4_k_s"),
        (["--quant", "q4_k", "--split-max-size", "50"], "--split-max-size 50: expected"),
        (["--quant", "q4_k", "--experts-used", "9"], "1 to 8"),
        (["--quant", "q4_k", "--down-type", "q4"], "--down-type"),
        (["--quant", "q4_k", "--basis-type", "q4_k_m"], "--basis-type"),
        (["--quant", "q4_k", "--tensor-type", "nothing=q8_0"], "no tensor"),
        (["--quant", "q4_k", "--tokenizer-pre", "mine"], "llama-bpe"),
        ([], "--quant"),
    ],
)
def test_usage(options: list[str], words: str, mobe: Maker, tmp_path: Path) -> None:
    code, out, err = run(mobe("olmoe"), tmp_path / "out.gguf", *options)
    assert (code, out) == (2, "") and words in err
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(mobe: Maker, tmp_path: Path) -> None:
    code, _, err = run(mobe("olmoe"), tmp_path, "--quant", "q8_0")
    assert code == 2 and "is a directory" in err
    code, _, err = run(mobe("olmoe"), tmp_path / "no" / "out.gguf", "--quant", "q8_0")
    assert code == 1 and f"mkdir -p {tmp_path / 'no'}" in err
    code, _, err = run(mobe("olmoe"), "/proc/out.gguf", "--quant", "q8_0")
    assert code == 1 and "/proc" in err and "Traceback" not in err


def test_what_is_there_already(mobe: Maker, tmp_path: Path) -> None:
    """What is no file stays; a symbolic link, too, and what it points to is replaced."""
    disk, pipe, link = tmp_path / "disk", tmp_path / "pipe", tmp_path / "link.gguf"
    os.mkfifo(pipe)
    code, _, err = run(mobe("olmoe"), pipe, "--quant", "q8_0")
    assert code == 1 and f"{pipe}: it is a pipe" in err and pipe.is_fifo()
    link.symlink_to(disk / "model.gguf")
    code, _, err = run(mobe("olmoe"), link, "--quant", "q8_0")
    assert code == 1 and f"{link} links to {disk / 'model.gguf'}" in err and f"mkdir -p {disk}" in err
    disk.mkdir()
    for quant in ("q8_0", "f16"):
        assert run(mobe("olmoe"), link, "--quant", quant, "--no-card")[0] == 0
        assert link.is_symlink() and [p.name for p in disk.iterdir()] == ["model.gguf"]
        assert run(mobe("olmoe"), tmp_path / "plain.gguf", "--quant", quant, "--no-card")[0] == 0
        assert (disk / "model.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "pipe", "link.gguf", "plain.gguf"}


def test_missing_and_damaged_files(mobe: Maker, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    code, _, err = run(tmp_path / "nothing", out, "--quant", "q8_0")
    assert code == 1 and "no such directory" in err
    source = tmp_path / "source"
    shutil.copytree(mobe("olmoe"), source)
    with open(source / "model.safetensors", "r+b") as file:
        file.truncate((source / "model.safetensors").stat().st_size // 2)
    code, _, err = run(source, out, "--quant", "q8_0")
    assert code == 1 and "model.safetensors" in err and "truncated" in err
    (source / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    code, _, err = run(source, out, "--quant", "q8_0")
    assert code == 1 and "model-00001-of-00002.safetensors" in err
    assert not out.exists()


def _drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _set(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


def _nan(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[name].view(-1).__setitem__(5, float("nan"))


EXPERT = "model.layers.1.mlp.experts.3"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_set(f"{EXPERT}.gate_proj.weight", 48, 31), f"{EXPERT}.gate_proj.weight"),
        (_set(f"{EXPERT}.down_proj.weight", 64, 40), "down"),
        (_set("model.layers.1.mlp.B_gate", 4, 32, 60), "model.layers.1.mlp.B_gate"),
        (_set("model.layers.1.mlp.W_up", 8, 3), "model.layers.1.mlp.W_up"),
        (_drop("model.layers.1.mlp.W_up"), "model.layers.1.mlp.W_up"),
        (_drop(f"{EXPERT}.up_proj.weight"), f"{EXPERT}.up_proj.weight"),
        (_drop(f"{EXPERT}.down_proj.weight"), "down"),
        (_nan("model.layers.1.mlp.B_gate"), "model.layers.1.mlp.B_gate"),
        (_nan("model.layers.1.mlp.W_gate"), "model.layers.1.mlp.W_gate"),
        (_nan(f"{EXPERT}.up_proj.weight"), f"{EXPERT}.up_proj.weight|blk.1.ffn_up_exps.weight"),
        (_nan(f"{EXPERT}.down_proj.weight"), "blk.1.ffn_down_exps.weight"),
        (_nan("model.embed_tokens.weight"), "token_embd.weight"),
    ],
)
@pytest.mark.parametrize("quant", ["f32", "q5_0"])
def test_tensors_that_contradict(change: Any, name: str, quant: str, mobe: Maker, tmp_path: Path) -> None:
    source = changed(mobe("qwen3_moe", r=32), tmp_path / "source", change)
    code, _, err = run(source, tmp_path / "out.gguf", "--quant", quant)
    assert code == 1 and any(part in err for part in name.split("|")), err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_groups_that_differ(mobe: Maker, tmp_path: Path) -> None:
    def regroup(tensors: dict[str, torch.Tensor]) -> None:
        for kind in ("B", "W"):
            halves = tensors.pop(f"model.layers.2.mlp.{kind}_up").chunk(2)
            for group, half in enumerate(halves):
                half = half[:, :2] if kind == "W" else half
                tensors[f"model.layers.2.mlp.{kind}_up_{group}"] = half.contiguous()

    source = changed(mobe("qwen3_moe", r=32), tmp_path / "source", regroup)
    code, _, err = run(source, tmp_path / "out.gguf", "--quant", "f32")
    assert code == 1 and "layer 0 gate: 1, layer 2 up: 2" in err


def test_no_bases_at_all(model: Maker, tmp_path: Path) -> None:
    source = changed(model("qwen3_moe"), tmp_path / "source", lambda tensors: None)
    config = json.loads((source / "config.json").read_text()) | {"num_B": 4, "activation": "silu"}
    (source / "config.json").write_text(json.dumps(config))
    code, _, err = run(source, tmp_path / "out.gguf", "--quant", "f32")
    assert code == 1 and "mobe-gguf factorize" in err


def test_too_little_space(mobe: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    code, _, err = run(mobe("olmoe"), tmp_path / "out.gguf", "--quant", "f32")
    assert code == 1 and "are needed" in err and not list(tmp_path.iterdir())


def test_disk_full_in_the_middle(mobe: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tofile, seen = write.Encoded.tofile, []

    def full(self: write.Encoded, file: Any) -> None:
        seen.append(self.tensor.name)
        if len(seen) == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tofile(self, file)

    monkeypatch.setattr(write.Encoded, "tofile", full)
    (tmp_path / "out.gguf").write_text("what was there before")
    code, _, err = run(mobe("olmoe"), tmp_path / "out.gguf", "--quant", "f32")
    assert code == 1 and "disk is full" in err and len(seen) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert (tmp_path / "out.gguf").read_text() == "what was there before"


COMMAND = "from mobe_gguf.cli import main; main()"


def test_a_limit_of_the_system(mobe: Maker, tmp_path: Path) -> None:
    """A real failing write(2): the process may not write files of more than 200 kB."""
    process = subprocess.run(
        [sys.executable, "-c", COMMAND, "export", mobe("olmoe"), tmp_path / "out.gguf", "--quant", "f32"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert process.returncode == 1 and "nothing was written" in process.stderr, process.stderr
    assert "Traceback" not in process.stderr and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def larger(model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 64 experts of 128 x 1024, bf16: the down projections of one are 32 MiB as float32."""
    sizes = dict(num_experts=64, hidden_size=1024, moe_intermediate_size=128, num_hidden_layers=2)
    source = model("qwen3_moe", dtype=torch.bfloat16, **sizes)
    return make_mobe(source, tmp_path_factory.mktemp("larger") / "mobe", dtype=torch.bfloat16, m=16)


def test_killed(larger: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle leaves nothing under the name; the next run is not disturbed by what lies about."""
    out, part = tmp_path / "out.gguf", tmp_path / ".out.gguf.part"
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "export", larger, out, "--quant", "q8_0", "-q"]
    )
    while not (part.exists() and part.stat().st_size > 1_000_000):
        assert process.poll() is None, "the export ended before it could be killed"
        time.sleep(0.004)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists() and not out.exists()
    for name in ("out.gguf", "again.gguf"):
        export(larger, tmp_path / name, Recipe("q8_0"), quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf", "again.gguf"}
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("split", "left"),
    [((), "nothing was written"), (("--split-max-size", "9M"), "what is finished is kept in ")],
)
def test_stopped(split: tuple[str, ...], left: str, larger: Path, tmp_path: Path) -> None:
    """SIGTERM is as Ctrl-C: what is half written goes, finished files of several stay."""
    parts = tmp_path / ".out.gguf.parts"
    part = f"{parts.name}/.out-00002-*.part" if split else ".out.gguf.part"
    command = ["export", larger, tmp_path / "out.gguf", "--quant", "q8_0", "-q", "--no-refit", *split]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *command], stderr=subprocess.PIPE, text=True)
    while not any(tmp_path.glob(part)):
        assert process.poll() is None, "the export ended before it could be stopped"
        time.sleep(0.002)
    process.terminate()
    message = process.communicate()[1]
    assert process.returncode == 130 and message.startswith(f"Error: stopped; {left}")
    assert not list(tmp_path.rglob("*.part"))
    assert [p.name for p in tmp_path.iterdir()] == ([parts.name] if split else [])
    if split:
        assert f"{parts}, the same command resumes from there" in message
        code, _, err = run(*(word for word in command[1:] if word != "-q"))
        assert code == 0 and "1 files kept from an interrupted run" in err


MEASURE = """
import sys, threading, time
from mobe_gguf.export import Recipe, export

def anonymous():  # memory that is no mapped file, in bytes
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

export(sys.argv[1], sys.argv[2], Recipe("f32"), dry_run=True, quiet=True)  # all imports and tables are in memory now
peak = start = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.004)
threading.Thread(target=watch, daemon=True).start()
for quant in sys.argv[3:]:
    export(sys.argv[1], sys.argv[2], Recipe(quant), refit=False, quiet=True)
    print(quant, peak - start)
export(sys.argv[1], sys.argv[2], Recipe(quant), quiet=True)
print("refit", peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
def test_memory_is_that_of_a_few_pieces(larger: Path, tmp_path: Path) -> None:
    """Less than the down projections of one layer as float32 (32 MiB), which the converter's own way holds twice.

    Measured: 9 MB for q8_0 and 16 MB for f32; 77 and 93 MB when ``source`` takes stacks as a whole.  Solving for A again holds
    the bases twice (16 MiB) and a block of experts besides.
    """
    command = [sys.executable, "-c", MEASURE, larger, tmp_path / "out.gguf", "f32", "q8_0"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pieces = (len(os.sched_getaffinity(0)) + 2) * 2 * 4 * (1 << 20)
    *plain, solved = (int(line.split()[1]) for line in out.splitlines())
    assert max(plain) < max(32 << 20, pieces), out
    assert solved < (32 << 20) + 2 * BLOCK_BYTES, out


def test_errors_are_mobe_errors_in_python_too(model: Maker, tmp_path: Path) -> None:
    with pytest.raises(MobeError, match="mobe-gguf factorize"):
        export(model("olmoe"), tmp_path / "out.gguf", Recipe("f32"), quiet=True)


TOKENIZER = """
from pathlib import Path
Path(__file__).parent.joinpath("it-ran").touch()
from transformers import PreTrainedTokenizerFast
class Strange(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_the_model_never_runs(model: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3's class in the converter, by itself, runs whatever tokenizer code lies in the directory (for Kimi-K2)."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = changed(model("deepseek_v3"), tmp_path / "source", lambda tensors: None)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "Strange",
        "auto_map": {"AutoTokenizer": [None, "tokenization_strange.Strange"]},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "tokenization_strange.py").write_text(TOKENIZER)
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(MobeError, match=r"tokenization_strange\.py.*tokenizer\.json"):
        export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    assert not (tmp_path / "out.gguf").exists()
    (tmp_path / "tokenizer.json").rename(source / "tokenizer.json")  # which says all that the code would
    export(source, tmp_path / "out.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    export(model("deepseek_v3"), tmp_path / "plain.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    keys, plain = (read_gguf(tmp_path / name).keys for name in ("out.gguf", "plain.gguf"))
    assert {k: v for k, v in keys.items() if k.startswith("tokenizer.")} == {
        k: v for k, v in plain.items() if k.startswith("tokenizer.")
    }
    assert not list(tmp_path.rglob("it-ran"))


def test_an_ordinary_model_that_another_method_made(own_model: Maker, tmp_path: Path) -> None:
    source = own_model("olmoe")
    edit_config(source, mobe={"method": "d2moe"})
    code, _, err = run(source, tmp_path / "out.gguf", "--quant", "q4_k")
    assert code == 1 and "the factors of --method d2moe are multiplied out" in err and "--dense" in err
    assert run(source, tmp_path / "out.gguf", "--quant", "q4_k", "--dense", "-q")[0] == 0


@pytest.mark.parametrize(
    ("config", "gone", "message"),
    [
        ({"num_experts_per_tok": 9}, None, "/config.json: 'num_experts_per_tok' is 9, expected 1 to 8"),
        ({"architectures": 5}, None, "/config.json: 'architectures' must be a list"),
        ({}, "model.layers.1.mlp.gate.weight", ": tensor model.layers.1.mlp.gate.weight is missing"),
        ({}, "model.embed_tokens.weight", ": tensor model.embed_tokens.weight is missing"),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_a_checkpoint_that_makes_no_file(
    config: dict[str, Any],
    gone: str | None,
    message: str,
    dense: bool,
    mobe: Maker,
    model: Maker,
    tmp_path: Path,
) -> None:
    """Before anything is written; of an ordinary model as of factors."""
    source = Path(shutil.copytree((model if dense else mobe)("olmoe"), tmp_path / "source"))
    edit_config(source, **config)
    if gone:
        edit_tensors(source, lambda tensors: tensors.pop(gone))
    code, _, err = run(source, tmp_path / "out.gguf", "--quant", "q4_k", *["--dense"][:dense])
    assert code == 1 and f"{source}{message}" in err and [p.name for p in tmp_path.iterdir()] == ["source"]
