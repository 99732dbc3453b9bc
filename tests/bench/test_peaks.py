"""Limits by hand-made peaks, and that every benchmark of decoding runs and agrees with the kernel's own counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"

#: Units a second, all different, that divide well.
RATES = {"fma": 10.0, "bf16": 40.0, "int8": 80.0, "tanh": 5.0, "read": 2.0}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def machine(**without):
    import peaks

    return peaks.Peaks(2, {name: rate for name, rate in RATES.items() if name not in without})


def run(script: str, *options: object) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *map(str, options)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "140"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("quant", "seconds"),
    [
        # mix, project, prompt and multiply of 80 each; 10 evaluations of f
        ("q4_k", 80 / 80 + 80 / 10 + 80 / 80 + 80 / 80 + 10 / 5),
        ("q8_0", 80 / 40 + 80 / 10 + 80 / 80 + 80 / 80 + 10 / 5),
        ("f16", 80 / 10 + 80 / 10 + 80 / 10 + 80 / 10 + 10 / 5),
        ("bf16", 80 / 10 + 80 / 10 + 80 / 10 + 80 / 40 + 10 / 5),
    ],
)
def test_arithmetic_by_type(quant: str, seconds: float) -> None:
    from synthetic import Work

    work = Work(moved=8, mix=80, project=80, prompt=80, multiply=80, evaluate=10)
    assert machine().limits(work, quant) == (4, pytest.approx(seconds))
    assert machine().limit(work, quant) == pytest.approx(max(4, seconds))


def test_a_processor_with_less() -> None:
    from synthetic import Work

    work = Work(moved=1000, mix=80, prompt=80, multiply=80)
    assert machine(bf16=0).limits(work, "q4_k")[1] == pytest.approx(3 * 80 / 80)
    assert machine(bf16=0).limits(work, "bf16")[1] == pytest.approx(3 * 80 / 10)
    assert machine(int8=0, bf16=0).limits(work, "q8_0")[1] == pytest.approx(3 * 80 / 10)
    assert machine().limit(work, "q4_k") == 500  # the bytes


def test_on_more_cores() -> None:
    more = machine().on(8, 3.0)
    assert more.threads == 8 and more.rates["read"] == 3.0
    assert more.rates["int8"] == 80 / 2 * 8


def test_rates_of_processes_add_up() -> None:
    import peaks

    assert peaks.summed([["fma 1.5", "read 2"], ["fma 2.5", "read 3"]]) == {"fma": 4.0, "read": 5.0}


def test_ratio_of_each_round() -> None:
    import stock_speed
    from llama_bench import Speeds

    assert stock_speed.ratios(Speeds([2.0, 3.0]), Speeds([4.0, 3.0])) == [0.5, 1.0]


def test_a_build_is_timed_in_a_process_of_its_own(tmp_path: Path) -> None:
    import builds
    import synthetic

    file = synthetic.pair(tmp_path, "small", "q4_k", 1)[0]
    contender = (file, "llama_cpp", {})
    found = builds.measure({"a": contender, "b": contender}, 1, {"writing": 4, "prompt": 2})
    assert {(task, label, len(v)) for task, s in found.items() for label, v in s.items()} == {
        (task, label, turns) for task, turns in (("writing", 4), ("prompt", 2)) for label in "ab"
    }
    assert min(min(v) for s in found.values() for v in s.values()) > 0
    with pytest.raises(SystemExit):
        builds.Worker((file, "llama_cpp", {"LLAMA_CPP_LIB_PATH": str(tmp_path)}), threads=1)


def test_batches_that_share_a_run() -> None:
    from llama_bench import grouped

    tokens = {1: 64, 2: 64, 4: 64, 16: 128}
    assert grouped([1, 2, 4, 16, 512], tokens) == [([1], 64), ([2, 4], 64), ([16], 128), ([512], 512)]


def test_a_run_loads_the_file_once(tmp_path: Path) -> None:
    """Speeds come in the order of the batches; all tokens of a prompt are computed to the end."""
    import llama_bench

    program = tmp_path / "llama-bench"
    program.write_text(
        f"""#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho '[{{"avg_ts": 5}}, {{"avg_ts": 7}}]'\n"""
    )
    program.chmod(0o755)
    contender = llama_bench.Contender("x", tmp_path / "x.gguf", ("-fa", "0"), program)
    found = llama_bench.compare_each([contender], (16, 64), 128, rounds=2, options=("-t", "1"))
    assert {batch: speeds["x"].values for batch, speeds in found.items()} == {16: [5.0, 5.0], 64: [7.0, 7.0]}
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (
        len(calls) == 2
        and "-n 0 -p 128 -b 16,64 -ub 64 -embd 1 " in calls[0]
        and calls[0].endswith("-t 1 -fa 0")
    )


def test_server_bench(tmp_path: Path) -> None:
    options = ("--shape", "small", "--layers", 1, "--slots", "1,3", "--rounds", 1, "--tokens", 8)
    printed = run("server.py", *options, "--threads", 1, "--dir", tmp_path)
    assert printed.count("±0%") == 4 * 3, printed
