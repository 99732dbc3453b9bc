// Rows that a cache keeps: bytes with a scale in half precision for each 32 columns, the numbers of q8_0, and their products with
// inputs in the same form. The scales come first, then the bytes. Where the processor has no products of bytes (mobe-quad.h), ggml's own q8_0 and
// its products serve (mobe-cache.c).

#pragma once

#include "mobe-quad.h"

#if defined(MOBE_QUAD)

#include "ggml.h"
#include "simd-mappings.h"

#include <math.h>

// whole vectors of bytes
static inline bool mobe_kept_takes(int64_t d) { return d % 32 == 0 && d % (4*MOBE_VEC) == 0; }

static inline mobe_quad mobe_kept_load(const void * p) { mobe_quad v; memcpy(&v, p, sizeof(v)); return v; }

// each number for the lanes of its 32 columns
static inline mobe_vec mobe_kept_spread(const float * p) {
#if MOBE_VEC == 16
    const __m512i lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return (mobe_vec) _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *) p))));
#else
    return mobe_vec_set(*p);
#endif
}

// the low bytes of MOBE_VEC integers
static inline void mobe_kept_store(int8_t * dst, mobe_veci v) {
#if MOBE_VEC == 16
    _mm_storeu_si128((__m128i *) dst, _mm512_cvtepi32_epi8((__m512i) v));
#elif MOBE_VEC == 8
    const __m256i order = _mm256_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 12, 8, 4, 0,
        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 12, 8, 4, 0);
    const __m256i four = _mm256_shuffle_epi8((__m256i) v, order);
    _mm_storel_epi64((__m128i *) dst, _mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1)));
#else
    const uint8x8_t four = vmovn_u16(vcombine_u16(vmovn_u32((uint32x4_t) v), vdup_n_u16(0)));
    memcpy(dst, &four, 4);
#endif
}

static inline ggml_fp16_t mobe_kept_half(float v) {
#if defined(__F16C__)
    return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
    return GGML_CPU_FP32_TO_FP16(v);
#endif
}

static inline void mobe_kept_halves(const ggml_fp16_t * src, int n, float * dst) {
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_store_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (src + i))));
    }
#endif
    for (; i < n; i++) {
        dst[i] = GGML_CPU_FP16_TO_FP32(src[i]);
    }
}

// An input: bytes; the scale of each 32 columns; and what MOBE_WIDE_BIAS adds to their products, to be taken away.
struct mobe_kept_input {
    int8_t * bytes; // [d]
    float  * scale; // [d/32, rounded up to 16]
    float  * bias;  // the same
};

static inline size_t mobe_kept_input_bytes(int64_t d) { return (d + 63)/64*64 + 2*((d/32 + 15)/16*16)*sizeof(float); }

static inline struct mobe_kept_input mobe_kept_input_at(char * memory, int64_t d) {
    const int64_t n = (d/32 + 15)/16*16;
    float * scale = (float *) (memory + (d + 63)/64*64);
    return (struct mobe_kept_input) { (int8_t *) memory, scale, scale + n };
}

// 32 floats as bytes, with bias added; returns their scale
static inline float mobe_kept_encode_32(const float * src, float bias, int8_t * dst) {
    mobe_vec v[32/MOBE_VEC];
    mobe_vec top = mobe_vec_set(0.0f);
    for (int i = 0; i < 32/MOBE_VEC; i++) {
        v[i] = mobe_vec_load(src + i*MOBE_VEC);
        top  = mobe_vec_max(top, mobe_vec_abs(v[i]));
    }
    const float most = mobe_vec_most(top);
    const float to   = most > 0.0f ? 127.0f/most : 0.0f;
    for (int i = 0; i < 32/MOBE_VEC; i++) {
        mobe_kept_store(dst + i*MOBE_VEC, (mobe_veci) (v[i]*to + (12582912.0f + bias))); // 1.5*2^23: rounds to an integer, in the low bits
    }
    return most*(1.0f/127.0f);
}

#if MOBE_VEC == 16
// the same for eight times 32 floats, with the scales as halves
static inline void mobe_kept_encode_256(const float * src, int8_t * dst, ggml_fp16_t * scales) {
    mobe_vec top[8];
    MOBE_UNROLL
    for (int b = 0; b < 8; b++) {
        top[b] = mobe_vec_max(mobe_vec_abs(mobe_vec_load(src + 32*b)), mobe_vec_abs(mobe_vec_load(src + 32*b + 16)));
    }
    const mobe_eight most = mobe_vec_most_of(top, 8);
    const __m128i half = _mm256_cvtps_ph((__m256) (most*(1.0f/127.0f)), _MM_FROUND_TO_NEAREST_INT);
    float to[8] MOBE_ALIGNED;
    const mobe_eight by = 127.0f/(most + 1e-30f); // not 0
    memcpy(scales, &half, sizeof(half));
    memcpy(to, &by, sizeof(to));
    MOBE_UNROLL
    for (int i = 0; i < 16; i++) {
        mobe_kept_store(dst + 16*i, (mobe_veci) (mobe_vec_load(src + 16*i)*mobe_vec_set(to[i/2]) + (12582912.0f + MOBE_WIDE_BIAS)));
    }
}
#endif

// columns c0 .. c0 + n of a row of d, whole blocks of 32
static inline void mobe_kept_encode(const float * src, int64_t c0, int64_t n, char * row, int64_t d) {
    ggml_fp16_t * scales = (ggml_fp16_t *) row + c0/32;
    int8_t      * bytes  = (int8_t *) row + d/32*sizeof(ggml_fp16_t) + c0;
#if MOBE_VEC == 16
    if (n == 256) {
        mobe_kept_encode_256(src, bytes, scales);
        return;
    }
#endif
    for (int64_t b = 0; b < n/32; b++) {
        scales[b] = mobe_kept_half(mobe_kept_encode_32(src + 32*b, MOBE_WIDE_BIAS, bytes + 32*b));
    }
}

static inline void mobe_kept_encode_input(const float * src, int64_t d, const struct mobe_kept_input * dst) {
    for (int64_t b = 0; b < d/32; b++) {
        int sum = 0;
        dst->scale[b] = mobe_kept_encode_32(src + 32*b, 0.0f, dst->bytes + 32*b);
        for (int i = 0; i < 32; i++) {
            sum += dst->bytes[32*b + i];
        }
        dst->bias[b] = -(float) MOBE_WIDE_BIAS*sum*dst->scale[b];
    }
    for (int64_t b = d/32; b % 16 != 0; b++) {
        dst->scale[b] = dst->bias[b] = 0.0f;
    }
}

static inline float mobe_kept_dot(const char * row, int64_t d, const struct mobe_kept_input * x) {
    const ggml_fp16_t * scales = (const ggml_fp16_t *) row;
    const char        * bytes  = row + d/32*sizeof(ggml_fp16_t);
    mobe_vec sums[2] = { mobe_vec_set(0.0f), mobe_vec_set(0.0f) };
    mobe_vec bias    = mobe_vec_set(0.0f);
    for (int64_t b0 = 0; b0 < d/32; b0 += 16) { // 16 blocks
        const int n = d/32 - b0 < 16 ? (int) (d/32 - b0) : 16;
        float scale[16] MOBE_ALIGNED = { 0 };
        mobe_kept_halves(scales + b0, n, scale);
        for (int i = 0; i < 16; i += MOBE_VEC) {
            const mobe_vec s = mobe_vec_load(scale + i);
            bias += s*mobe_vec_load(x->bias + b0 + i);
            mobe_vec_store(scale + i, s*mobe_vec_load(x->scale + b0 + i));
        }
        const char   * w = bytes + 32*b0;
        const int8_t * v = x->bytes + 32*b0;
        MOBE_UNROLL
        for (int i = 0; i < 512/(4*MOBE_VEC); i++) {
            if (4*MOBE_VEC*i < 32*n) {
                const mobe_quad products = mobe_quad_dot(
                    mobe_quad_zero(), mobe_kept_load(w + 4*MOBE_VEC*i), mobe_kept_load(v + 4*MOBE_VEC*i), true);
                sums[i%2] += mobe_quad_to_float(products)*mobe_kept_spread(scale + 4*MOBE_VEC*i/32);
            }
        }
    }
    return mobe_vec_sum(sums[0] + sums[1] + bias);
}

#endif
