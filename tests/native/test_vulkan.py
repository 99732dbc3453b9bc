"""MoBE files on a Vulkan device: the operator on the CPU, all else on the device; files without activation wholly there.

Skips where the installed runtime has no Vulkan backend (`mobe-gguf build --vulkan`) or no driver offers a device.  A software
driver will do: Mesa's llvmpipe, which ggml-vulkan takes only when GGML_VK_VISIBLE_DEVICES names it.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from parity.gguf_files import factorize, qwen3moe

from mobe_gguf import runtime
from mobe_gguf.core import names, resources

#: Factors, and whether it takes the operator to run them.
FORMS = {
    "plain": (None, False),
    "tanh": (dict(activation="tanh"), True),
    "tanh-down": (dict(activation="tanh", projections=names.ALL_PROJECTIONS), True),
    "none": (dict(activation="none"), False),
    "none-down": (dict(activation="none", projections=names.ALL_PROJECTIONS), False),
    "none-row": (dict(activation="none", by_row=True), True),
}


def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    env = {"GGML_VK_VISIBLE_DEVICES": "0", **os.environ, "GGML_SCHED_DEBUG": "2"}
    return subprocess.run(
        [runtime.tool(tool), *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        env=env,
        timeout=300,
    )


@pytest.fixture(scope="module")
def device() -> str:
    """The device's name in llama.cpp."""
    tool = runtime.tool("llama-perplexity").resolve()
    if not list(tool.parent.glob("libggml-vulkan*")):
        pytest.skip("the installed runtime has no Vulkan backend: mobe-gguf build --vulkan")
    found = re.search(r"^ *(Vulkan\d+):", run("llama-perplexity", "--list-devices").stdout, re.MULTILINE)
    if not found:
        pytest.skip("there is no Vulkan device: apt install mesa-vulkan-drivers has one in software")
    return found[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vulkan") / "text.txt"
    path.write_text((resources.path("models") / "heldout.txt").read_text(encoding="utf-8")[:600], "utf-8")
    return path


def perplexities(done: subprocess.CompletedProcess[str]) -> list[float]:
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(value) for value in re.findall(r"\[\d+\]([0-9.]+),", done.stdout)]


def operators(log: str, backend: str) -> set[str]:
    """What ``backend`` computes by the scheduler's log, which cuts names off."""
    nodes = re.findall(r"node #\s*\d+ \(\s*(\w+)\):.*?\[\s*(\w+)\s", log)
    return {operator for operator, place in nodes if place == backend[:5]}


@pytest.mark.parametrize("form", FORMS)
def test_computes_what_the_cpu_does(device, text, tmp_path, form):
    factors, by_operator = FORMS[form]
    model = (factorize(qwen3moe(), **factors) if factors else qwen3moe()).write(tmp_path / "model.gguf")
    # four sequences in a batch, a part of each at a time: some parts ask for no output
    options = ("-m", model, "-f", text, "-c", "64", "-b", "256", "-ub", "64", "-t", "1", "-v")
    there = run("llama-perplexity", *options, "-ngl", "99", "-dev", device)
    got, alone = perplexities(there), perplexities(run("llama-perplexity", *options, "-dev", "none"))
    assert len(got) >= 4 and got == pytest.approx(alone, rel=2e-3)  # seen: 6e-4

    log = there.stdout + there.stderr
    # (token embeddings are looked up on the CPU, as llama.cpp has it)
    assert operators(log, "CPU") == {"GET_ROWS"} | ({"MOBE_PROJ"} if by_operator else set())
    assert {"MUL_MAT", "MUL_MAT_ID"} <= operators(log, device)


def test_backend_ops_says_that_it_is_not_supported(device):
    done = run("test-backend-ops", "test", "-b", device, "-o", "MOBE_PROJ")
    cases = [line for line in done.stdout.splitlines() if "MOBE_PROJ(" in line]
    assert done.returncode == 0 and len(cases) > 200, done.stdout[-2000:] + done.stderr[-2000:]
    assert all(f"not supported [{device}]" in case for case in cases)
