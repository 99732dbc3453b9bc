#!/bin/bash
# Pack what a machine with a GPU and no network needs to build, check and time the CUDA operator: the pinned llama.cpp, patched,
# without other backends and large data, and this checkout's native/ggml_mobe and bench.
#
#   bench/pack_gpu_tree.sh OUT.tar.xz           then, there:  tar xf OUT.tar.xz && gpu-tree/bench/gpu.sh all
#
# Needs the package's environment (python with mobe_gguf); the source distribution is fetched unless the cache has it.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 OUT.tar.xz" >&2; exit 2; }
out=$(realpath -m "$1")
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/gpu-tree.XXXXXX")
trap 'rm -rf "$work"' EXIT

cd "$repo"
"${PYTHON:-python3}" - "$work/sdist" <<'PYTHON'
import sys
from pathlib import Path

from mobe_gguf import resources
from mobe_gguf.runtime import compile, patch, source

tree, env, cache = Path(sys.argv[1]), compile.environment(), source.cache_dir()
cache.mkdir(parents=True, exist_ok=True)
source.unpack(source.fetch(source.LLAMA_CPP, cache, env), source.LLAMA_CPP, tree)
patch.apply(tree, sorted(resources.path("patches").glob("*.patch")), env)
PYTHON

cd "$work/sdist/vendor/llama.cpp"
mkdir -p "$work/gpu-tree/bench" "$work/gpu-tree/native"
# ggml's other backends; what tools carry for a browser or for tests; documents, models, other languages
for backend in ggml/src/ggml-*/; do
    case $backend in
        */ggml-cpu/ | */ggml-cuda/ | */ggml-rpc/) ;;
        *) rm -rf "$backend" ;;
    esac
done
find . -type f \( -name '*.gguf' -o -name '*.png' -o -name '*.jpg' -o -name '*.jpeg' -o -name '*.mp3' -o -name '*.wav' \
    -o -name '*.gif' -o -name '*.svg' -o -name '*.pdf' -o -name '*.gz' -o -name '*.zip' \) -delete
mkdir "$work/gpu-tree/llama.cpp"
cp -r CMakeLists.txt cmake ggml src include common vendor tests tools LICENSE "$work/gpu-tree/llama.cpp/"
[ ! -d licenses ] || cp -r licenses "$work/gpu-tree/llama.cpp/"
cp -r "$repo/native/ggml_mobe" "$work/gpu-tree/native/"
cp "$repo"/bench/gpu.sh "$repo"/bench/gpu_ops.cpp "$work/gpu-tree/bench/"

tar -C "$work" -cJf "$out" gpu-tree
echo "$out: $(du -k "$out" | cut -f1) KiB" >&2
