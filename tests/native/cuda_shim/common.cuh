// Stands in for ggml-cuda's common.cuh, so that a C++ compiler can build the operator's kernels for the CPU: the threads of a
// block are fibers that run in turn and meet at barriers; warp instructions exchange through memory. Exact, slow, no races seen.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>

#include "ggml.h"

#define GGML_COMMON_DECL_CUDA
#define GGML_COMMON_IMPL_CUDA
#include "ggml-common.h"

#undef  __shared__
#define __shared__ static // one block at a time
#undef  __global__
#define __global__
#undef  __device__
#define __device__
#undef  __launch_bounds__
#define __launch_bounds__(...)
#undef  __forceinline__
#define __forceinline__ inline

struct ggml_backend_cuda_context;

// the fiber that runs, and its block
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
extern char shim_shared[];

void     shim_launch(dim3 grid, int threads, const std::function<void()> & kernel);
void     __syncthreads();
void     __syncwarp();
float    __shfl_xor_sync(uint32_t mask, float v, int offset);
uint32_t __ballot_sync(uint32_t mask, bool predicate);
void     shim_mma(float * d, const half2 * a, uint2 b); // mma.m16n8k16, fragments as in the PTX manual

// the kernels' way out on devices without tensor cores is the way in here
#define GGML_UNUSED_VARS(...)
#define NO_DEVICE_CODE shim_mma(d, a, b)

static inline int __popc(uint32_t v) { return __builtin_popcount(v); }
static inline int min(int a, int b) { return a < b ? a : b; }

static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t) b << 32 | a;
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) {
        v |= (uint32_t) (bytes >> 8*(selector >> 4*i & 7) & 0xff) << 8*i;
    }
    return v;
}

static inline half2 shim_hfma2(half2 a, half2 b, half2 c) { // one rounding: the product of two f16 is exact in f32, the sum in f64
    const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
    return __halves2half2(__double2half((double) x.x*y.x + z.x), __double2half((double) x.y*y.y + z.y));
}
#define __hfma2 shim_hfma2

static inline float warp_reduce_sum(float v) {
    for (int offset = 16; offset > 0; offset /= 2) {
        v += __shfl_xor_sync(0xffffffff, v, offset);
    }
    return v;
}

template <int nbytes> static inline void ggml_cuda_memcpy_1(void * dst, const void * src) {
    GGML_ASSERT((uintptr_t) src % nbytes == 0); // what the device needs
    memcpy(dst, src, nbytes);
}

static inline float ggml_cuda_e8m0_to_fp32(uint8_t x) {
    const uint32_t bits = x == 0 ? 0x00400000 : (uint32_t) x << 23;
    float v;
    memcpy(&v, &bits, sizeof(v));
    return v;
}
