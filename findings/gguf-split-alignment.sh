#!/usr/bin/env bash
# gguf-py writes a split model with a custom alignment whose second and later files its own reader reads shifted.
#
# Versions: gguf 0.19.0, numpy 2.4.6.
# Behaviour: GGUFWriter pads the data of every file of a set to add_custom_alignment's value, and writes the key general.alignment
#   into the first file alone. GGUFReader takes each file's own key, 32 where there is none, and begins the others' data too early:
#   zeros of the padding, then the tensor less its end. Nothing is said; shapes and types are right.
# Matters: a large model comes in parts, and an alignment of its own is what file systems with large pages are tuned by.
# Output seen:
#   file 1: alignment 256, begins with 1.0; file 2: alignment 32, begins with 0.0; file 3: alignment 32, begins with 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
cd "$work"
"$work/env/bin/python" -W ignore - <<'PYTHON'
import glob

import gguf
import numpy as np

writer = gguf.GGUFWriter("m.gguf", "test", split_max_tensors=1)
writer.add_custom_alignment(256)
for i in (1, 2, 3):
    writer.add_tensor(f"t{i}", np.full((4, 64), i, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
found = []
for path in sorted(glob.glob("m-*.gguf")):
    reader = gguf.GGUFReader(path)
    found.append((reader.alignment, float(reader.tensors[0].data.flat[0])))
print("; ".join(f"file {i}: alignment {a}, begins with {v}" for i, (a, v) in enumerate(found, 1)))
assert found == [(256, 1), (32, 0), (32, 0)]
PYTHON
