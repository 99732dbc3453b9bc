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

// q4_k: 16/NT bytes of quants at once, two bases' nibbles dequantized by one instruction each step
template <int NT> struct mobe_pairs<GGML_TYPE_Q4_K, NT> {
    static constexpr int BYTES  = 16/NT;
    static constexpr int VALUES = 2*BYTES;
    static constexpr int STEPS  = 1;
    static __device__ __forceinline__ int first(int u) { return BYTES*u/32*64 + BYTES*u%32; }
    static __host__ __device__ constexpr int at(int v) { return v < BYTES ? v : v - BYTES + 32; }

    struct raw {
        uint32_t q[BYTES/4];
        half2 scale; // of the low and of the high nibbles
        half2 min;
    };
    static __device__ __forceinline__ void load(raw & to, const char * row, int64_t stretch, int u) {
        const block_q4_K * block = (const block_q4_K *) row + stretch;
        ggml_cuda_memcpy_1<BYTES>(to.q, block->qs + BYTES*u);

        const uint4 head = *(const uint4 *) block; // dm and the 12 bytes of scales; a block is 9*16 bytes
        const float2 dm  = __half22float2(*(const half2 *) &head.x);

        // scales 2*s and 2*s + 1 and their mins, s = 0..3 (get_scale_min_k4 on words)
        const int s     = BYTES*u/32;
        const int shift = 16*(s & 1);
        const uint32_t first = head.y >> shift, second = head.z >> shift, third = head.w >> shift; // bytes 2*(s%2) of q, q + 4, q + 8
        const uint32_t sc = s < 2 ? first  & 0x3f3f : (third        & 0x0f0f) | ((first  >> 2) & 0x3030);
        const uint32_t mn = s < 2 ? second & 0x3f3f : ((third >> 4) & 0x0f0f) | ((second >> 2) & 0x3030);
        to.scale = __floats2half2_rn( dm.x*(sc & 0xff),  dm.x*((sc >> 8) & 0xff));
        to.min   = __floats2half2_rn(-dm.y*(mn & 0xff), -dm.y*((mn >> 8) & 0xff));
    }
    static __device__ __forceinline__ void clear(raw & to) {
#pragma unroll
        for (int i = 0; i < BYTES/4; i++) {
            to.q[i] = 0;
        }
        to.scale = to.min = __float2half2_rn(0.0f);
    }
    static __device__ __forceinline__ half2 pair(const raw & a, const raw & b, int v) {
        const int  byte = v%BYTES;
        const bool high = v >= BYTES;
        // 0x6400 is 1024 in f16, and its lowest 10 bits count ones: q, or 16*q, in a number without a conversion
        const uint32_t both = __byte_perm(a.q[byte/4], b.q[byte/4], byte%4 | (byte%4 + 4) << 8);
        const uint32_t bits = (both & (high ? 0x00f000f0 : 0x000f000f)) | 0x64006400;
        const half2 quants  = high ?
            __hfma2(*(const half2 *) &bits, __float2half2_rn(0.0625f), __float2half2_rn(-64.0f)) :
            __hadd2(*(const half2 *) &bits, __float2half2_rn(-1024.0f));
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
    X(GGML_TYPE_IQ1_S) X(GGML_TYPE_IQ1_M) X(GGML_TYPE_IQ4_NL) X(GGML_TYPE_IQ4_XS) X(GGML_TYPE_MXFP4)
#endif
