// How a thread reads numbers of a quantized row: one struct a type, over ggml-cuda's own dequantize functions.
//
// A row is seen in stretches of 256 columns (the last may be shorter), a stretch in UNITS units of VALUES numbers. Unit u of a
// stretch holds the columns first(u) + at(v), v < VALUES; neighbouring threads take neighbouring units, so that a warp's loads
// join. read() returns exactly the numbers that ggml-cuda's conversion of the same type to T returns.

#pragma once

#include "dequantize.cuh"

#define MOBE_STRETCH 256

// ggml-cuda's functions for a block of 256 write to y[first + at]: with y = local - first only constant places of `local` are
// used, which the compiler keeps in registers (FIRST is written as ggml-cuda computes it, in 64 bits, so that the two cancel).
#define MOBE_READ_SUPERBLOCK(TYPE, FUNCTION, N_UNITS, FIRST, AT)                                                  \
    template <> struct mobe_read<TYPE> {                                                                          \
        static constexpr int UNITS  = N_UNITS;                                                                    \
        static constexpr int VALUES = MOBE_STRETCH/N_UNITS;                                                       \
        static __device__ __forceinline__ int first(int u) { return (int) (FIRST); }                                      \
        static __host__ __device__ constexpr int at(int v) { return AT; }                                         \
        template <typename T> static __device__ __forceinline__ void read(const char * row, int64_t stretch, int u, T * out) { \
            T local[at(VALUES - 1) + 1];                                                                          \
            FUNCTION<T>(row, stretch, local - (FIRST), u);                                                       \
            _Pragma("unroll")                                                                                     \
            for (int v = 0; v < VALUES; v++) {                                                                    \
                out[v] = local[at(v)];                                                                            \
            }                                                                                                     \
        }                                                                                                         \
    }

// ... and those for two numbers of a small block: the halves of a byte (HALVES) lie half a block apart, or the two are neighbours
#define MOBE_READ_PAIRS(TYPE, FUNCTION, BLOCK, HALVES)                                                            \
    template <> struct mobe_read<TYPE> {                                                                          \
        static constexpr int UNITS  = 32;                                                                         \
        static constexpr int VALUES = 8;                                                                          \
        static __device__ __forceinline__ int first(int u) { return HALVES ? 32*(u/4) + 4*(u%4) : 8*u; }          \
        static __host__ __device__ constexpr int at(int v) { return HALVES && v >= 4 ? v + 12 : v; }              \
        template <typename T> static __device__ __forceinline__ void read(const char * row, int64_t stretch, int u, T * out) { \
            const int64_t ib = stretch*(MOBE_STRETCH/BLOCK) + first(u)/BLOCK;                                     \
            _Pragma("unroll")                                                                                     \
            for (int i = 0; i < 4; i++) {                                                                         \
                float2 pair;                                                                                      \
                FUNCTION(row, ib, first(u)%BLOCK + (HALVES ? i : 2*i), pair);                                     \
                out[HALVES ? i     : 2*i    ] = ggml_cuda_cast<T>(pair.x);                                        \
                out[HALVES ? i + 4 : 2*i + 1] = ggml_cuda_cast<T>(pair.y);                                        \
            }                                                                                                     \
        }                                                                                                         \
    }

#define MOBE_READ_PLAIN(TYPE, C_TYPE)                                                                             \
    template <> struct mobe_read<TYPE> {                                                                          \
        static constexpr int UNITS  = 32;                                                                         \
        static constexpr int VALUES = 8;                                                                          \
        static __device__ __forceinline__ int first(int u) { return 8*u; }                                        \
        static __host__ __device__ constexpr int at(int v) { return v; }                                          \
        template <typename T> static __device__ __forceinline__ void read(const char * row, int64_t stretch, int u, T * out) { \
            __align__(16) C_TYPE in[8];                                                                           \
            ggml_cuda_memcpy_1<sizeof(in) < 16 ? sizeof(in) : 16>(in, (const C_TYPE *) row + stretch*MOBE_STRETCH + 8*u); \
            if (sizeof(in) > 16) {                                                                                \
                ggml_cuda_memcpy_1<16>(in + 4, (const C_TYPE *) row + stretch*MOBE_STRETCH + 8*u + 4);            \
            }                                                                                                     \
            _Pragma("unroll")                                                                                     \
            for (int v = 0; v < 8; v++) {                                                                         \
                out[v] = ggml_cuda_cast<T>(in[v]);                                                                \
            }                                                                                                     \
        }                                                                                                         \
    }

template <ggml_type type> struct mobe_read;

MOBE_READ_PLAIN(GGML_TYPE_F32,  float);
MOBE_READ_PLAIN(GGML_TYPE_F16,  half);
MOBE_READ_PLAIN(GGML_TYPE_BF16, nv_bfloat16);

MOBE_READ_PAIRS(GGML_TYPE_Q1_0, dequantize_q1_0, QK1_0, false);
MOBE_READ_PAIRS(GGML_TYPE_Q2_0, dequantize_q2_0, QK2_0, false);
MOBE_READ_PAIRS(GGML_TYPE_Q4_0, dequantize_q4_0, QK4_0, true);
MOBE_READ_PAIRS(GGML_TYPE_Q4_1, dequantize_q4_1, QK4_1, true);
MOBE_READ_PAIRS(GGML_TYPE_Q5_0, dequantize_q5_0, QK5_0, true);
MOBE_READ_PAIRS(GGML_TYPE_Q5_1, dequantize_q5_1, QK5_1, true);
MOBE_READ_PAIRS(GGML_TYPE_Q8_0, dequantize_q8_0, QK8_0, false);

MOBE_READ_SUPERBLOCK(GGML_TYPE_Q2_K, dequantize_q2_K, 64, 128*(int64_t) (u/32) + (u - 32*(int64_t) (u/32)), 32*v);
MOBE_READ_SUPERBLOCK(GGML_TYPE_Q3_K, dequantize_q3_K, 64, 128*(u/32) + 32*(u/8%4) + 16*(u/4%2) + 4*(u%4), v);
MOBE_READ_SUPERBLOCK(GGML_TYPE_Q4_K, dequantize_q4_K, 32,  64*(int64_t) (u/8) + 4*(int64_t) (u%8),  (v < 4 ? v : v + 28));
MOBE_READ_SUPERBLOCK(GGML_TYPE_Q5_K, dequantize_q5_K, 64,  64*(int64_t) (u/16) + 2*(int64_t) (u%16), (v < 2 ? v : v + 30));
MOBE_READ_SUPERBLOCK(GGML_TYPE_Q6_K, dequantize_q6_K, 64, 128*(int64_t) (u/32) + (u - 32*(int64_t) (u/32)), 32*v);

MOBE_READ_SUPERBLOCK(GGML_TYPE_IQ2_XXS, dequantize_iq2_xxs, 32, 32*(int64_t) (u%8) + 8*(int64_t) (u/8), v);
MOBE_READ_SUPERBLOCK(GGML_TYPE_IQ2_XS,  dequantize_iq2_xs,  32, 32*(int64_t) (u%8) + 8*(int64_t) (u/8), v);
MOBE_READ_SUPERBLOCK(GGML_TYPE_IQ2_S,   dequantize_iq2_s,   32, 32*(int64_t) (u%8) + 8*(int64_t) (u/8), v);
MOBE_READ_SUPERBLOCK(GGML_TYPE_IQ3_XXS, dequantize_iq3_xxs, 32, 32*(int64_t) (u%8) + 8*(int64_t) (u/8), v);
MOBE_READ_SUPERBLOCK(GGML_TYPE_IQ3_S,   dequantize_iq3_s,   32, 32*(int64_t) (u%8) + 8*(int64_t) (u/8), v);
MOBE_READ_SUPERBLOCK(GGML_TYPE_IQ1_S,   dequantize_iq1_s,   32, 32*(int64_t) (u%8) + 8*(int64_t) (u/8), v);
MOBE_READ_SUPERBLOCK(GGML_TYPE_IQ1_M,   dequantize_iq1_m,   32, 32*(int64_t) (u%8) + 8*(int64_t) (u/8), v);
MOBE_READ_SUPERBLOCK(GGML_TYPE_IQ4_NL,  dequantize_iq4_nl,  32, 32*(int64_t) (u%8) + 4*(int64_t) (u/8), (v < 4 ? v : v + 12));
MOBE_READ_SUPERBLOCK(GGML_TYPE_IQ4_XS,  dequantize_iq4_xs,  32, 32*(int64_t) (u%8) + 4*(int64_t) (u/8), (v < 4 ? v : v + 12));
MOBE_READ_SUPERBLOCK(GGML_TYPE_MXFP4,   dequantize_mxfp4,   32, 32*(int64_t) (u%8) + 4*(int64_t) (u/8), (v < 4 ? v : v + 12));

// ggml-cuda has a whole kernel for this type, and no function. A unit is half of 16 numbers that share a scale: 4 bytes.
template <> struct mobe_read<GGML_TYPE_NVFP4> {
    static constexpr int UNITS  = 32;
    static constexpr int VALUES = 8;
    static __device__ __forceinline__ int first(int u) { return 16*(u/2) + 4*(u%2); }
    static __host__ __device__ constexpr int at(int v) { return v < 4 ? v : v + 4; }
    template <typename T> static __device__ __forceinline__ void read(const char * row, int64_t stretch, int u, T * out) {
        const block_nvfp4 * block = (const block_nvfp4 *) row + stretch*(MOBE_STRETCH/QK_NVFP4) + u/8;
        const uint8_t     * qs    = block->qs + 4*(u%8);
        const float         scale = ggml_cuda_ue4m3_to_fp32(block->d[u%8/2]);
#pragma unroll
        for (int v = 0; v < 4; v++) {
            out[v    ] = ggml_cuda_cast<T>(scale*kvalues_mxfp4[qs[v] & 0x0f]);
            out[v + 4] = ggml_cuda_cast<T>(scale*kvalues_mxfp4[qs[v] >> 4]);
        }
    }
};

// For the combination by tensor cores (mobe-cuda-combine.cuh): a thread's part of a row, in f16, as pairs of two bases at one
// column. A stretch is read by NT pieces of 8 threads each. Over mobe_read: any type.
template <ggml_type type, int NT> struct mobe_pairs {
    using source = mobe_read<type>;
    static constexpr int VALUES = source::VALUES;
    static constexpr int STEPS  = source::UNITS/8/NT; // units a thread reads of a piece
    static __device__ __forceinline__ int first(int u) { return source::first(u); }
    static __host__ __device__ constexpr int at(int v) { return source::at(v); }

    struct raw { half v[VALUES]; };
    static __device__ __forceinline__ void load(raw & to, const char * row, int64_t stretch, int u) {
        if constexpr (type == GGML_TYPE_F16) {
            source::read(row, stretch, u, to.v);
        } else {
            float v[VALUES]; // rounded here, as ggml-cuda would: nvcc keeps arrays of floats in registers, of halves less often
            source::read(row, stretch, u, v);
#pragma unroll
            for (int i = 0; i < VALUES; i++) {
                to.v[i] = __float2half_rn(v[i]);
            }
        }
    }
    static __device__ __forceinline__ void clear(raw & to) {
#pragma unroll
        for (int v = 0; v < VALUES; v++) {
            to.v[v] = __float2half(0.0f);
        }
    }
    static __device__ __forceinline__ half2 pair(const raw & a, const raw & b, int v) { return __halves2half2(a.v[v], b.v[v]); }
};

// (v & mask) | bits, which the compiler makes two instructions of when mask and bits are constants
static __device__ __forceinline__ uint32_t mobe_and_or(uint32_t v, uint32_t mask, uint32_t bits) {
#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA) && defined(__CUDA_ARCH__)
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(bits));
    return r;
#else
    return (v & mask) | bits;
#endif
}

// q4_k: 16/NT bytes of quants at once; low nibbles next to the high ones of the same bytes, which then are paired only once
template <int NT> struct mobe_pairs<GGML_TYPE_Q4_K, NT> {
    static constexpr int BYTES  = 16/NT;
    static constexpr int VALUES = 2*BYTES;
    static constexpr int STEPS  = 1;
    static __device__ __forceinline__ int first(int u) { return BYTES*u/32*64 + BYTES*u%32; }
    static __host__ __device__ constexpr int at(int v) { return v/8*4 + v%4 + (v%8 < 4 ? 0 : 32); }

    struct raw {
        uint32_t q[BYTES/4];
        half2 scale; // of the low and of the high nibbles
        half2 min;
    };
    // row: in global or in shared memory, 16 bytes aligned (a block is 9*16 bytes)
    static __device__ __forceinline__ void load(raw & to, const char * row, int64_t stretch, int u) {
        const block_q4_K * block = (const block_q4_K *) row + stretch;
        ggml_cuda_memcpy_1<BYTES>(to.q, block->qs + BYTES*u);
        const uint4 head = *(const uint4 *) block; // dm and the 12 bytes of scales

        // Scales 2*s and 2*s + 1 and their mins, s = 0..3 (get_scale_min_k4), in 16 bits each: bytes 2*(s%2) of q and of q + 4 hold all
        // 6 bits (s < 2) or the upper 2, those of q + 8 the lower 4 of both. What depends on s is the same for all blocks.
        const int      s     = BYTES*u/32;
        const uint32_t bytes = s%2 == 0 ? 0x4140 : 0x4342;
        const int      shift = s < 2 ? 0 : 2;
        const uint32_t upper = s < 2 ? 0x003f003f : 0x00300030;
        const uint32_t lower = s < 2 ? 0          : 0x000f000f;
        const uint32_t four  = __byte_perm(head.w, 0, bytes);
        // 0x6400 is 1024 in f16, and its lowest 10 bits count ones: an integer in a number without a conversion
        const uint32_t sc16 = mobe_and_or(four,      lower, mobe_and_or(__byte_perm(head.y, 0, bytes) >> shift, upper, 0x64006400));
        const uint32_t mn16 = mobe_and_or(four >> 4, lower, mobe_and_or(__byte_perm(head.z, 0, bytes) >> shift, upper, 0x64006400));
        const half2 dm = *(const half2 *) &head.x;
        to.scale = __hmul2(__low2half2 (dm), __hadd2(*(const half2 *) &sc16, __float2half2_rn(-1024.0f)));
        to.min   = __hmul2(__high2half2(dm), __hsub2(__float2half2_rn(1024.0f), *(const half2 *) &mn16));
    }
    static __device__ __forceinline__ void clear(raw & to) {
#pragma unroll
        for (int i = 0; i < BYTES/4; i++) {
            to.q[i] = 0;
        }
        to.scale = to.min = __float2half2_rn(0.0f);
    }
    static __device__ __forceinline__ half2 pair(const raw & a, const raw & b, int v) {
        const int  byte = v/8*4 + v%4;
        const bool high = v%8 >= 4;
        const uint32_t both = __byte_perm(a.q[byte/4], b.q[byte/4], byte%4 | (byte%4 + 4) << 8);
        // as above; 0x5400 is 64, and its bits 4 to 9 count ones
        const uint32_t bits = high ? mobe_and_or(both, 0x00f000f0, 0x54005400) : mobe_and_or(both, 0x000f000f, 0x64006400);
        const half2 quants  = __hadd2(*(const half2 *) &bits, __float2half2_rn(high ? -64.0f : -1024.0f));
        const half2 scale = high ? __highs2half2(a.scale, b.scale) : __lows2half2(a.scale, b.scale);
        const half2 min   = high ? __highs2half2(a.min,   b.min)   : __lows2half2(a.min,   b.min);
        return __hfma2(quants, scale, min);
    }
};

// the types above: X(type); the compile test takes a few (MOBE_CUDA_FEW_TYPES) to be quick
#ifdef MOBE_CUDA_FEW_TYPES
#define MOBE_FOR_TYPES(X) X(GGML_TYPE_F16) X(GGML_TYPE_Q8_0) X(GGML_TYPE_Q4_K) X(GGML_TYPE_IQ4_XS)
#else
#define MOBE_FOR_TYPES(X)                                                                                    \
    X(GGML_TYPE_F32) X(GGML_TYPE_F16) X(GGML_TYPE_BF16)                                                      \
    X(GGML_TYPE_Q4_0) X(GGML_TYPE_Q4_1) X(GGML_TYPE_Q5_0) X(GGML_TYPE_Q5_1) X(GGML_TYPE_Q8_0)                \
    X(GGML_TYPE_Q2_K) X(GGML_TYPE_Q3_K) X(GGML_TYPE_Q4_K) X(GGML_TYPE_Q5_K) X(GGML_TYPE_Q6_K)                \
    X(GGML_TYPE_IQ2_XXS) X(GGML_TYPE_IQ2_XS) X(GGML_TYPE_IQ2_S) X(GGML_TYPE_IQ3_XXS) X(GGML_TYPE_IQ3_S)      \
    X(GGML_TYPE_IQ1_S) X(GGML_TYPE_IQ1_M) X(GGML_TYPE_IQ4_NL) X(GGML_TYPE_IQ4_XS) X(GGML_TYPE_MXFP4)         \
    X(GGML_TYPE_NVFP4) X(GGML_TYPE_Q1_0) X(GGML_TYPE_Q2_0)
#endif
