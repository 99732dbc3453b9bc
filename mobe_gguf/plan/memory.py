"""The runtime's memory besides the weights, as the runtime itself reports it.

A sparse file with the model's keys and tensor table is written, and llama.cpp opens it without allocating
(``no_alloc``).  It then reports the sizes of its KV cache, recurrent states and compute buffers.  So sliding windows,
MLA and linear attention are counted as they are run, without formulas of ours.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobe_gguf.core.errors import MobeError
from mobe_gguf.plan.layout import Layout
from mobe_gguf.quant.mixture import Spec
from mobe_gguf.quant.recipe import Recipe, plan
from mobe_gguf.runtime import ggml

#: Tokens of a prompt that are computed at once: llama.cpp's default for ``-ub``.
UBATCH = 512

#: Lines of llama.cpp's log; the first group is the size in MiB.  A cache prints a line for each of its parts.
STATES = re.compile(r"(?:kv_cache\w*|memory_recurrent):\s+size =\s+([\d.]+) MiB")
COMPUTE = re.compile(r"compute buffer size =\s+([\d.]+) MiB")

SECONDS = 300


@dataclass(frozen=True)
class Beside:
    """Bytes besides the weights: ``states`` (KV cache and recurrent states at the full context), ``compute``
    buffers."""

    states: int
    compute: int


def beside_weights(layout: Layout, ctx: int) -> Beside:
    """llama.cpp's memory for a context of ``ctx`` tokens: one sequence, f16 cache, default batch.

    MobeError if llama.cpp does not load the model's tensor table.
    """
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-") as directory:
        path = layout.file or Path(directory) / "table.gguf"
        if layout.file is None:
            write_table(path, layout)
        done = subprocess.run(
            [sys.executable, "-m", "mobe_gguf.plan.memory", str(path), str(ctx)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
        return Beside(round(answer["states"]), round(answer["compute"]))
    except (IndexError, ValueError, KeyError, TypeError) as e:
        said = next(
            (line for line in reversed(lines + done.stderr.splitlines()) if "error" in line.lower()), ""
        )
        raise MobeError(
            f"{layout.name}: llama.cpp does not load a file with these keys and tensors: {said}"
        ) from e


def write_table(path: Path, layout: Layout, types: Mapping[str, str] | None = None) -> None:
    """Write a sparse GGUF file with the layout's keys and tensors in ``types`` (4-bit ones by default)."""
    import gguf

    if types is None:
        specs = [Spec(name, shape) for name, shape in layout.tensors.items()]
        types = {name: choice.type for name, choice in plan(specs, Recipe("q4_0"), layout.facts).items()}
    writer = gguf.GGUFWriter(path=None, arch=layout.arch)
    writer.kv_data = [dict(layout.typed_keys)]
    end = 0
    for name, shape in layout.tensors.items():
        info = ggml.type_info(types[name])
        n_bytes = info.tensor_bytes(shape)
        stored = (*shape[:-1], info.row_bytes(shape[-1])) if info.quantized else shape
        dtype = {"f32": "float32", "f16": "float16"}.get(types[name], "uint8")
        writer.add_tensor_info(
            name,
            stored,
            _dtype(dtype),
            n_bytes,
            raw_dtype=gguf.GGMLQuantizationType(info.id) if info.quantized else None,
        )
        end += math.ceil(n_bytes / writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as f:
        head = math.ceil(f.seek(0, 2) / writer.data_alignment) * writer.data_alignment
        f.truncate(head + end)


def _dtype(name: str) -> Any:
    import numpy as np

    return np.dtype(name)


def _ask(path: str, ctx: int) -> dict[str, float]:
    """The sizes that llama.cpp reports.  Called in a process of its own, because llama.cpp ends the process if it
    rejects a file."""
    import ctypes

    import llama_cpp

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def log(_level: int, text: bytes, _data: Any) -> None:
        lines.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.no_alloc, model_params.n_gpu_layers = True, 0
    model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_ubatch, params.n_batch = ctx, UBATCH, max(UBATCH, 2048)
        params.swa_full = False  # as the programs do; the library keeps whole windows by default
        llama_cpp.llama_init_from_model(model, params)
    text = "".join(lines)
    states = sum(float(size) for size in STATES.findall(text))
    compute = sum(float(size) for size in COMPUTE.findall(text))
    if not compute:
        print(text)
        return {}
    return {"states": states * 2**20, "compute": compute * 2**20}


if __name__ == "__main__":
    print(json.dumps(_ask(sys.argv[1], int(sys.argv[2]))))
