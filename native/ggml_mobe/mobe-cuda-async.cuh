// Copies from global to shared memory that a thread does not wait for (cp.async, Ampere and later).

#pragma once

#include "common.cuh"

// 16 bytes, both sides aligned to as many
static __device__ __forceinline__ void mobe_copy_async(char * to, const char * from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
        :: "r"((uint32_t) __cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
    GGML_UNUSED_VARS(to, from);
    NO_DEVICE_CODE;
#endif
}

// the thread's copies since the last call are a group, be it empty
static __device__ __forceinline__ void mobe_copy_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// until all of the thread's groups but the newest 0 to 2 have arrived; other threads see that after a barrier
static __device__ __forceinline__ void mobe_copy_wait(int newest) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    switch (newest) {
        case 0:  asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
        case 1:  asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
        default: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    }
#else
    GGML_UNUSED(newest);
#endif
}
