"""Units in several processes: the same files, and what fails or dies is said, or leaves nothing behind."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.executors import Place, Stopped
from mobe_gguf.factorize.job import prepare, remote, run, running, unit, work_directory
from mobe_gguf.factorize.job.remote import JobAddress
from mobe_gguf.factorize.plan import Options

from .test_job import FAST, contents, names, start


def test_a_process_for_each_device_gives_the_same_files(model, tmp_path):
    run(prepare(model("qwen3_moe"), tmp_path / "one", FAST), quiet=True)
    run(prepare(model("qwen3_moe"), tmp_path / "two", FAST), quiet=True, device="cpu,cpu")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert names(tmp_path) == {"one", "two"}


def second_device_fails(how, job, layer, projection, device, on_step):
    """In a worker process: ``cpu:1`` fails at its first unit, ``cpu`` does one and then works until it is stopped."""
    first = unit.fit_unit(job, layer, projection, "cpu") if layer == 0 and device == "cpu" else None
    if device == "cpu:1":
        while not (job.work / "begun").exists():
            time.sleep(0.01)
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("CUDA error: out of patience\nand much more")
    if first:
        return first
    try:
        (job.work / "begun").touch()
        while True:
            on_step(0.5, 0.1)
            time.sleep(0.01)
    except Stopped:
        (job.out.parent / "stopped").touch()
        raise


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "layer 0 up: cpu:1 failed: CUDA error: out of patience. Finished units are kept"),
        ("dies", "layer 0 up: the process that worked on cpu:1 died"),
    ],
)
def test_a_failing_device_is_named(how, message, model, tmp_path, monkeypatch):
    job = prepare(model("qwen3_moe"), tmp_path / "out", FAST)
    with monkeypatch.context() as m:
        m.setattr(running, "fit_unit", partial(second_device_fails, how))
        with pytest.raises(MobeError) as error:
            run(job, quiet=True, device="cpu,cpu:1")
    assert message in error.value.message and "\n" not in error.value.message
    assert "stopped" in names(tmp_path), "the other device must not work on for nothing"
    assert [p.name for p in (job.work / "units").glob("layer-*")] == ["layer-000-gate.safetensors"]
    result = run(prepare(model("qwen3_moe"), tmp_path / "out", FAST, resume=True), quiet=True)
    assert [u.seconds is None for u in result.units] == [True] + 5 * [False]


def children(pid: int) -> set[int]:
    return {int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()}  # fmt: skip


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_job_leaves_no_process_and_goes_on(model, tmp_path):
    source, out, options = model("qwen3_moe"), tmp_path / "out", Options(steps=60)
    process = start(source, out, "--steps", "60", "--published", "--device", "cpu,cpu")
    try:
        deadline = time.monotonic() + 120
        while not list((work_directory(out) / "units").glob("layer-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        left = children(process.pid)
        assert len(left) >= 2
    finally:
        process.kill()
        process.wait()
    while any(map(is_running, left)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    result = run(prepare(source, out, options, resume=True), quiet=True)
    assert result.units[0].seconds is None or result.units[1].seconds is None
    run(prepare(source, tmp_path / "whole", options), quiet=True)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("device", "ray", "message"),
    [
        ("cpu,gpu", None, "'gpu' is no device; expected cpu, cuda, cuda:N or several"),
        ("cuda,cuda:0", None, "cuda:0 is named twice"),
        ("cuda:0,cuda:1", "auto", "Ray hands out the devices; expected --device cpu or --device cuda"),
    ],
)
def test_devices_that_make_no_sense(device, ray, message):
    with pytest.raises(UsageError, match=message):
        Place.of(device, ray)


# a job opened by another process


@pytest.fixture
def address(own_model, tmp_path):
    job = prepare(own_model("qwen3_moe"), tmp_path / "out", FAST)
    with job.workspace.running():
        yield JobAddress.of(job)


def test_a_worker_opens_the_same_job(address):
    job = address.open()
    assert job.settings == address.settings and job.checkpoint.checksum == address.checksum and job.shared


def test_a_worker_that_does_not_see_out(address):
    with pytest.raises(MobeError, match="other.work: not there on .* Every worker must see MODEL, OUT"):
        replace(address, out=address.out.with_name("other")).open()
    (work_directory(address.out) / "lock").write_text("of another run")
    with pytest.raises(MobeError, match="this is another folder than the job's"):
        address.open()


def test_a_worker_that_does_not_see_the_model(address, monkeypatch):
    with pytest.raises(MobeError, match="no such directory\nEvery worker must see MODEL"):
        replace(address, model=address.model / "other").open()
    with pytest.raises(MobeError, match="MODEL is another one on .*expected 123"):
        replace(address, checksum="123").open()
    monkeypatch.setattr(remote, "__version__", "0.0.1")
    with pytest.raises(MobeError, match="has mobe-gguf 0.0.1, the job runs .*; install the same everywhere"):
        address.open()
