"""The memory that a plan says, against what a unit takes; and how many units are at work at once."""

from __future__ import annotations

import json
from pathlib import Path

import peak
import pytest
import torch
from formats.test_imatrix import write as write_imatrix
from safetensors.torch import save_file

from mobe_gguf.core.executors import pieces_at_once
from mobe_gguf.core.executors import threads as workers
from mobe_gguf.factorize.job import prepare
from mobe_gguf.factorize.plan import Options, unit_memory
from mobe_gguf.factorize.solver import Settings
from mobe_gguf.formats.moments import KEY

N, P, D, DIRECTIONS = 48, 256, 512, 192

#: Prints the plan's bytes and those at the peak.
UNIT = """
import json, sys
import peak, torch
from pathlib import Path
from mobe_gguf.factorize.job import prepare
from mobe_gguf.factorize.plan import Options
from mobe_gguf.factorize.solver import Settings, fit
from mobe_gguf.factorize.job.unit import fit_unit

torch.set_num_threads(1)
model, out, options = sys.argv[1:]
options = Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(options).items()})
job = prepare(Path(model), Path(out), options)
fit(torch.randn(4, 32, 64), Settings(2, 32, steps=1))  # what any fit loads
with job.workspace.running(), peak.watched() as taken:
    fit_unit(job, *job.settings.units()[0], "cpu")
print(job.plan.memory_bytes, taken[0])
"""


@pytest.fixture(scope="module")
def large(model) -> Path:
    """A layer whose matrices are so large that nothing else counts: W takes 25 MB."""
    sizes = dict(num_hidden_layers=1, num_experts=N, hidden_size=D, moe_intermediate_size=P)
    return model("qwen3_moe", dtype=torch.bfloat16, **sizes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """An imatrix and moments, which are good for their sizes."""
    folder = tmp_path_factory.mktemp("weights")
    imatrix = write_imatrix(folder / "i.gguf", (torch.rand(N, D) + 0.1).numpy(), [10.0] * N, layer=0)
    moments, about = folder / "m.safetensors", {"version": 1}
    tensors = {
        "layers.0.gate_up.root": torch.rand(N, D, DIRECTIONS).half(),
        "layers.0.gate_up.rest": torch.rand(N, D).half() + 0.1,
        "layers.0.down.root": torch.eye(P).half().repeat(N, 1, 1),
    }
    save_file(tensors, moments, {KEY: json.dumps(about)})
    return {"imatrix": str(imatrix), "moments": str(moments)}


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("mse", {}),
        ("mse", {"groups": 4, "mix": "row"}),
        ("mse", {"for_basis": "q4_0", "for_transform": "q4_0"}),
        ("imatrix", {}),
        ("moments", {}),
        ("imatrix", {"bases": 4, "rank": 32}),  # here weighing W takes most
        ("moments", {"bases": 4, "rank": 32}),
        ("mse", {"projections": ["down"]}),
        ("mse", {"activation": "none", "bases": 3, "rank": 320, "steps": 9}),
        ("moments", {"activation": "none", "bases": 2, "rank": 320, "steps": 9}),
        ("moments", {"projections": ["down"]}),
    ],
)
def test_the_plan_says_what_a_unit_takes(objective, options, large, weights, tmp_path):
    """At most a twentieth more is taken, and the 4 MB that products of any size work in, or a third less."""
    options = {"steps": 2, "bases": 16, "rank": 96} | options
    if objective != "mse":
        options[objective] = weights[objective]
    plan, found = map(int, peak.run(UNIT, large, tmp_path / "out", json.dumps(options)).split())
    assert plan / 1.35 < found < 1.05 * plan + 4e6, f"{found / 1e6:.0f} MB, the plan says {plan / 1e6:.0f}"


def test_bases_count_seven_times():
    """B where it starts and where it is, the best, its gradient, Adam's two moments and the root of one."""
    few, many = (unit_memory(Settings(m, 32), 64, 48, 64) for m in (8, 16))
    assert many - few == pytest.approx(1.05 * 7 * 4 * 8 * 32 * 64, rel=1e-3)


def test_units_at_once(model, tmp_path, monkeypatch):
    """On a CPU as many as threads and half of the memory allow, but one at least."""
    job = prepare(model("qwen3_moe"), tmp_path / "out", Options(steps=1))
    one = job.plan.memory_bytes
    monkeypatch.setattr(workers.torch, "get_num_threads", lambda: 8)
    for free, expected in ((2 * 3.5 * one, 3), (0.1 * one, 1), (100 * one, 6)):
        monkeypatch.setattr(workers, "free_memory", lambda free=free: free)
        assert pieces_at_once(one, 6, "cpu") == expected
    monkeypatch.setattr(workers.torch, "get_num_threads", lambda: 2)
    assert pieces_at_once(one, 6, "cpu") == 2
    monkeypatch.setattr(workers, "free_memory", lambda: 0)
    assert pieces_at_once(one, 6, "cuda:0,cuda:1") == 2
