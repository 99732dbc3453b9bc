// The combination f( sum_j mix[j,e] * basis_j ) by tensor cores: the kernel that decoding and prompts share.
//
//   rows    a block owns a run of the r rows
//   pieces  a warp owns 256/NT columns of one row: 32/NT columns a thread
//   uses    8*NT of them at a time ("use": one expert of one token; for a prompt: one expert)
//
// For one row the combination is a product  [columns x bases] . [bases x uses]. mma m16n8k16 takes 16 columns, 16 bases and 8
// uses. Which column is a fragment's row and which basis its column is free, so they are dealt out such that a thread
// dequantizes, in registers, exactly the numbers that its own fragments hold: lane = 4*g + q reads the bases 4*q .. 4*q + 3 of
// 16, and of each the columns that belong to g. A quantized block is read once for all uses, and the r x d matrix does not
// exist. The result lies where it is needed next: a thread has 2 uses at its own columns.
//
// Decoding waits for memory; blocks of q4_k are on their way while others are combined (mobe-cuda-ring.cuh).
//
// Numbers: bases are rounded to f16 (as large as 65504), coefficients to f16 beside quantized bases and to the sum of two f16 (22
// bits) beside others, sums are f32. Normalized mean square error against the reference, without the next line's: 2e-8 to 1e-7,
// and 1e-6 for q4_k, whose scales and minimums are rounded to f16 as well. tanh.approx has a relative error of 2^-11: at most 8e-8 more.

#pragma once

#include "mobe-cuda-mix.cuh"
#include "mobe-cuda-read.cuh"
#include "mobe-cuda-ring.cuh"

// at least what the kernel takes of shared memory besides, and what is left of that which every device gives without being asked
#define MOBE_SHARED_STATIC 1024
#define MOBE_SHARED_PLAIN  (48*1024 - MOBE_SHARED_STATIC)
#define MOBE_ROWS  8 // rows whose sums a block keeps before it adds up its warps'

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

// sums over the thread's columns of f(combination)*x, for its two uses of a tile of 8; ONE: both have the same x
template <ggml_mobe_activation activation, bool ONE, class pairs, int STEPS>
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
                *(float4 *) vb = *(const float4 *) (ONE ? va : xb + c + pairs::at(v));
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    va[i] = xa[c + pairs::at(v + i)];
                    vb[i] = ONE ? va[i] : xb[c + pairs::at(v + i)];
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

template <bool ONE, class pairs, int STEPS>
static __device__ __forceinline__ float2 mobe_times_x(
        ggml_mobe_activation activation,
        const float (&acc)[STEPS][pairs::VALUES/2][4], const float * xa, const float * xb, int unit, int left) {
    switch (activation) {
        case GGML_MOBE_ACTIVATION_SILU: return mobe_times_x<GGML_MOBE_ACTIVATION_SILU, ONE, pairs, STEPS>(acc, xa, xb, unit, left);
        case GGML_MOBE_ACTIVATION_TANH: return mobe_times_x<GGML_MOBE_ACTIVATION_TANH, ONE, pairs, STEPS>(acc, xa, xb, unit, left);
        default:                        return mobe_times_x<GGML_MOBE_ACTIVATION_NONE, ONE, pairs, STEPS>(acc, xa, xb, unit, left);
    }
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

// blocks pass through shared memory: q4_k in decoding, whose blocks are 16 bytes aligned
template <ggml_type type, int NT, bool FORM> static constexpr bool mobe_staged = type == GGML_TYPE_Q4_K && NT == 1 && !FORM;

// Blocks: x = tiles of 8*NT uses (neighbours read the same rows, so from L2), y = runs of rows. FORM: write the combination.
template <ggml_type type, int NT, bool FORM>
static __global__ void __launch_bounds__(32*MOBE_WARPS, 2) mobe_combine(const mobe_args a) {
    using pairs = mobe_pairs<type, NT>;
    constexpr int  USES   = 8*NT;
    constexpr int  STEPS  = pairs::STEPS;
    constexpr bool STAGED = mobe_staged<type, NT, FORM>;
    constexpr bool FINE   = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16; // lo is worth a product

    extern __shared__ __align__(16) char shared[];
    half  * hi   = (half *) shared;                       // [USES][coef_stride]
    half  * lo   = hi + USES*a.coef_stride;
    float * sums = (float *) (lo + USES*a.coef_stride);   // [MOBE_ROWS][MOBE_WARPS][USES]
    uint32_t * list = (uint32_t *) (sums + MOBE_ROWS*MOBE_WARPS*USES); // the bases that are mixed, times list_step
    const uint32_t list_step = STAGED ? a.r*a.row_bytes/16 : 1;
    __shared__ mobe_mix_row uses[USES];
    __shared__ int64_t      x_offset[USES];
    __shared__ uint32_t     mixed[MOBE_MAX_BASES/32];

    const int warp = threadIdx.x/32;
    const int lane = threadIdx.x%32;
    const int g    = lane/4;
    const int q    = lane%4;

    const int row_begin = (int) ((int64_t) a.r* blockIdx.y     /gridDim.y);
    const int row_end   = (int) ((int64_t) a.r*(blockIdx.y + 1)/gridDim.y);
    const int max_row   = a.row_mix ? 1 : MOBE_ROWS;
    const int n_piece   = (a.d + MOBE_STRETCH - 1)/MOBE_STRETCH*NT;

    mobe_ring ring;
    const int early = min(2, a.depth - 1);
    if constexpr (STAGED) {
        // As if all bases were mixed, which is so as a rule: they arrive while ids and mix are looked up. Two blocks a warp last that
        // long; where mixing is sparse, they were read for nothing.
        const int padded = (a.m + 15)/16*16;
        for (int i = threadIdx.x; i < padded; i += blockDim.x) {
            list[i] = i < a.m ? i*list_step : 0;
        }
        __syncthreads();
        if (!a.constant) {
            ggml_cuda_pdl_sync();
        }
        ring.slots = (char *) (list + padded) + warp*a.depth*ring.SLOT;
        ring.start(a, list, a.m, row_begin, min(max_row, row_end - row_begin), early);
    }
    ggml_cuda_pdl_sync(); // from here on what other kernels wrote is there

    const int use0  = blockIdx.x*USES;
    const int n_use = min(USES, a.n_use - use0);
    if (threadIdx.x < USES) {
        const int u = use0 + min((int) threadIdx.x, n_use - 1);
        const int t = u/a.k;
        uses[threadIdx.x]     = mobe_mix_of(a, threadIdx.x < n_use ? a.ids[t*a.ids_token + u%a.k] : -1);
        x_offset[threadIdx.x] = t*a.x_token + (u%a.k)*a.x_slot;
    }

    int n_term = 0;
    for (int row0 = row_begin; row0 < row_end; row0 += max_row) {
        const int n_row = min(max_row, row_end - row0);
        if (a.row_mix || row0 == row_begin) {
            n_term = mobe_gather_terms<USES>(a, uses, row0, mixed, list, list_step, hi, lo);
            ggml_cuda_pdl_lc();
        }
        if constexpr (STAGED) {
            if (row0 != row_begin || n_term != a.m) {
                ring.start(a, list, n_term, row0, n_row, a.depth - 1);
            } else {
                ring.more(a, list, n_term, row0, n_row, early, a.depth - 1);
            }
        }
        if (!FORM) {
            for (int i = lane; i < n_row*USES; i += 32) {
                sums[(i/USES*MOBE_WARPS + warp)*USES + i%USES] = 0.0f;
            }
            __syncwarp();
        }

        mobe_place at = { 0, 0 };
        for (at.advance(warp, n_piece); at.row < n_row; at.advance(MOBE_WARPS, n_piece)) {
            const int row     = at.row;
            const int stretch = at.piece/NT;
            const int unit    = at.piece%NT*STEPS*8 + g;
            const int left    = STAGED ? MOBE_STRETCH : a.d - stretch*MOBE_STRETCH; // columns of the row from this stretch on

            float acc[NT][STEPS][pairs::VALUES/2][4] = {};

            for (int t0 = 0; t0 < n_term; t0 += 16) {
                const char * from[4];
                if constexpr (STAGED) {
                    const char * slot = ring.take(a) + q*ring.QUAD;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        from[i] = slot + i*ring.BYTES;
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        from[i] = a.basis + ((int64_t) list[t0 + 4*q + i]*a.r + row0 + row)*a.row_bytes;
                    }
                }
                uint2 b_hi[NT], b_lo[NT];
#pragma unroll
                for (int nt = 0; nt < NT; nt++) {
                    b_hi[nt] = *(const uint2 *) (hi + (8*nt + g)*a.coef_stride + t0 + 4*q);
                    if constexpr (FINE) {
                        b_lo[nt] = *(const uint2 *) (lo + (8*nt + g)*a.coef_stride + t0 + 4*q);
                    }
                }
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    typename pairs::raw raw[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        if (STAGED || pairs::first(unit + 8*step) < left) {
                            pairs::load(raw[i], from[i], STAGED ? 0 : stretch, unit + 8*step);
                        } else {
                            pairs::clear(raw[i]);
                        }
                    }
                    if constexpr (STAGED) { // behind the loads, which take their time
                        static_assert(STEPS == 1, "a slot is read at once");
                        ring.issue(a, list, n_term, row0, n_row);
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
                            if constexpr (FINE) {
                                mobe_mma(acc[nt][step][s], fragment, b_lo[nt]);
                            }
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
                    // uses 2*q and 2*q + 1 belong to one token where k is even
                    float2 sum = a.x_slot == 0 && a.k % 2 == 0 ?
                        mobe_times_x<true,  pairs, STEPS>(a.activation, acc[nt], xa, xb, unit, left) :
                        mobe_times_x<false, pairs, STEPS>(a.activation, acc[nt], xa, xb, unit, left);
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

// bytes without the slots of mobe_ring
template <int NT> static size_t mobe_combine_shared(int m) {
    return 2*8*NT*mobe_coef_stride(m)*sizeof(half) + MOBE_ROWS*MOBE_WARPS*8*NT*sizeof(float) + (m + 15)/16*16*sizeof(int);
}

// what a launch must know of its device: multiprocessors, and the shared memory that a block can ask for
struct mobe_device {
    int    n_sm;
    size_t shared;
};

template <ggml_type type, int NT, bool FORM> static void mobe_combine_launch(const mobe_args & args, mobe_device device, cudaStream_t stream) {
    mobe_args a = args;
    a.coef_stride = mobe_coef_stride(a.m);

    // two blocks a multiprocessor, as many rows each: a block's coefficients are gathered once
    const int tiles = (a.n_use + 8*NT - 1)/(8*NT);
    const int runs  = std::min(a.r, std::max(1, (2*device.n_sm + tiles - 1)/tiles));
    const dim3 grid(tiles, runs);

    size_t shared = mobe_combine_shared<NT>(a.m);
    if constexpr (mobe_staged<type, NT, FORM>) {
        // as many slots as let two blocks share a multiprocessor, which has 1 KiB more than a block can have and takes 1 KiB a block
        const size_t slots = MOBE_WARPS*mobe_ring::SLOT;
        a.depth = 4;
        while (a.depth > 2 && 2*(shared + a.depth*slots + MOBE_SHARED_STATIC + 1024) > device.shared + 1024) {
            a.depth--;
        }
        shared += a.depth*slots;
        CUDA_SET_SHARED_MEMORY_LIMIT((mobe_combine<type, NT, FORM>), device.shared - MOBE_SHARED_STATIC);
        // a hint, lest the driver leave so much to the cache that the second block has to wait
        const int percent = std::min<size_t>(100, 1 + 200*(shared + MOBE_SHARED_STATIC + 1024)/(device.shared + 1024));
        CUDA_CHECK(cudaFuncSetAttribute(mobe_combine<type, NT, FORM>, cudaFuncAttributePreferredSharedMemoryCarveout, percent));
    }
    ggml_cuda_kernel_launch(mobe_combine<type, NT, FORM>, ggml_cuda_kernel_launch_params(grid, 32*MOBE_WARPS, shared, stream), a);
}
