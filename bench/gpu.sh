#!/bin/bash
# Build, check and time the CUDA operator on a machine with a GPU; no network needed. Runs in a tree made by pack_gpu_tree.sh.
#
#   bench/gpu.sh STEP...     configure  build-ops  build-tools  test  perf  sanitize  profile  all
#
# Each step stays below 10 minutes on 16 cores and can be repeated: a build that ran out of time goes on where it stopped.
# "all" takes longer: give a machine with a limit the steps one by one (a build lives on between them in $BUILD).
#   configure    CMake, for this machine's GPU only, without flash attention (it is most of ggml-cuda's compile time)
#   build-ops    ggml-cuda, test-backend-ops, gpu_ops
#   build-tools  llama-bench, llama-completion
#   test         test-backend-ops -o MOBE_PROJ, CUDA against CPU: as the operator chooses, then each kernel by force
#   perf         gpu_ops: time and share of memory bandwidth at Qwen3-30B, Qwen3-235B and DeepSeek-V3 shapes
#   sanitize     compute-sanitizer (memcheck, racecheck) on a few small cases of each kernel
#   profile      ncu: memory throughput and stalls of the decode kernel, where counters can be read
# The kernels are off unless GGML_CUDA_MOBE is set (auto, or plain, decode, prompt by force), which this script does.
# Environment: JOBS (16), BUILD (build beside bench), CUDA_ARCH (the GPU's), LIMIT seconds a build step (570)
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,/^set /p' "$0" | sed '$d' | cut -c3-; exit 2; }
top=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD:-$top/build}
jobs=${JOBS:-$(nproc)}
limit=${LIMIT:-570}
cuda=${CUDA_HOME:-/usr/local/cuda}
export PATH=$cuda/bin:$PATH

# where cuBLAS is: the toolkit's, or the one that PyTorch's wheels bring (headers and libcublas.so.N, no libcublas.so)
cublas=
if [ ! -f "$cuda/include/cublas_v2.h" ]; then
    header=$(python3 - <<'PYTHON'
import glob, site, sys
roots = {*site.getsitepackages(), site.getusersitepackages(), *sys.path}
found = sorted(path for root in roots for path in glob.glob(f"{root}/nvidia/*/include/cublas_v2.h"))
print(found[-1] if found else "")
PYTHON
)
    [ -n "$header" ] || { echo "gpu.sh: no cublas_v2.h below $cuda nor in Python's nvidia packages" >&2; exit 1; }
    cublas=$(dirname "$(dirname "$header")")
    export LD_LIBRARY_PATH=$cublas/lib:${LD_LIBRARY_PATH:-}
fi
export LD_LIBRARY_PATH=$build/bin:$cuda/lib64:${LD_LIBRARY_PATH:-}

configure() {
    local arch=${CUDA_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)}
    local options=()
    if [ -n "$cublas" ]; then
        mkdir -p "$build/cublas"
        for name in cublas cublasLt; do
            ln -sf "$(ls "$cublas"/lib/lib$name.so* | head -1)" "$build/cublas/lib$name.so"
            options+=("-DCUDA_${name}_LIBRARY=$build/cublas/lib$name.so")
        done
        options+=("-DCMAKE_CUDA_FLAGS=-I$cublas/include")
    fi
    cmake -G Ninja -S "$top/llama.cpp" -B "$build" -DCMAKE_BUILD_TYPE=Release -DGGML_MOBE_DIR="$top/native/ggml_mobe" \
        -DCMAKE_CUDA_COMPILER="$cuda/bin/nvcc" -DCMAKE_CUDA_ARCHITECTURES="$arch-real" -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON \
        -DGGML_CUDA=ON -DGGML_CUDA_FA=OFF -DGGML_CUDA_FA_ALL_QUANTS=OFF -DGGML_CUDA_NO_VMM=ON -DGGML_CUDA_NCCL=OFF -DGGML_CUDA_GRAPHS=ON \
        -DGGML_CUDA_COMPRESSION_MODE=none -DGGML_RPC=OFF -DGGML_OPENMP=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=ON -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
        -DLLAMA_BUILD_COMMIT=gpu-tree "${options[@]}"
}

targets() {
    timeout "$limit" ninja -C "$build" -j"$jobs" "$@" || { echo "gpu.sh: not finished; run the step again to go on" >&2; exit 1; }
}

build_ops() { # our kernels first: an error in them shows at once
    local objects
    objects=$(ninja -C "$build" -t targets all | sed -n 's/^\(.*\/mobe-cuda.*\.cu\.o\): .*/\1/p')
    [ -n "$objects" ] || { echo "gpu.sh: the build has no mobe-cuda*.cu: run gpu.sh configure" >&2; exit 1; }
    # shellcheck disable=SC2086
    targets $objects
    targets test-backend-ops
    g++ -O2 -std=c++17 -I"$top/llama.cpp/ggml/include" -I"$top/native/ggml_mobe" "$top/bench/gpu_ops.cpp" -o "$build/bin/gpu_ops" \
        -L"$build/bin" -lggml -lggml-base -Wl,-rpath,"$build/bin" -Wl,-rpath-link,"$build/bin"
}

build_tools() { targets llama-bench llama-completion; }

check() { # environment assignments for each way through the operator
    local failed=0
    for path in "" plain decode prompt; do
        echo "== MOBE_PROJ, kernel: ${path:-as the operator chooses}"
        env GGML_CUDA_MOBE=${path:-auto} "$build/bin/test-backend-ops" test -o MOBE_PROJ -b CUDA0 > "$build/test-${path:-auto}.log" 2>&1 || failed=1
        grep -aE "FAIL|not supported|ERR" "$build/test-${path:-auto}.log" | head -20 || true
        tail -3 "$build/test-${path:-auto}.log"
    done
    return $failed
}

perf() {
    nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,power.draw --format=csv
    for path in "" plain; do
        echo "== kernel: ${path:-as the operator chooses}"
        env GGML_CUDA_MOBE=${path:-auto} timeout 280 "$build/bin/gpu_ops" CUDA0 20 "${path:+qwen3-30b}" || true
    done
}

sanitize() {
    local failed=0
    for tool in memcheck racecheck; do
        for path in plain decode prompt; do
            for case in 'type_basis=q4_K,d=512,r=24.*n_tokens=3,' 'type_basis=q4_0,d=416' 'type_basis=q8_0,d=256.*n_tokens=64,n_group=2,row_mix=1.*silu'; do
                echo "== $tool, $path, $case"
                env GGML_CUDA_MOBE=$path timeout 100 compute-sanitizer --tool $tool --error-exitcode 9 \
                    "$build/bin/test-backend-ops" test -o MOBE_PROJ -b CUDA0 -p "$case" 2>&1 | tail -4 || failed=1
            done
        done
    done
    return $failed
}

profile() {
    timeout 300 ncu --clock-control none -k regex:mobe_combine --launch-skip 4 --launch-count 2 \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats --section LaunchStats --section Occupancy \
        "$build/bin/gpu_ops" CUDA0 1 "${1:-qwen3-30b}"
}

for step in "$@"; do
    start=$SECONDS
    case $step in
        configure)   configure ;;
        build-ops)   build_ops ;;
        build-tools) build_tools ;;
        test)        check ;;
        perf)        perf ;;
        sanitize)    sanitize ;;
        profile)     profile ;;
        all)         configure; build_ops; check; perf; sanitize; build_tools ;;
        *)           echo "gpu.sh: no step $step" >&2; exit 2 ;;
    esac
    echo "== $step: $((SECONDS - start)) s"
done
