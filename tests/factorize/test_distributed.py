"""Units on a real Ray cluster of this machine: two nodes, three worker processes, one of which is killed at work."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.factorize.job import prepare, run, running, unit
from mobe_gguf.factorize.plan import Options

from .test_job import FAST, contents, names

OPTIONS = Options(steps=10)


def test_without_ray(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MobeError, match=r"pip install 'mobe-gguf\[ray\]'"):
        run(prepare(model("qwen3_moe"), tmp_path / "out", FAST), quiet=True, ray="auto")
    assert names(tmp_path) == set()


@pytest.fixture(scope="module")
def ray_address():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mobe-gguf[ray]'")
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))  # workers import functions of this file
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()
    patch.undo()


def waits_to_be_killed(folder, job, layer, projection, device, on_step):
    """In a worker: the first one at layer 1's up stops after its first step and says who it is."""

    def step(share, error):
        if (layer, projection) == (1, "up") and not (folder / "victim").exists():
            (folder / "part").write_text(str(os.getpid()))
            os.rename(folder / "part", folder / "victim")
            time.sleep(600)
        on_step(share, error)

    result = unit.fit_unit(job, layer, projection, device, step)
    (folder / f"{layer}.{projection}").write_text(str(os.getpid()))
    return result


def test_a_killed_worker_s_unit_goes_to_another(ray_address, model, tmp_path, monkeypatch, capfd):
    """Begun here, gone on with on the cluster, a worker killed: the files of one run here."""
    source, out = model("qwen3_moe"), tmp_path / "out"
    run(prepare(source, tmp_path / "whole", OPTIONS), quiet=True)
    (tmp_path / "seen").mkdir()
    fit, calls = unit.fit, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(unit, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            run(prepare(source, out, OPTIONS), quiet=True, workers=1)

    def kill():
        while not (tmp_path / "seen" / "victim").exists():
            time.sleep(0.01)
        os.kill(int((tmp_path / "seen" / "victim").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    monkeypatch.setattr(running, "fit_unit", partial(waits_to_be_killed, tmp_path / "seen"))
    result = run(prepare(source, out, Options(), resume=True), ray=ray_address)
    killer.join()
    assert "layer 1 up: its worker died (WorkerCrashedError), given to another" in capfd.readouterr().err
    seen = {p.name: p.read_text() for p in (tmp_path / "seen").iterdir()}
    assert seen["1.up"] != seen["victim"] and len(set(seen.values()) - {seen["victim"]}) >= 2
    assert [u.seconds is None for u in result.units] == [True] + 5 * [False]
    assert contents(out) == contents(tmp_path / "whole")
    assert names(tmp_path) == {"whole", "out", "seen"}


def diverges(job, layer, projection, device, on_step):
    if (layer, projection) == (2, "up"):
        while len(list((job.work / "units").glob("layer-*"))) < 2:
            time.sleep(0.01)
        raise MobeError("layer 2 up: the fit diverged")
    return unit.fit_unit(job, layer, projection, device, on_step)


def test_a_failing_unit_stops_the_job_which_goes_on_here(ray_address, model, tmp_path, monkeypatch):
    source, out = model("qwen3_moe"), tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(running, "fit_unit", diverges)
        with pytest.raises(MobeError) as error:
            run(prepare(source, out, OPTIONS), quiet=True, ray=ray_address)
    assert error.value.message == "layer 2 up: the fit diverged" and type(error.value) is MobeError
    result = run(prepare(source, out, Options(), resume=True), quiet=True)
    assert sum(u.seconds is None for u in result.units) >= 2
    run(prepare(source, tmp_path / "whole", OPTIONS), quiet=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_the_cluster_does_not_have(ray_address, model, tmp_path):
    with pytest.raises(UsageError, match="none of the cluster's 2 machines has a GPU"):
        run(prepare(model("qwen3_moe"), tmp_path / "out", FAST), quiet=True, ray=ray_address, device="cuda")
    assert names(tmp_path) == set()


def test_no_cluster(ray_address, model, tmp_path):
    with pytest.raises(MobeError, match=r"--ray nonsense: cannot be used .*\n.*ray start --head"):
        run(prepare(model("qwen3_moe"), tmp_path / "out", FAST), quiet=True, ray="nonsense")
    assert names(tmp_path) == set()
