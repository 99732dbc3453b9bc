"""``--fit``: what does not fit on a device stays in system memory: A and down, not the bases.

The device is a loopback RPC server, told to leave free all but a few megabytes.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mobe_gguf import runtime

from .test_rpc import server, server_program  # noqa: F401 - a fixture

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("room", [20, 26])
def test_bases_go_to_the_device(room, server_program, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(str(BENCH))
    import synthetic

    model = synthetic.pair(tmp_path, "small", "q4_k", 8)[1]
    assert model.stat().st_size > 30e6
    with server(server_program, tmp_path / "log") as endpoint:
        bench = [runtime.tool("llama-bench"), "-rpc", endpoint]
        listed = subprocess.run([*bench, "--list-devices"], capture_output=True, text=True, check=True)
        free = int(re.search(r"(\d+) MiB free", listed.stdout)[1])
        fit = ["-fitt", str(free - room), "-fitc", "512", "-p", "0", "-n", "2", "-r", "1", "-t", "1", "-v"]
        done = subprocess.run([*bench, "-m", model, *fit], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-3000:]
    final = done.stderr[done.stderr.rindex("offloaded") :]
    placed = {
        name: float(size) for name, size in re.findall(r"(\S+) model buffer size = +([\d.]+) MiB", final)
    }
    on_device = next(size for name, size in placed.items() if name.startswith("RPC0"))
    # as much as there is room for (beside the context), and no more
    assert room - 6 < on_device < room
    last = done.stderr[done.stderr.rindex("loaded meta data") :]  # those before tried a placement
    kept = re.findall(r"tensor blk\.(\d+)\.(\S+) .* buffer type overridden to CPU", last)
    assert {"ffn_down_exps.weight", "ffn_gate_exps.weight"} <= {name for _, name in kept}
    # a layer on the border may be cut anywhere
    assert len({layer for layer, name in kept if "basis" in name}) <= 1
    assert len({layer for layer, name in kept if "exps" in name}) >= 2
