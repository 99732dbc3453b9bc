"""The operator's cases in llama.cpp's own test-backend-ops: the kernel against the reference, every type, odd shapes."""

from __future__ import annotations

import re
import subprocess

from mobe_gguf import runtime


def test_all_cases_pass():
    tool = runtime.tool("test-backend-ops")  # built by `mobe-gguf build --test-tools`
    command = [tool, "test", "-b", "CPU", "-o", "MOBE_PROJ"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    passed, total = map(int, re.search(r"(\d+)/(\d+) tests passed", text).groups())
    assert passed == total > 200, text[-3000:]
