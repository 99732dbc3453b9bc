// The combination f( sum_j mix[j,e] * basis_j ) by tensor cores: the kernel that decoding and prompts share.
//
//   rows    a block owns a run of the r rows
//   pieces  a warp owns 256/NT columns of one row: 32/NT columns a thread
//   uses    8*NT of them at a time ("use": one expert of one token; for a prompt: one expert)
//
// For one row the combination is a product  [columns x bases] . [bases x uses]. mma m16n8k16 takes 16 columns, 16 bases and 8
// uses. Which column is a fragment's row and which basis its column is free, so they are dealt out such that a thread
// dequantizes, in registers, exactly the numbers that its own fragments hold: lane = 4*g + q reads the bases 4*q .. 4*q + 3 of
// 16, and of each the columns that belong to g. A quantized block is read once for all uses, nothing passes through shared
// memory, and the r x d matrix does not exist. The result lies where it is needed next: a thread has 2 uses at its own columns.
//
// Numbers: bases are rounded to f16 (as large as 65504), coefficients are the sum of two f16 (22 bits), sums are f32. Normalized
// mean square error against the reference, without the next line's: 2e-8 to 7e-8, and 1e-6 for q4_k, whose scales and minimums
// are rounded to f16 as well. tanh.approx has a relative error of 2^-11: at most 8e-8 more.

#pragma once

#include "mobe-cuda-read.cuh"
#include "ggml-mobe.h"

#define MOBE_WARPS 8
#define MOBE_ROWS  8 // rows whose sums a block keeps before it adds up its warps'

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
    int d, r, m, m_group, n, per_group, k, n_use, coef_stride;
    bool row_mix;
    ggml_mobe_activation activation;
};

template <ggml_mobe_activation activation> static __device__ __forceinline__ float mobe_tanh_like(float v) {
    if (activation == GGML_MOBE_ACTIVATION_NONE) {
        return v;
    }
    // silu(v) = h*tanh(h) + h, h = v/2: one instruction of the special function unit for both
    const float h = activation == GGML_MOBE_ACTIVATION_SILU ? 0.5f*v : v;
    float t;
#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(h));
#else
    t = tanhf(h);
#endif
    return activation == GGML_MOBE_ACTIVATION_SILU ? h*t + h : t;
}

static __device__ __forceinline__ float mobe_coefficient(const mobe_args & a, int expert, int j, int rho) {
    const int in_group = expert < 0 || expert >= a.n ? -1 : j - expert/a.per_group*a.m_group;
    if (in_group < 0 || in_group >= a.m_group) {
        return 0.0f;
    }
    const int64_t i = (int64_t) expert*a.m_group + in_group;
    return a.mix[a.row_mix ? i*a.r + rho : i];
}

// d[16 x 8] += a[16 x 16] . b[16 x 8], f16 in, f32 sums
static __device__ __forceinline__ void mobe_mma(float * d, const half2 * a, const uint2 b) {
#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const uint32_t * ai = (const uint32_t *) a;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(ai[0]), "r"(ai[1]), "r"(ai[2]), "r"(ai[3]), "r"(b.x), "r"(b.y));
#else
    GGML_UNUSED_VARS(d, a, b);
    NO_DEVICE_CODE;
#endif
}

// The bases that some use mixes, in order, and their coefficients: hi and lo [use][coef_stride], padded with zeros to 16 bases.
// Called by all threads of a block. Returns the number of bases. rho matters to a row-wise mix only.
static __device__ int mobe_gather_terms(
        const mobe_args & a, const int * experts, int n_use, int rho, int * list, half * hi, half * lo) {
    __shared__ int shared_count;
    const int thread = threadIdx.x;

    if (thread < 32) {
        int count = 0;
        for (int j0 = 0; j0 < a.m; j0 += 32) {
            const int j = j0 + thread;
            bool mixed = false;
            if (j < a.m) {
#pragma unroll 8
                for (int use = 0; use < n_use; use++) {
                    mixed |= mobe_coefficient(a, experts[use], j, rho) != 0.0f;
                }
            }
            const uint32_t mask = __ballot_sync(0xffffffff, mixed);
            if (mixed) {
                list[count + __popc(mask & ((1u << thread) - 1))] = j;
            }
            count += __popc(mask);
        }
        __syncwarp();
        if (thread < (count + 15)/16*16 - count) {
            list[count + thread] = list[0]; // its coefficient is zero
        }
        if (thread == 0) {
            shared_count = count;
        }
    }
    __syncthreads();

    const int count  = shared_count;
    const int padded = (count + 15)/16*16;
    for (int i = thread; i < n_use*padded; i += blockDim.x) {
        const int use = i/padded;
        const int t   = i%padded;
        const float v = t < count ? mobe_coefficient(a, experts[use], list[t], rho) : 0.0f;
        const half  h = __float2half_rn(v);
        hi[use*a.coef_stride + t] = h;
        lo[use*a.coef_stride + t] = __float2half_rn(v - __half2float(h));
    }
    __syncthreads();
    return count;
}

// sums over the thread's columns of f(combination)*x, for its two uses of a tile of 8
template <ggml_mobe_activation activation, class pairs, int STEPS>
static __device__ __forceinline__ float2 mobe_times_x(
        const float (&acc)[STEPS][pairs::VALUES/2][4], const float * xa, const float * xb, int unit, int left) {
    float2 sum = make_float2(0.0f, 0.0f);
    constexpr bool fours = pairs::at(1) == 1 && pairs::at(3) == 3; // four neighbours each time, and aligned
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int c = pairs::first(unit + 8*step);
        if (c >= left) {
            continue;
        }
#pragma unroll
        for (int v = 0; v < pairs::VALUES; v += 4) {
            float va[4], vb[4];
            if constexpr (fours) {
                *(float4 *) va = *(const float4 *) (xa + c + pairs::at(v));
                *(float4 *) vb = xa == xb ? *(const float4 *) va : *(const float4 *) (xb + c + pairs::at(v));
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    va[i] = xa[c + pairs::at(v + i)];
                    vb[i] = xa == xb ? va[i] : xb[c + pairs::at(v + i)];
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sum.x += mobe_tanh_like<activation>(acc[step][(v + i)/2][(v + i)%2*2 + 0])*va[i];
                sum.y += mobe_tanh_like<activation>(acc[step][(v + i)/2][(v + i)%2*2 + 1])*vb[i];
            }
        }
    }
    return sum;
}

// f(combination) of the thread's two uses of a tile of 8, written to their rows wa and wb (nullptr: no such use)
template <ggml_mobe_activation activation, class pairs, int STEPS>
static __device__ __forceinline__ void mobe_store(
        const float (&acc)[STEPS][pairs::VALUES/2][4], half * wa, half * wb, int unit, int left) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int c = pairs::first(unit + 8*step);
#pragma unroll
        for (int v = 0; v < pairs::VALUES; v += 2) {
            half * const to[2] = { wa, wb };
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (to[i] == nullptr || c >= left) {
                    continue;
                }
                const half2 both = __floats2half2_rn(
                    mobe_tanh_like<activation>(acc[step][v/2][i]), mobe_tanh_like<activation>(acc[step][v/2][2 + i]));
                if constexpr (pairs::at(1) == 1) {
                    *(half2 *) (to[i] + c + pairs::at(v)) = both;
                } else {
                    to[i][c + pairs::at(v    )] = __low2half(both);
                    to[i][c + pairs::at(v + 1)] = __high2half(both);
                }
            }
        }
    }
}

// Blocks: x = tiles of 8*NT uses (neighbours read the same rows, so from L2), y = runs of rows. FORM: write the combination.
template <ggml_type type, int NT, bool FORM>
static __global__ void __launch_bounds__(32*MOBE_WARPS, 2) mobe_combine(const mobe_args a) {
    using pairs = mobe_pairs<type, NT>;
    constexpr int USES  = 8*NT;
    constexpr int STEPS = pairs::STEPS;

    extern __shared__ __align__(16) char shared[];
    half  * hi   = (half *) shared;                       // [USES][coef_stride]
    half  * lo   = hi + USES*a.coef_stride;
    float * sums = (float *) (lo + USES*a.coef_stride);   // [MOBE_ROWS][MOBE_WARPS][USES]
    int   * list = (int *) (sums + MOBE_ROWS*MOBE_WARPS*USES);
    __shared__ int     experts[USES];
    __shared__ int64_t x_offset[USES];

    const int warp = threadIdx.x/32;
    const int lane = threadIdx.x%32;
    const int g    = lane/4;
    const int q    = lane%4;

    const int use0  = blockIdx.x*USES;
    const int n_use = min(USES, a.n_use - use0);
    if (threadIdx.x < USES) {
        const int u = use0 + min((int) threadIdx.x, n_use - 1);
        const int t = u/a.k;
        experts[threadIdx.x]  = threadIdx.x < n_use ? a.ids[t*a.ids_token + u%a.k] : -1;
        x_offset[threadIdx.x] = t*a.x_token + (u%a.k)*a.x_slot;
    }
    __syncthreads();

    const int row_begin = (int) ((int64_t) a.r* blockIdx.y     /gridDim.y);
    const int row_end   = (int) ((int64_t) a.r*(blockIdx.y + 1)/gridDim.y);
    const int n_piece   = (a.d + MOBE_STRETCH - 1)/MOBE_STRETCH*NT;

    int n_term = 0;
    for (int row0 = row_begin; row0 < row_end; row0 += a.row_mix ? 1 : MOBE_ROWS) {
        const int n_row = a.row_mix ? 1 : min(MOBE_ROWS, row_end - row0);
        if (a.row_mix || row0 == row_begin) {
            n_term = mobe_gather_terms(a, experts, USES, row0, list, hi, lo);
        }
        if (!FORM) {
            for (int i = lane; i < n_row*USES; i += 32) {
                sums[(i/USES*MOBE_WARPS + warp)*USES + i%USES] = 0.0f;
            }
            __syncwarp();
        }

        for (int task = warp; task < n_row*n_piece; task += MOBE_WARPS) {
            const int row     = task/n_piece;
            const int stretch = task%n_piece/NT;
            const int unit    = task%NT*STEPS*8 + g;
            const int left    = a.d - stretch*MOBE_STRETCH; // columns of the row from this stretch on

            float acc[NT][STEPS][pairs::VALUES/2][4] = {};

            for (int t0 = 0; t0 < n_term; t0 += 16) {
                const char * from[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    from[i] = a.basis + ((int64_t) list[t0 + 4*q + i]*a.r + row0 + row)*a.row_bytes;
                }
                uint2 b_hi[NT], b_lo[NT];
#pragma unroll
                for (int nt = 0; nt < NT; nt++) {
                    b_hi[nt] = *(const uint2 *) (hi + (8*nt + g)*a.coef_stride + t0 + 4*q);
                    b_lo[nt] = *(const uint2 *) (lo + (8*nt + g)*a.coef_stride + t0 + 4*q);
                }
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    typename pairs::raw raw[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        if (pairs::first(unit + 8*step) < left) {
                            pairs::load(raw[i], from[i], stretch, unit + 8*step);
                        } else {
                            pairs::clear(raw[i]);
                        }
                    }
#pragma unroll
                    for (int s = 0; s < pairs::VALUES/2; s++) {
                        const half2 fragment[4] = {
                            pairs::pair(raw[0], raw[1], 2*s), pairs::pair(raw[0], raw[1], 2*s + 1),
                            pairs::pair(raw[2], raw[3], 2*s), pairs::pair(raw[2], raw[3], 2*s + 1),
                        };
#pragma unroll
                        for (int nt = 0; nt < NT; nt++) {
                            mobe_mma(acc[nt][step][s], fragment, b_hi[nt]);
                            mobe_mma(acc[nt][step][s], fragment, b_lo[nt]);
                        }
                    }
                }
            }

#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                const int use = 8*nt + 2*q;
                if (8*nt >= n_use) {
                    continue;
                }
                if constexpr (FORM) {
                    half * wa = use     < n_use ? a.formed + ((int64_t) (use0 + use    )*a.r + row0 + row)*a.d + stretch*MOBE_STRETCH : nullptr;
                    half * wb = use + 1 < n_use ? a.formed + ((int64_t) (use0 + use + 1)*a.r + row0 + row)*a.d + stretch*MOBE_STRETCH : nullptr;
                    switch (a.activation) {
                        case GGML_MOBE_ACTIVATION_SILU: mobe_store<GGML_MOBE_ACTIVATION_SILU, pairs, STEPS>(acc[nt], wa, wb, unit, left); break;
                        case GGML_MOBE_ACTIVATION_TANH: mobe_store<GGML_MOBE_ACTIVATION_TANH, pairs, STEPS>(acc[nt], wa, wb, unit, left); break;
                        default:                        mobe_store<GGML_MOBE_ACTIVATION_NONE, pairs, STEPS>(acc[nt], wa, wb, unit, left); break;
                    }
                } else {
                    const float * xa = a.x + x_offset[use]     + stretch*MOBE_STRETCH;
                    const float * xb = a.x + x_offset[use + 1] + stretch*MOBE_STRETCH;
                    float2 sum;
                    switch (a.activation) {
                        case GGML_MOBE_ACTIVATION_SILU: sum = mobe_times_x<GGML_MOBE_ACTIVATION_SILU, pairs, STEPS>(acc[nt], xa, xb, unit, left); break;
                        case GGML_MOBE_ACTIVATION_TANH: sum = mobe_times_x<GGML_MOBE_ACTIVATION_TANH, pairs, STEPS>(acc[nt], xa, xb, unit, left); break;
                        default:                        sum = mobe_times_x<GGML_MOBE_ACTIVATION_NONE, pairs, STEPS>(acc[nt], xa, xb, unit, left); break;
                    }
#pragma unroll
                    for (int offset = 4; offset < 32; offset *= 2) { // over g: the columns
                        sum.x += __shfl_xor_sync(0xffffffff, sum.x, offset);
                        sum.y += __shfl_xor_sync(0xffffffff, sum.y, offset);
                    }
                    if (g == 0) {
                        sums[(row*MOBE_WARPS + warp)*USES + use    ] += sum.x;
                        sums[(row*MOBE_WARPS + warp)*USES + use + 1] += sum.y;
                    }
                }
            }
        }

        if (!FORM) {
            __syncthreads();
            for (int i = threadIdx.x; i < n_row*USES; i += blockDim.x) {
                const int use = i%USES;
                const int row = i/USES;
                float sum = 0.0f;
                for (int w = 0; w < MOBE_WARPS; w++) {
                    sum += sums[(row*MOBE_WARPS + w)*USES + use];
                }
                if (use < n_use) {
                    a.z[(int64_t) (use0 + use)*a.r + row0 + row] = sum;
                }
            }
        }
        __syncthreads();
    }
}

// numbers between the coefficients of two uses: a multiple of 64 and 16 more, so that 8 uses fall into different banks
static inline int mobe_coef_stride(int m) { return (m + 63)/64*64 + 16; }

template <int NT> static size_t mobe_combine_shared(int m) {
    return 2*8*NT*mobe_coef_stride(m)*sizeof(half) + MOBE_ROWS*MOBE_WARPS*8*NT*sizeof(float) + (m + 15)/16*16*sizeof(int);
}

template <ggml_type type, int NT, bool FORM> static void mobe_combine_launch(const mobe_args & args, int n_sm, cudaStream_t stream) {
    mobe_args a = args;
    a.coef_stride = mobe_coef_stride(a.m);

    // two blocks a multiprocessor, as many rows each: a block's coefficients are gathered once
    const int tiles = (a.n_use + 8*NT - 1)/(8*NT);
    const int runs  = std::min(a.r, std::max(1, (2*n_sm + tiles - 1)/tiles));
    mobe_combine<type, NT, FORM><<<dim3(tiles, runs), 32*MOBE_WARPS, mobe_combine_shared<NT>(a.m), stream>>>(a);
}

// supported bases: two tiles' coefficients and sums have to fit into the 48 KiB of shared memory that every device gives
#define MOBE_MAX_BASES 1024
