#!/bin/bash
# Build, check and time on a machine with a GPU: the CUDA operator, hybrid placement, the solver. No network needed. Runs in a tree
# made by pack_gpu_tree.sh.
#
#   bench/gpu.sh STEP...     configure  python  build-ops  test  perf  profile  sanitize  factorize  build-tools  hybrid  save  all
#
# Each step stays below 10 minutes on 16 cores, keeps what it prints in $LOGS/STEP.log and can be repeated: a build that ran out of
# time goes on where it stopped. A step that fails does not stop those after it, but for configure and the builds.
#   configure    CMake, for this machine's GPU only, without flash attention (it is most of ggml-cuda's compile time)
#   python       an environment that sees this tree's mobe_gguf and what the python3 that holds PyTorch can import
#   build-ops    ggml-cuda, test-backend-ops, gpu_ops
#   test         test-backend-ops -o MOBE_PROJ, CUDA against CPU: as the operator chooses (also one kernel strictly after the
#                other), then each kernel by force
#   perf         gpu_ops: time and share of memory bandwidth at Qwen3-30B, Qwen3-235B and DeepSeek-V3 shapes; fails where results
#                are not the formula's
#   profile      ncu: memory throughput and stalls of the decode kernel, where counters can be read
#   sanitize     compute-sanitizer (memcheck, racecheck, synccheck) on a few small cases of each kernel
#   factorize    bench/factorize.py on the GPU, Qwen3-30B and DeepSeek-V3 layers; needs configure and python, no build
#   build-tools  llama-bench, llama-completion
#   hybrid       bench/hybrid.py, Qwen3-30B and DeepSeek-V3 shapes (12 layers and 1; 25 GB of disk), few wide bases without an
#                activation: ggml's own operators, no switch; needs python, build-tools
#   save         what was built, in pieces of 15 MB beside the logs; on the next machine, at the same path:
#                mkdir -p build && cat bin.tar.xz.* | tar xJ -C build
# In half an hour of a rented machine, as the GPU is free while the CPU compiles:
#   1  bench/gpu.sh configure python && { bench/gpu.sh factorize & bench/gpu.sh build-ops; wait; }
#   2  bench/gpu.sh build-ops test perf profile     (build-ops: only what 1 did not finish)
#   3  bench/gpu.sh sanitize build-tools save
#   4  bench/gpu.sh hybrid
#
# Needs nvcc, CMake, ninja, g++; python and hybrid also a python3 with torch (CUDA), numpy, rich, click, safetensors, tqdm (the tree
# brings cffi); cuBLAS in the toolkit or in Python's nvidia packages. Missing torch costs factorize and hybrid, nothing else.
# The kernels are off unless GGML_CUDA_MOBE is set (auto, or plain, decode, prompt by force), which this script does.
# Environment: JOBS (all), BUILD (build beside bench), LOGS ($BUILD/logs), CUDA_ARCH (the GPU's), LIMIT seconds of a step (570),
# PYTHON (python3), MODELS ($BUILD/models), SHAPES of hybrid and factorize (qwen3-30b deepseek-v3)
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,/^set /p' "$0" | sed '$d' | cut -c3-; exit 2; }
top=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD:-$top/build}
logs=${LOGS:-$build/logs}
jobs=${JOBS:-$(nproc)}
limit=${LIMIT:-570}
python=${PYTHON:-python3}
shapes=${SHAPES:-qwen3-30b deepseek-v3}
cuda=${CUDA_HOME:-/usr/local/cuda}
export PATH=$cuda/bin:$PATH PYTHONUNBUFFERED=1 GGML_CUDA_MOBE=${GGML_CUDA_MOBE:-auto}
mkdir -p "$logs"

# where cuBLAS is: the toolkit's, or the one that PyTorch's wheels bring (headers and libcublas.so.N, no libcublas.so). A toolkit put
# together from wheels may have the header and no libcublas.so either, which CMake looks for.
cublas=
if [ ! -f "$cuda/include/cublas_v2.h" ] || [ ! -e "$cuda/lib64/libcublas.so" ]; then
    header=$("$python" - <<'PYTHON'
import glob, site, sys
roots = {*site.getsitepackages(), site.getusersitepackages(), *sys.path}
found = sorted(path for root in roots for path in glob.glob(f"{root}/nvidia/*/include/cublas_v2.h"))
print(found[-1] if found else "")
PYTHON
)
    [ -z "$header" ] || cublas=$(dirname "$(dirname "$header")")
fi
# for programs that were built here; PyTorch finds its own
libraries=$build/bin:$cuda/lib64${cublas:+:$cublas/lib}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

configure() {
    local arch=${CUDA_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)}
    local options=()
    if [ -z "$cublas" ] && [ ! -f "$cuda/include/cublas_v2.h" ]; then
        echo "gpu.sh: no cublas_v2.h below $cuda nor in the nvidia packages of $python" >&2
        return 1
    fi
    if [ -n "$cublas" ]; then
        mkdir -p "$build/cublas"
        for name in cublas cublasLt; do
            ln -sf "$(ls "$cublas"/lib/lib$name.so* | head -1)" "$build/cublas/lib$name.so"
            options+=("-DCUDA_${name}_LIBRARY=$build/cublas/lib$name.so")
        done
        # what links with ggml-cuda must find cuBLAS, too
        options+=("-DCMAKE_CUDA_FLAGS=-I$cublas/include" "-DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,$cublas/lib")
    fi
    cmake -G Ninja -S "$top/llama.cpp" -B "$build" -DCMAKE_BUILD_TYPE=Release -DGGML_MOBE_DIR="$top/native/ggml_mobe" \
        -DCMAKE_CUDA_COMPILER="$cuda/bin/nvcc" -DCMAKE_CUDA_ARCHITECTURES="$arch-real" -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON \
        -DGGML_CUDA=ON -DGGML_CUDA_FA=OFF -DGGML_CUDA_FA_ALL_QUANTS=OFF -DGGML_CUDA_NO_VMM=ON -DGGML_CUDA_NCCL=OFF -DGGML_CUDA_GRAPHS=ON \
        -DGGML_CUDA_COMPRESSION_MODE=none -DGGML_RPC=OFF -DGGML_OPENMP=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=ON -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
        -DLLAMA_BUILD_COMMIT=gpu-tree "${options[@]}"
}

python_environment() { # laid out as `mobe-gguf build` installs: the runtime is what is built here
    local env=$build/env
    "$python" -m venv --without-pip "$env"
    local packages
    packages=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    # an environment made by another one's python would not see that one's packages
    "$python" -c 'import site; print(*site.getsitepackages(), site.getusersitepackages(), sep="\n")' > "$packages/gpu-tree.pth"
    echo "$top" >> "$packages/gpu-tree.pth"
    for wheel in "$top"/wheels/*.whl; do
        "$env/bin/python" -m zipfile -e "$wheel" "$packages"
    done
    mkdir -p "$packages/llama_cpp" "$env/share/mobe-gguf"
    ln -sfn "$build/bin" "$packages/llama_cpp/lib"
    ln -sfn "$top/llama.cpp" "$env/share/mobe-gguf/llama.cpp"
    echo '{"format": 1}' > "$env/share/mobe-gguf/runtime.json"
    (cd "$top/bench" && "$env/bin/python" -c '
import cffi, torch, hybrid, factorize
print("torch", torch.__version__, "CUDA", torch.cuda.is_available() and torch.cuda.get_device_name())')
}

in_environment() { # programs of python's environment; they may start what was built here
    [ -x "$build/env/bin/python" ] || { echo "gpu.sh: no $build/env: run gpu.sh python" >&2; return 1; }
    env LD_LIBRARY_PATH="$libraries" timeout "$1" "$build/env/bin/python" "$top/bench/$2" "${@:3}"
}

targets() {
    timeout "$limit" ninja -C "$build" -j"$jobs" "$@" || { echo "gpu.sh: not finished; run the step again to go on" >&2; return 1; }
}

build_ops() { # our kernels in front: an error in them shows early
    local objects
    objects=$(ninja -C "$build" -t targets all | sed -n 's/^\(.*\/mobe-cuda.*\.cu\.o\): .*/\1/p')
    [ -n "$objects" ] || { echo "gpu.sh: the build has no mobe-cuda*.cu: run gpu.sh configure" >&2; return 1; }
    # shellcheck disable=SC2086
    targets $objects test-backend-ops
    g++ -O2 -std=c++17 -I"$top/llama.cpp/ggml/include" -I"$top/native/ggml_mobe" "$top/bench/gpu_ops.cpp" -o "$build/bin/gpu_ops" \
        -L"$build/bin" -lggml -lggml-base -Wl,-rpath,"$build/bin" -Wl,-rpath-link,"$build/bin${cublas:+:$cublas/lib}"
}

ops() { # seconds, then a program that was built here, with assignments in front
    env LD_LIBRARY_PATH="$libraries" timeout "$1" env "${@:2}"
}

check() { # assignments for each way through the operator; every case in test-cases.log
    local failed=0
    : > "$logs/test-cases.log"
    for way in GGML_CUDA_MOBE=auto "GGML_CUDA_MOBE=auto GGML_CUDA_PDL=0" GGML_CUDA_MOBE=plain GGML_CUDA_MOBE=decode GGML_CUDA_MOBE=prompt; do
        echo "== MOBE_PROJ, $way"
        # shellcheck disable=SC2086
        ops 110 $way "$build/bin/test-backend-ops" test -o MOBE_PROJ -b CUDA0 > "$build/test.log" 2>&1 || {
            [ $? != 124 ] || echo "timed out"
            failed=1
        }
        { echo "== $way"; cat "$build/test.log"; } >> "$logs/test-cases.log"
        echo "cases that ran: $(grep -ac 'MOBE_PROJ.*OK' "$build/test.log" || true)"
        grep -aE "FAIL|ERR|rror" "$build/test.log" | head -20 || true
        tail -3 "$build/test.log"
    done
    return $failed
}

perf() {
    local failed=0
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw --format=csv || true
    echo "== as the operator chooses"
    ops 240 "$build/bin/gpu_ops" CUDA0 20 || failed=1
    echo "== one kernel strictly after the other"
    ops 60 GGML_CUDA_PDL=0 "$build/bin/gpu_ops" CUDA0 20 qwen3-30b || failed=1
    echo "== plain kernel"
    ops 60 GGML_CUDA_MOBE=plain "$build/bin/gpu_ops" CUDA0 5 qwen3-30b || failed=1
    return $failed
}

profile() {
    local failed=0
    for shape in qwen3-30b deepseek-v3; do # launches of the first case (q4_k, one token)
        ops 100 ncu --clock-control none -k regex:mobe_combine --launch-skip 1 --launch-count 1 \
            --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis --section WarpStateStats \
            --section SchedulerStats --section LaunchStats --section Occupancy \
            "$build/bin/gpu_ops" CUDA0 1 $shape 1 || failed=1
    done
    return $failed
}

sanitize() {
    local failed=0 tool way
    local cases='type_basis=q4_K,d=512,r=24.*n_tokens=3,|type_basis=q4_K,d=256,r=33.*n_tokens=1,.*tanh|type_basis=q4_0,d=416|d=2304.*n_tokens=1,|type_basis=q8_0,d=256.*n_tokens=64,n_group=2,row_mix=1.*silu'
    for tool_way in "memcheck decode" "racecheck decode" "memcheck prompt" "racecheck prompt" "memcheck plain" "synccheck decode"; do
        read -r tool way <<< "$tool_way"
        echo "== $tool, $way"
        ops 90 GGML_CUDA_MOBE="$way" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$build/bin/test-backend-ops" test -o MOBE_PROJ -b CUDA0 -p "$cases" > "$build/sanitize.log" 2>&1 || failed=1
        grep -a "=========" "$build/sanitize.log" | head -40 || true
        tail -2 "$build/sanitize.log"
    done
    return $failed
}

factorize() {
    local failed=0 end=$((SECONDS + limit))
    for shape in $shapes; do
        in_environment $((end > SECONDS ? end - SECONDS : 1)) factorize.py --models large --device cuda --shapes "$shape" --published 10000 \
            --large-steps "$([ "$shape" = qwen3-30b ] && echo 20 || echo 6)" || failed=1
    done
    return $failed
}

hybrid() { # models are written first; of deepseek-v3 a quarter of the layers
    local failed=0 end=$((SECONDS + limit)) size
    for shape in $shapes; do
        size="--layers 12 --rounds 3"
        [ "$shape" = qwen3-30b ] || size="--layers 4 --rounds 2"
        # shellcheck disable=SC2086
        in_environment $((end > SECONDS ? end - SECONDS : 1)) hybrid.py --device CUDA0 --shapes "$shape" $size \
            --dir "${MODELS:-$build/models}" || failed=1
    done
    return $failed
}

save() {
    rm -f "$logs"/bin.tar.xz.*
    tar -C "$build" -c bin | xz -T0 -3 | split -b 15M - "$logs/bin.tar.xz."
    ls -l "$logs"/bin.tar.xz.*
}

run_step() {
    case $1 in
        configure)   configure ;;
        python)      python_environment ;;
        build-ops)   build_ops ;;
        test)        check ;;
        perf)        perf ;;
        profile)     profile ;;
        sanitize)    sanitize ;;
        factorize)   factorize ;;
        build-tools) targets llama-bench llama-completion ;;
        hybrid)      hybrid ;;
        save)        save ;;
    esac
}

known="configure python build-ops test perf profile sanitize factorize build-tools hybrid save"
# shellcheck disable=SC2086
[ "$*" != all ] || set -- ${known% save}
for step in "$@"; do
    case " $known " in
        *" $step "*) ;;
        *) echo "gpu.sh: no step $step; there are $known" >&2; exit 2 ;;
    esac
done
status=0
for step in "$@"; do
    start=$SECONDS
    failed=0
    # in a process of its own: set -e holds there, whatever is asked of its result here
    (set -e; run_step "$step") > >(tee "$logs/$step.log") 2>&1 &
    wait $! || failed=$?
    echo "== $step: $((SECONDS - start)) s$([ $failed = 0 ] || echo ", FAILED ($failed)")"
    [ $failed = 0 ] || status=1
    case $step in configure | build-*) [ $failed = 0 ] || exit 1 ;; esac
done
exit $status
