// What all kernels take, and who mixes which bases: a block's coefficients, gathered once for many rows.

#pragma once

#include "common.cuh"
#include "ggml-mobe.h"

#define MOBE_WARPS 8 // of a block of mobe_combine
// supported bases: two tiles' coefficients and sums have to fit into the 48 KiB of shared memory that every device gives
#define MOBE_MAX_BASES 1024

struct mobe_args {
    const char    * basis; // [m][r][row_bytes]
    int64_t         row_bytes;
    const float   * mix;   // [n][m_group], row_mix: [n][m_group][r]
    const float   * x;     // strides in numbers; x_slot = 0: one x for all experts of a token
    int64_t         x_slot;
    int64_t         x_token;
    const int32_t * ids;   // use u = t*k + slot uses expert ids[t*ids_token + slot]
    int64_t         ids_token;
    float         * z;      // [n_use][r]
    half          * formed; // [n_use][r][d]
    int d, r, m, m_group, n, per_group, k, n_use, coef_stride, depth;
    bool row_mix;
    bool constant; // no kernel writes the bases: they can be read before the one in front is done
    ggml_mobe_activation activation;
};

// an expert's coefficients for row rho (which matters to a row-wise mix only)
struct mobe_mix_row {
    const float * mix;
    int first; // the first basis of its group
};

static __device__ __forceinline__ mobe_mix_row mobe_mix_of(const mobe_args & a, int expert) {
    if (expert < 0 || expert >= a.n) {
        return { a.mix, a.m }; // none
    }
    const int64_t e = (int64_t) expert*a.m_group;
    return { a.mix + (a.row_mix ? e*a.r : e), expert/a.per_group*a.m_group };
}

static __device__ __forceinline__ float mobe_coefficient(const mobe_args & a, const mobe_mix_row & of, int j, int rho) {
    const int in_group = j - of.first;
    if (in_group < 0 || in_group >= a.m_group) {
        return 0.0f;
    }
    return of.mix[a.row_mix ? (int64_t) in_group*a.r + rho : in_group];
}

// The bases that some use mixes, in order, and their coefficients: hi and lo [USES][coef_stride], padded with zeros to 16 bases.
// Called by all threads of a block, a warp takes whole uses. Returns the number of bases.
template <int USES>
static __device__ int mobe_gather_terms(
        const mobe_args & a, const mobe_mix_row * uses, int rho, uint32_t * mixed, uint32_t * list, uint32_t list_step, half * hi, half * lo) {
    const int warp = threadIdx.x/32;
    const int lane = threadIdx.x%32;

    if (threadIdx.x < MOBE_MAX_BASES/32) {
        mixed[threadIdx.x] = 0;
    }
    __syncthreads();
    for (int j0 = 0; j0 < a.m; j0 += 32) {
#pragma unroll
        for (int use = warp; use < USES; use += MOBE_WARPS) {
            const bool     some = j0 + lane < a.m && mobe_coefficient(a, uses[use], j0 + lane, rho) != 0.0f;
            const uint32_t mask = __ballot_sync(0xffffffff, some);
            if (lane == 0 && mask != 0) {
                atomicOr(&mixed[j0/32], mask);
            }
        }
    }
    __syncthreads();
    int count = 0;
    for (int j0 = 0; j0 < a.m; j0 += 32) {
        const uint32_t mask = mixed[j0/32];
        const int      t    = count + __popc(mask & ((1u << lane) - 1));
        if (mask >> lane & 1) {
#pragma unroll
            for (int use = warp; use < USES; use += MOBE_WARPS) {
                const float v = mobe_coefficient(a, uses[use], j0 + lane, rho);
                const half  h = __float2half_rn(v);
                hi[use*a.coef_stride + t] = h;
                lo[use*a.coef_stride + t] = __float2half_rn(v - __half2float(h));
            }
            if (warp == 0) {
                list[t] = (j0 + lane)*list_step;
            }
        }
        count += __popc(mask);
    }
    __syncwarp();
    const int t = count + lane;
    if (t < (count + 15)/16*16) {
        for (int use = warp; use < USES; use += MOBE_WARPS) {
            hi[use*a.coef_stride + t] = lo[use*a.coef_stride + t] = __float2half(0.0f);
        }
        if (warp == 0) {
            list[t] = list[0]; // one that is mixed: what it holds is finite
        }
    }
    __syncthreads();
    return count;
}
