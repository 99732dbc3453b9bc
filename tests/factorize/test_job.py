"""Whole jobs: every family, resume after SIGKILL, failing disks, other people's directories."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from formats.test_imatrix import write as write_imatrix
from models.editing import edit_config, edit_tensors, to_fp8
from safetensors.torch import load_file

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.executors import Stopped
from mobe_gguf.factorize import job as jobs
from mobe_gguf.factorize.job import prepare, run, state, work_directory
from mobe_gguf.factorize.job import unit as units
from mobe_gguf.factorize.plan import Options
from mobe_gguf.formats.safetensors import INDEX_NAME, Entry, read_header, write_safetensors
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint, reconstruct

FAST = Options(steps=3)


def factorize(model: Path, out: Path, options: Options = FAST, resume: bool = False) -> jobs.Result:
    return run(prepare(model, out, options, resume=resume), quiet=True)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("layout", ["classic", "fused", "shards"])
def test_every_family(family, layout, model, tmp_path):
    if family == "bailing_moe" and layout != "classic":
        pytest.skip("transformers does not know this family, so there is one layout only")
    extra = {"classic": {}, "fused": dict(fused=True), "shards": dict(max_shard_size="300KB")}[layout]
    source, out = Checkpoint(model(family, **extra)), tmp_path / "out"
    rank = {"classic": 40, "fused": 56, "shards": 64}[layout]  # p is 48, d 64
    result = factorize(source.path, out, Options(bases=4, groups=2, rank=rank, steps=3))
    assert names(tmp_path) == {"out"}, "the work directory must be gone"
    got = MobeCheckpoint(out)
    assert got.activation == "tanh" and got.config["num_B"] == 4
    small = {p.name for p in source.path.iterdir() if p.suffix != ".safetensors"}
    assert small <= names(out) | {INDEX_NAME}, "tokenizer and the like come along"
    errors = {(u.layer, u.projection): u.error for u in result.units}
    for layer in source.moe_layers:
        for projection in ("gate", "up"):
            w, w2 = source.expert_stack(layer, projection), reconstruct(got.layer(layer), projection)
            error = float((w - w2).square().sum() / w.square().sum())
            assert error == pytest.approx(errors[layer, projection], rel=1e-3)
            assert error == pytest.approx(got.config["mobe"]["errors"][str(layer)][projection], rel=1e-3)
            assert got.layer(layer).group_count(projection) == 2 and got.layer(layer).rank(projection) == rank
        assert torch.equal(got.expert_stack(layer, "down"), source.expert_stack(layer, "down"))
    # All else as it was; the fused layout is compared with the classic one, for names too.
    original = load_file(model(family) / "model.safetensors")
    rest = {n for n in original if ".experts." not in n or ".shared_experts." in n}
    assert all(torch.equal(got.get(n), original[n]) for n in rest)
    new = {n for n in got.names if ".B_" in n or ".W_" in n}
    assert set(got.names) - new == set(original)
    assert result.plan.output_bytes == json.loads((out / INDEX_NAME).read_text())["metadata"]["total_size"]


def test_some_layers_and_one_projection(model, tmp_path):
    source = model("qwen3_moe")
    factorize(source, tmp_path / "out", Options(steps=2, layers=(1,), projections=("up",)))
    got, before = MobeCheckpoint(tmp_path / "out"), Checkpoint(source)
    assert [got.layer(i).projections for i in range(3)] == [(), ("up",), ()]
    for layer, projection in ((0, "gate"), (1, "gate"), (2, "up")):
        assert torch.equal(got.expert_stack(layer, projection), before.expert_stack(layer, projection))


def test_one_projection_of_a_fused_model(model, tmp_path):
    source = model("mixtral", fused=True)
    factorize(source, tmp_path / "out", Options(steps=2, layers=(1,), projections=("up",)))
    got, before = MobeCheckpoint(tmp_path / "out"), Checkpoint(source)
    for layer, projection in ((0, "gate"), (1, "gate"), (2, "up"), (1, "down")):
        assert not got.is_fused(layer, projection)
        assert torch.equal(got.expert_stack(layer, projection), before.expert_stack(layer, projection))


def test_types_are_those_of_the_source(model, tmp_path):
    factorize(model("olmoe", dtype=torch.bfloat16), tmp_path / "bf16")
    factorize(model("olmoe"), tmp_path / "f16", Options(steps=3, dtype="f16"))
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = Checkpoint(tmp_path / name)
        block = "model.layers.0.mlp."
        assert got.dtype(block + "B_gate") == got.dtype(block + "experts.0.up_proj.weight") == dtype
        assert got.dtype(block + "W_gate") == torch.float32


def test_fp8_source(own_model, tmp_path):
    """Gate and up become bf16 factors; down stays FP8 with its scales, byte for byte."""
    source = own_model("deepseek_v3")

    def quantize(tensors):
        for name in [n for n in tensors if ".mlp.experts." in n]:
            tensors[name], tensors[name + "_scale_inv"] = to_fp8(tensors[name], 32)

    edit_tensors(source, quantize)
    edit_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    result = factorize(source, tmp_path / "out", Options(bases=8, activation="none", steps=60))
    before, got = Checkpoint(source), MobeCheckpoint(tmp_path / "out")
    assert got.dtype("model.layers.1.mlp.experts.3.gate_proj.weight") == torch.bfloat16
    assert "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv" not in got
    down = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert torch.equal(got.get(down).view(torch.uint8), before.get(down).view(torch.uint8))
    assert torch.equal(got.get(down + "_scale_inv"), before.get(down + "_scale_inv"))
    w = before.expert_stack(2, "up")
    assert (w - reconstruct(got.layer(2), "up")).square().sum() < 1e-3 * w.square().sum()
    assert result.plan.model_before == sum(before.info(n).numel for n in before.names if "scale_inv" not in n)


def test_the_model_still_loads_in_transformers_when_multiplied_out(model, tmp_path):
    """With as many bases as experts and no activation nothing is lost, so the logits stay."""
    import transformers

    source, out = model("qwen2_moe"), tmp_path / "out"
    factorize(source, out, Options(bases=8, activation="none", steps=60))
    before = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    after = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    got = MobeCheckpoint(out)
    for i, layer in enumerate(after.model.layers):
        w = torch.cat([reconstruct(got.layer(i), p) for p in ("gate", "up")], dim=1)
        layer.mlp.experts.gate_up_proj.data.copy_(w)
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        x, y = before(tokens).logits, after(tokens).logits
    assert float((x - y).square().sum() / x.square().sum()) < 1e-3


def test_imatrix(model, tmp_path):
    sums = torch.rand(8, 64).square().numpy() * 100
    path = write_imatrix(tmp_path / "i.gguf", sums, [10.0] * 8)
    options = Options(steps=20, layers=(0,), imatrix=str(path))
    result = factorize(model("qwen3_moe"), tmp_path / "out", options)
    assert result.settings.objective == "activation"
    assert all(u.objective < u.error for u in result.units)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["mobe"]["settings"]["objective"]
        == "activation"
    )
    with pytest.raises(UsageError, match="needs --imatrix"):
        prepare(model("qwen3_moe"), tmp_path / "new", Options(objective="activation"))
    with pytest.raises(UsageError, match="only used with --objective activation"):
        prepare(model("qwen3_moe"), tmp_path / "new", Options(objective="mse", imatrix=str(path)))
    with pytest.raises(MobeError, match="blk.1.ffn_gate_exps.weight"):
        prepare(model("qwen3_moe"), tmp_path / "new", Options(imatrix=str(path)))


def test_units_side_by_side_give_the_same_files(model, tmp_path):
    for workers in (1, 3):
        run(prepare(model("qwen3_moe"), tmp_path / str(workers), FAST), quiet=True, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_failure_stops_the_units_beside_it(model, tmp_path, monkeypatch):
    fit, stopped = units.fit, []

    def fail(w, settings, *, label, **kwargs):
        if label == "layer 1 gate":
            raise MobeError("diverged")
        try:
            return fit(w, replace(settings, steps=100_000), label=label, **kwargs)
        except Stopped:
            stopped.append(label)
            raise

    monkeypatch.setattr(units, "fit", fail)
    with pytest.raises(MobeError, match="diverged"):
        run(prepare(model("qwen3_moe"), tmp_path / "out", FAST), quiet=True, workers=3)
    assert "layer 0 gate" in stopped, "100,000 steps must not be waited for"
    assert names(tmp_path) == set()


# stopping and going on


def start(model: Path, out: Path, *options: str) -> subprocess.Popen:
    code = "from mobe_gguf.cli import main; main()"
    command = [sys.executable, "-c", code, "factorize", str(model), str(out), *options]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )


def kill_when_finished(process: subprocess.Popen, out: Path, units: int) -> None:
    """SIGKILL as soon as ``units`` unit files are there: in the middle of the next one."""
    deadline = time.monotonic() + 120
    while len(list((work_directory(out) / "units").glob("layer-*"))) < units:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()


def test_killed_twice_gives_the_same_files(model, tmp_path):
    source, options = model("qwen3_moe"), Options(steps=80)
    whole, out = tmp_path / "whole", tmp_path / "out"
    factorize(source, whole, options)
    kill_when_finished(start(source, out, "--steps", "80", "--published"), out, 1)
    assert not out.exists() and names(tmp_path) == {"whole", "out.work"}
    kill_when_finished(start(source, out, "--resume", "-q"), out, 3)
    assert not out.exists()
    (work_directory(out) / "units" / ".layer-002-up.safetensors.part").write_bytes(
        b"what a killed run leaves"
    )
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "junk").write_bytes(b"killed while assembling")
    finished = {p.name: p.stat().st_mtime_ns for p in (work_directory(out) / "units").glob("layer-*")}
    assert len(finished) >= 3
    result = factorize(source, out, Options(), resume=True)
    assert sum(u.seconds is None for u in result.units) == len(finished), (
        "finished units are not fitted again"
    )
    assert contents(out) == contents(whole)
    assert names(tmp_path) == {"whole", "out"}


@pytest.fixture
def half_done(model, tmp_path, monkeypatch):
    """``(model, out)`` of a job that stopped after its first unit."""
    source, out = model("qwen3_moe"), tmp_path / "half"
    fit, calls = units.fit, itertools.count(1)

    def stop(*args, **kwargs):
        if next(calls) > 1:  # side by side with the first: waits for it, and nothing else is finished
            for _ in range(600):
                if list((work_directory(out) / "units").glob("*.safetensors")):
                    break
                time.sleep(0.1)
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(units, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            factorize(source, out)
    assert not out.exists() and len(list((work_directory(out) / "units").iterdir())) == 1
    return source, out


def test_an_unfinished_job_is_not_overwritten(half_done):
    with pytest.raises(MobeError, match="unfinished job with 1 finished units. Add --resume"):
        prepare(*half_done, FAST)


def test_resume_refuses_changed_settings(half_done):
    with pytest.raises(MobeError, match="--bases is 4 now, but the job to resume was started with 2"):
        prepare(*half_done, Options(bases=4), resume=True)
    with pytest.raises(MobeError, match="--seed is 1 now, but the job to resume was started with 0"):
        prepare(*half_done, Options(steps=3, seed=1), resume=True)
    assert factorize(*half_done, FAST, resume=True).units[0].seconds is None


def test_resume_refuses_another_model_and_another_solver(half_done, model, monkeypatch):
    source, out = half_done
    with pytest.raises(MobeError, match="checksum of MODEL was"):
        prepare(model("qwen3_moe", seed=1), out, Options(), resume=True)
    monkeypatch.setattr(state, "SOLVER", "other")
    with pytest.raises(MobeError, match="solver was .* now it is other"):
        prepare(source, out, Options(), resume=True)


def test_a_damaged_unit_is_fitted_again(half_done):
    source, out = half_done
    unit = next((work_directory(out) / "units").iterdir())
    unit.write_bytes(unit.read_bytes()[:-1])
    assert factorize(source, out, Options(), resume=True).units[0].seconds is not None


@pytest.mark.parametrize("text", ["", "{}", '{"settings": 3}', '{"settings": {"bases": 2}}'])
def test_a_damaged_job_file(half_done, text):
    source, out = half_done
    (work_directory(out) / "job.json").write_text(text)
    with pytest.raises(MobeError, match="job.json: cannot be read"):
        prepare(source, out, Options(), resume=True)


def test_resume_with_nothing_to_resume_starts(model, tmp_path):
    assert factorize(model("olmoe"), tmp_path / "out", FAST, resume=True).units


def test_killed_after_the_last_step(half_done):
    source, out = half_done
    shutil.copytree(work_directory(out), out.with_name("kept"))
    factorize(source, out, Options(), resume=True)
    out.with_name("kept").rename(work_directory(out))
    with pytest.raises(MobeError, match="is whole already"):
        prepare(source, out, Options(), resume=True)


def test_two_runs_at_once(half_done):
    source, out = half_done
    job = prepare(source, out, Options(), resume=True)
    with open(job.work / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(MobeError, match="another run is working on it"):
            run(job, quiet=True)
    assert job.work.exists()


def test_without_locks_it_runs(half_done, monkeypatch, capsys):
    """A file system without locks is not another run."""

    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    source, out = half_done
    monkeypatch.setattr(fcntl, "flock", flock)
    run(prepare(source, out, Options(), resume=True), quiet=True)
    assert (out / "config.json").is_file() and "without locks" in capsys.readouterr().err


# disks


def test_too_little_space(model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(MobeError, match=r"not enough space on the disk: 1.29 MB .*1.00 kB are free"):
        factorize(model("olmoe"), tmp_path / "out")
    assert names(tmp_path) == set()


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_disk_full_while_a_unit_is_written(model, tmp_path, monkeypatch):
    write, calls = units.write_safetensors, itertools.count(1)

    def full(path, *args):
        if next(calls) > 1:  # units are written side by side: the disk stays full for those that come after
            path.write_bytes(b"half a file")
            raise FULL
        write(path, *args)

    with monkeypatch.context() as m:
        m.setattr(units, "write_safetensors", full)
        with pytest.raises(MobeError, match="the disk is full.*Finished units are kept; .*--resume"):
            factorize(model("olmoe"), tmp_path / "out")
    assert names(tmp_path) == {"out.work"}
    assert len(list((tmp_path / "out.work" / "units").iterdir())) == 1
    again = factorize(model("olmoe"), tmp_path / "out", resume=True)
    assert sum(u.seconds is None for u in again.units) == 1


def test_disk_full_at_the_first_unit_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise FULL

    monkeypatch.setattr(units, "write_safetensors", full)
    with pytest.raises(MobeError, match="the disk is full"):
        factorize(model("olmoe"), tmp_path / "out")
    assert names(tmp_path) == set()


def test_disk_full_while_assembling(model, tmp_path, monkeypatch):
    def full(source, target):
        raise FULL

    with monkeypatch.context() as m:
        m.setattr(shutil, "copyfile", full)
        with pytest.raises(MobeError, match="the disk is full.*--resume"):
            factorize(model("olmoe"), tmp_path / "out")
    assert names(tmp_path) == {"out.work"}
    factorize(model("olmoe"), tmp_path / "out", resume=True)
    assert names(tmp_path) == {"out"}


def test_without_hard_links_the_units_are_copied(model, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "no links here")

    factorize(model("olmoe"), tmp_path / "linked")
    monkeypatch.setattr(os, "link", refuse)
    factorize(model("olmoe"), tmp_path / "copied")
    assert contents(tmp_path / "linked") == contents(tmp_path / "copied")


def test_many_shards(model, tmp_path, monkeypatch):
    monkeypatch.setattr("mobe_gguf.models.writer.MAX_SHARD", 100_000)
    factorize(model("mixtral"), tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 8 and files[-1].endswith(f"of-{len(files):05d}.safetensors")
    assert MobeCheckpoint(tmp_path / "out").names


def test_tensors_of_any_width_can_be_read_back(tmp_path):
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(2, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "eight": torch.randn(3).to(torch.float8_e4m3fn),
        "long": torch.arange(3),
    }
    write_safetensors(
        tmp_path / "x.safetensors", [Entry.of(n, t) for n, t in tensors.items()], {"format": "pt"}
    )
    got = load_file(tmp_path / "x.safetensors")
    assert set(got) == set(tensors)
    assert all(torch.equal(got[n].float(), t.float()) and got[n].dtype == t.dtype for n, t in tensors.items())
    for name, info in read_header(tmp_path / "x.safetensors").items():
        assert info.begin % tensors[name].element_size() == 0, "data must be aligned to its type"


def test_files_are_readable_by_others(model, tmp_path):
    factorize(model("olmoe"), tmp_path / "out")
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1
