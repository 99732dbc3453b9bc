#!/bin/bash
# Pack what a machine with a GPU and no network needs to build, check and time the CUDA operator, hybrid placement and the solver:
# the pinned llama.cpp, patched, without other backends and large data; this checkout's native/ggml_mobe, mobe_gguf and bench;
# Python packages that a machine with PyTorch need not have, as wheels.
#
#   bench/pack_gpu_tree.sh OUT.tar.xz     then, there:  tar xf OUT.tar.xz && gpu-tree/bench/gpu.sh (prints what to do)
#
# Needs the package's environment (python with mobe_gguf); the source distribution is fetched unless the cache has it, the wheels
# from PyPI. Environment: PYTHON (.venv/bin/python, else python3), PYTHON_VERSION of the other machine (3.12; x86-64, glibc 2.28 or newer).
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 OUT.tar.xz" >&2; exit 2; }
out=$(realpath -m "$1")
repo=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$repo/.venv/bin/python" ] || python=$repo/.venv/bin/python
"$python" -c 'import mobe_gguf.runtime.compile' 2>/dev/null ||
    { echo "$0: $python lacks mobe_gguf or what it needs; run make, or name another: PYTHON=.../bin/python $0 $1" >&2; exit 1; }
work=$(mktemp -d "${TMPDIR:-/tmp}/gpu-tree.XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/gpu-tree

cd "$repo"
"$python" - "$work/sdist" <<'PYTHON'
import sys
from pathlib import Path

from mobe_gguf.core import resources
from mobe_gguf.runtime import compile, patch, source

tree, env, cache = Path(sys.argv[1]), compile.environment(), source.cache_dir()
cache.mkdir(parents=True, exist_ok=True)
source.unpack(source.fetch(source.LLAMA_CPP, cache, env), source.LLAMA_CPP, tree)
patch.apply(tree, sorted(resources.path("patches").glob("*.patch")), env)
PYTHON

mkdir -p "$tree/bench" "$tree/native" "$tree/wheels" "$tree/llama.cpp"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$tree/wheels" cffi pycparser

cd "$work/sdist/vendor/llama.cpp"
# ggml's other backends; what tools carry for a browser or for tests; documents, models, other languages
for backend in ggml/src/ggml-*/; do
    case $backend in
        */ggml-cpu/ | */ggml-cuda/ | */ggml-rpc/) ;;
        *) rm -rf "$backend" ;;
    esac
done
find . -type f \( -name '*.gguf' -o -name '*.png' -o -name '*.jpg' -o -name '*.jpeg' -o -name '*.mp3' -o -name '*.wav' \
    -o -name '*.gif' -o -name '*.svg' -o -name '*.pdf' -o -name '*.gz' -o -name '*.zip' \) -delete
cp -r CMakeLists.txt cmake ggml src include common vendor tests tools gguf-py conversion LICENSE "$tree/llama.cpp/"
[ ! -d licenses ] || cp -r licenses "$tree/llama.cpp/"
cd "$repo"
cp -r native/ggml_mobe "$tree/native/"
cp -r mobe_gguf LICENSE "$tree/"
cp bench/*.sh bench/*.py bench/*.cpp "$tree/bench/"
find "$tree" -name __pycache__ -prune -exec rm -rf {} +

tar -C "$work" -cJf "$out" gpu-tree
echo "$out: $(du -k "$out" | cut -f1) KiB" >&2
