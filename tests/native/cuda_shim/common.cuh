// Stands in for ggml-cuda's common.cuh, so that a C++ compiler can build the operator's kernels for the CPU: the threads of a
// block are fibers that run in turn and meet at barriers; warp instructions exchange through memory. Exact, slow, no races seen.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cublas_v2.h>

#include "ggml-impl.h"

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

// the fiber that runs, and its block
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
extern char shim_shared[227*1024];

void     shim_launch(dim3 grid, int threads, const std::function<void()> & kernel);
void     __syncthreads();
void     __syncwarp();
float    __shfl_xor_sync(uint32_t mask, float v, int offset);
uint32_t __ballot_sync(uint32_t mask, bool predicate);
uint32_t atomicOr(uint32_t * to, uint32_t v);
void     shim_mma(float * d, const half2 * a, uint2 b); // mma.m16n8k16, fragments as in the PTX manual

void     ggml_cuda_pdl_sync(); // what the kernel in front writes (shim_in_front) is there when the first thread of a block is here
static inline void ggml_cuda_pdl_lc() {}

// what the host's side calls, done at once
#define CUDA_CHECK(call)   (void) (call)
#define CUBLAS_CHECK(call) (void) (call)
#define CUDA_SET_SHARED_MEMORY_LIMIT(...)
#define cudaFuncSetAttribute(...)     0
#define cudaGetLastError()            0
#define cudaStreamSynchronize(stream) 0
#define cudaMemcpyAsync(to, from, size, kind, stream) memcpy(to, from, size)
#define cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, kind, stream) \
    shim_memcpy_2d((char *) (to), to_pitch, (const char *) (from), from_pitch, width, height)

static inline int shim_memcpy_2d(char * to, size_t to_pitch, const char * from, size_t from_pitch, size_t width, size_t height) {
    for (size_t i = 0; i < height; i++) {
        memcpy(to + i*to_pitch, from + i*from_pitch, width);
    }
    return 0;
}

#define GGML_CUDA_CC_AMPERE 800
#define GGML_CUDA_CC_IS_NVIDIA(cc) true
#define ggml_cuda_highest_compiled_arch(cc) (cc)

struct ggml_cuda_device_info {
    struct cuda_device_info {
        int    cc, nsm;
        size_t smpbo;
    };
    cuda_device_info devices[1];
};
const ggml_cuda_device_info & ggml_cuda_info();
extern const char * shim_way; // GGML_CUDA_MOBE

struct ggml_backend_cuda_context {
    int          device = 0;
    int          pool()          { return 0; }
    cudaStream_t stream()        { return nullptr; }
    cublasHandle_t cublas_handle() { return nullptr; }
};

template <typename T> struct ggml_cuda_pool_alloc {
    std::vector<char> data;
    ggml_cuda_pool_alloc(int, size_t n) : data(n*sizeof(T), (char) 0xff) {} // NaNs
    T * get() { return (T *) data.data(); }
};

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

static inline float ggml_cuda_ue4m3_to_fp32(uint8_t x) { // half of what the type stands for, as kvalues_mxfp4 are twice
    const int exponent = x >> 3 & 15;
    return x == 0x7f ? 0.0f : exponent == 0 ? ldexpf(x & 7, -10) : ldexpf(8 + (x & 7), exponent - 11);
}
