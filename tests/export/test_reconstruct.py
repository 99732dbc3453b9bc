"""``mobe-gguf reconstruct``: an ordinary model directory, as transformers loads it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from parity.llama import nmse
from parity.reference import multiply_out, transformers_logits
from safetensors.torch import load_file, save_file

from export.handmade import cut, make_mobe
from export.published import PUBLISHED, make_published, make_wab
from mobe_gguf.cli import main
from mobe_gguf.core import atomic
from mobe_gguf.core.names import ALL_PROJECTIONS, PROJECTIONS
from mobe_gguf.export import reconstruct
from mobe_gguf.export.reconstruct import reconstruct_model
from mobe_gguf.models import writer
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint
from mobe_gguf.models.wab import WabCheckpoint, WabFiles

TOKENS = list(range(40, 60))


def run(*args: Any) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; fails if it ends in a traceback."""
    result = CliRunner().invoke(main, ["reconstruct", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", dict(our_key=True, g=2, by_row=True, r=32)),
        ("qwen2_moe", dict(layers=(1,), projections=("up",))),
        ("deepseek_v3", dict(g=2, activation="silu")),
        ("mixtral", dict(activation="none", projections=ALL_PROJECTIONS)),
        ("olmoe", dict(by_row=True)),
        ("qwen3_moe", dict(m=2, r=60, activation="none", projections=ALL_PROJECTIONS)),
        ("olmoe", dict(m=4, r=56, g=2, by_row=True, projections=ALL_PROJECTIONS)),
    ],
    ids=str,
)
def test_transformers_runs_it(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Same tensors by name and shape, same config.json, and the logits of the formula."""
    original = tiny.make_model(family, tmp_path / "original", seed=1)
    mobe = make_mobe(original, tmp_path / "mobe", **options)
    reconstruct_model(MobeCheckpoint(mobe), tmp_path / "dense", quiet=True)
    want, got = tensors_of(multiply_out(mobe, tmp_path / "truth", original)), tensors_of(tmp_path / "dense")
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in tensors_of(original).items()}
    changed = {n for n, t in tensors_of(original).items() if not torch.equal(t, got[n])}
    n_layers = len(options.get("layers", Checkpoint(original).moe_layers))
    assert len(changed) == 8 * n_layers * len(options.get("projections", PROJECTIONS))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert config_of(tmp_path / "dense") == config_of(original)
    files = {p.name for p in original.iterdir()} - {"model.safetensors"}
    index = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert {p.name for p in (tmp_path / "dense").iterdir()} == files | index
    truth = transformers_logits(tmp_path / "truth", TOKENS)
    assert nmse(truth, transformers_logits(tmp_path / "dense", TOKENS)) < 1e-10
    assert nmse(truth, transformers_logits(original, TOKENS)) > 1e-3


def test_layers_that_differ(tmp_path: Path) -> None:
    """``num_B`` is the largest m: shapes count."""
    original = tiny.make_model("qwen3_moe", tmp_path / "original", seed=1)
    mobe = make_mobe(original, tmp_path / "mobe", m=4)
    cut(mobe, 0, "gate", m=2, r=40)
    cut(mobe, 2, "up", m=3, r=20)
    assert config_of(mobe)["num_B"] == 4
    reconstruct_model(MobeCheckpoint(mobe), tmp_path / "dense", quiet=True)
    want, got = tensors_of(multiply_out(mobe, tmp_path / "truth", original)), tensors_of(tmp_path / "dense")
    assert config_of(tmp_path / "dense") == config_of(original)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(name: str, tmp_path: Path) -> None:
    """bf16; ``architectures`` is the original's, ``auto_map`` without code that is not there, no word of FP8."""
    original, mobe = make_published(name, tmp_path)
    result = reconstruct_model(MobeCheckpoint(mobe), tmp_path / "dense", max_shard_size=200_000, quiet=True)
    config = config_of(tmp_path / "dense")
    assert not {"num_B", "activation", "mobe", "auto_map", "quantization_config"} & set(config)
    assert config["architectures"] == config_of(original)["architectures"]
    assert config["torch_dtype"] == "bfloat16" and config["model_type"] == config_of(mobe)["model_type"]
    assert ("auto_map" in config_of(mobe)) == any("auto_map" in note for note in result.notes)
    truth = tensors_of(multiply_out(mobe, tmp_path / "truth", original))
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(truth) and len(set(index["weight_map"].values())) > 2
    for tensor, file in index["weight_map"].items():
        got = load_file(tmp_path / "dense" / file)[tensor]
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), truth[tensor].float(), rtol=2**-7, atol=1e-5, msg=tensor)
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in truth.values())
    if name in ("qwen3", "deepseek_v3"):  # which transformers knows
        error = nmse(
            transformers_logits(tmp_path / "truth", TOKENS), transformers_logits(tmp_path / "dense", TOKENS)
        )
        assert error < 1e-2  # the experts' rounding to bf16


def test_code_beside_the_weights_stays_named(tmp_path: Path) -> None:
    _, mobe = make_published("ling", tmp_path)
    for file in ("configuration_bailing_moe.py", "modeling_bailing_moe.py"):
        (mobe / file).write_text("# the original's\n")
    result = reconstruct_model(MobeCheckpoint(mobe), tmp_path / "dense", quiet=True)
    assert not result.notes and config_of(tmp_path / "dense")["auto_map"] == config_of(mobe)["auto_map"]
    assert (tmp_path / "dense" / "modeling_bailing_moe.py").is_file()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_dtype(dtype: str, tmp_path: Path) -> None:
    """All matrices, vectors excepted."""
    original = tiny.make_model("qwen3_moe", tmp_path / "original", dtype=torch.bfloat16)
    mobe = make_mobe(original, tmp_path / "mobe", dtype=torch.bfloat16)
    assert run(mobe, tmp_path / "dense", "--dtype", dtype, "-q") == (0, "", "")
    want = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    before, after = tensors_of(mobe), tensors_of(tmp_path / "dense")
    assert {t.dtype for t in after.values() if t.dim() > 1} == {want}
    assert {t.dtype for t in after.values() if t.dim() == 1} == {torch.bfloat16}
    torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"].to(want))
    config = config_of(tmp_path / "dense")
    assert config.get("dtype", config.get("torch_dtype")) == str(want).removeprefix("torch.")


def test_fp8_is_dequantized(tmp_path: Path) -> None:
    """The down projections and attention of a DeepSeek-V3 source stay FP8 in a MoBE checkpoint."""
    original = tiny.make_model("deepseek_v3", tmp_path / "original")
    mobe = make_mobe(original, tmp_path / "mobe")
    tensors, expected = tensors_of(mobe), {}
    for name in [n for n in tensors if "down_proj" in n or "o_proj" in n]:
        scale = torch.rand(-(-tensors[name].shape[0] // 32), -(-tensors[name].shape[1] // 32)) + 0.5
        full = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        full = full[: tensors[name].shape[0], : tensors[name].shape[1]]
        tensors[f"{name}_scale_inv"] = scale
        tensors[name] = (tensors[name] / full).to(torch.float8_e4m3fn)
        expected[name] = tensors[name].float() * full
    save_file(tensors, mobe / "model.safetensors", {"format": "pt"})
    config = config_of(mobe) | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    (mobe / "config.json").write_text(json.dumps(config))
    reconstruct_model(MobeCheckpoint(mobe), tmp_path / "dense", quiet=True)
    got = tensors_of(tmp_path / "dense")
    assert set(got) == set(tensors_of(original)) and len(expected) > 20
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert "quantization_config" not in config_of(tmp_path / "dense")
    transformers_logits(tmp_path / "dense", TOKENS)


def test_training_output(tmp_path: Path) -> None:
    """``--wab``; the original's experts, fused or not, are replaced."""
    original = tiny.make_model("qwen3_moe", tmp_path / "original")
    wab = make_wab(original, tmp_path / "wab", activation="tanh")
    code, out, err = run(original, tmp_path / "dense", "--wab", wab, "--activation", "tanh", "--json")
    assert (
        code == 0 and json.loads(out)["n_experts"] == 24 and "Qwen3MoeForCausalLM, 24 experts in f32" in err
    )
    want, got = tensors_of(original), tensors_of(tmp_path / "dense")
    assert set(got) == set(want)
    for name, tensor in want.items():  # exact, but for sigma's eleven bits
        torch.testing.assert_close(got[name], tensor, rtol=2**-10, atol=1e-6, msg=name)


def test_training_output_beside_fused_experts(tmp_path: Path) -> None:
    original = tiny.make_model("qwen3_moe", tmp_path / "original")
    wab = make_wab(original, tmp_path / "wab")
    want = tensors_of(original)
    fused = tensors_of(tiny.make_model("qwen3_moe", tmp_path / "fused", fused=True))
    for layer in range(3):
        block = f"model.layers.{layer}.mlp.experts"
        pairs = [[want[f"{block}.{e}.{p}_proj.weight"] for p in ("gate", "up")] for e in range(8)]
        fused[f"{block}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
    save_file(fused, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    checkpoint = WabCheckpoint(tmp_path / "fused", WabFiles((wab,), "silu"))
    reconstruct_model(checkpoint, tmp_path / "dense", quiet=True)
    got = tensors_of(tmp_path / "dense")
    assert set(got) == set(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=2**-10, atol=1e-6, msg=name)


def test_what_is_refused(tmp_path: Path) -> None:
    original = tiny.make_model("olmoe", tmp_path / "original")
    mobe = make_mobe(original, tmp_path / "mobe")
    code, _, err = run(original, tmp_path / "dense")
    assert code == 1 and "mobe-gguf factorize" in err
    (tmp_path / "mobe" / "factors.json").write_text("{}")
    code, _, err = run(mobe, tmp_path / "dense")
    assert code == 1 and f"mobe-gguf export {mobe} dense.gguf --quant q8_0 --dense" in err
    (tmp_path / "mobe" / "factors.json").unlink()
    code, _, err = run(mobe, tmp_path / "dense", "--max-shard-size", "5")
    assert code == 2 and "--max-shard-size 5" in err
    code, _, err = run(mobe, original)
    assert code == 1 and "exists already" in err
    code, _, err = run(mobe, tmp_path / "no" / "dense")
    assert code == 1 and "cannot be written" in err
    code, _, err = run(mobe, tmp_path / "dense", "--dry-run")
    assert code == 0 and "would be written" in err
    assert {p.name for p in tmp_path.iterdir()} == {"original", "mobe"}


def test_values_that_f16_does_not_hold(tmp_path: Path) -> None:
    mobe = make_mobe(tiny.make_model("olmoe", tmp_path / "original"), tmp_path / "mobe")
    tensors = tensors_of(mobe)
    tensors["model.layers.1.mlp.experts.3.gate_proj.weight"] *= 1e7
    save_file(tensors, mobe / "model.safetensors", {"format": "pt"})
    code, _, err = run(mobe, tmp_path / "dense", "--dtype", "f16")
    assert code == 1 and "model.layers.1.mlp.experts.3.gate_proj.weight" in err and "bf16" in err
    assert {p.name for p in tmp_path.iterdir()} == {"original", "mobe"}


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the third of the shards: two are kept, and the same command does the rest; another starts anew."""
    mobe = make_mobe(tiny.make_model("qwen3_moe", tmp_path / "original", num_experts=32), tmp_path / "mobe")
    limit = ["--max-shard-size", "1M"]
    assert run(mobe, tmp_path / "whole", *limit, "-q")[0] == 0
    write, calls = writer.write_safetensors, []

    def full(path: Path, *rest: Any) -> None:
        calls.append(path.name)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *rest)

    monkeypatch.setattr("mobe_gguf.export.reconstruct.write_safetensors", full)
    code, _, err = run(mobe, tmp_path / "dense", *limit)
    assert code == 1 and "disk is full" in err and "resumes from there" in err
    assert not (tmp_path / "dense").exists() and len(list((tmp_path / ".dense.parts").glob("model-*"))) == 2
    code, _, err = run(mobe, tmp_path / "dense", *limit)
    assert code == 0 and "2 files kept" in err
    n_shards = len(list((tmp_path / "whole").glob("model-*.safetensors")))
    assert len(calls) == 3 + n_shards - 2 and calls.count(calls[0]) == 1, calls
    same = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "dense").iterdir()} == same
    assert not (tmp_path / ".dense.parts").exists()


SLOWLY = """
import sys
from mobe_gguf.export import reconstruct
from mobe_gguf.cli import main
write, calls = reconstruct.write_safetensors, []
def slow(*args):
    write(*args)
    calls.append(args)
    if len(calls) == 3:
        print("at it", flush=True)
        sys.stdin.readline()
reconstruct.write_safetensors = slow
main(sys.argv[1:])
"""


def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes is refused, also by a directory that is there when its turn comes."""
    mobe = make_mobe(tiny.make_model("qwen3_moe", tmp_path / "original", num_experts=32), tmp_path / "mobe")
    limit, out = ["--max-shard-size", "1M", "-q"], tmp_path / "dense"
    first = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, "reconstruct", mobe, out, *limit],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None and first.stdout.readline() == "at it\n"
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    code, _, err = run(mobe, out, *limit)
    assert code == 1 and "dense: another run is writing it" in err
    monkeypatch.setattr(atomic, "PATIENCE", 60)
    space = reconstruct.check_space
    ending = lambda *args: (space(*args), first.communicate("\n"))  # noqa: E731
    monkeypatch.setattr(reconstruct, "check_space", ending)
    code, _, err = run(mobe, out, *limit)
    assert code == 1 and "exists already" in err and first.returncode == 0
    monkeypatch.setattr(reconstruct, "check_space", space)
    assert run(mobe, tmp_path / "alone", *limit)[0] == 0
    same = {p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == same
    assert {p.name for p in tmp_path.iterdir()} == {"original", "mobe", "dense", "alone"}


def test_killed(tmp_path: Path) -> None:
    sizes = dict(num_experts=32, hidden_size=512, moe_intermediate_size=256)
    mobe = make_mobe(tiny.make_model("qwen3_moe", tmp_path / "original", **sizes), tmp_path / "mobe", m=8)
    out, parts = tmp_path / "dense", tmp_path / ".dense.parts"
    command = "from mobe_gguf.cli import main; main()"
    arguments = ["reconstruct", mobe, out, "--max-shard-size", "10M", "-q"]
    process = subprocess.Popen([sys.executable, "-c", command, *arguments])
    while not (parts.is_dir() and len(list(parts.glob("model-*"))) > 2):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.004)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    result = reconstruct_model(MobeCheckpoint(mobe), out, max_shard_size=10_000_000, quiet=True)
    assert result.files_kept >= 2 and not parts.exists()
    fresh = reconstruct_model(MobeCheckpoint(mobe), tmp_path / "again", max_shard_size=10_000_000, quiet=True)
    assert fresh.files_kept == 0 and len(fresh.files) > 5
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
