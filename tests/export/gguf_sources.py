"""GGUF files made of others: gate and up as one tensor, another alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mobe_gguf.formats.gguf import GgufTensor, read_gguf


def raw(info: GgufTensor) -> np.ndarray:
    """A tensor's bytes."""
    return np.fromfile(info.file, np.uint8, info.n_bytes, offset=info.offset)


def rewritten(
    source: Path, out: Path, *, merge: bool = False, alignment: int | None = None, **added: Any
) -> Path:
    """The same model written by gguf-py: ``merge`` gate and up of all experts in one tensor, gate first; ``alignment`` of the
    data; ``added`` float32 tensors, ``_`` in their names for ``.``."""
    import gguf

    reader, file = gguf.GGUFReader(source), read_gguf(source)
    writer = gguf.GGUFWriter(out, file.arch)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.alignment"):
            kind, of = field.types[0], field.types[-1]
            writer.add_key_value(
                key, field.contents(), kind, of if kind == gguf.GGUFValueType.ARRAY else None
            )
    for name, info in file.tensors.items():
        shape, data = info.shape, raw(info)
        if merge and name.endswith("ffn_up_exps.weight"):
            continue
        if merge and name.endswith("ffn_gate_exps.weight"):
            up = file.tensors[name.replace("gate", "up")]
            assert up.type == info.type
            data = np.concatenate([data.reshape(shape[0], -1), raw(up).reshape(shape[0], -1)], axis=1)
            name, shape = name.replace("gate", "gate_up"), (shape[0], 2 * shape[1], shape[2])
        ggml_type = gguf.GGMLQuantizationType[info.type.upper()]
        writer.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=ggml_type)
    for name, array in added.items():
        writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
