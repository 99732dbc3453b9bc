// Rows that a cache keeps: bytes with a scale in half precision for each 32 columns, the numbers of q8_0, and their products with
// inputs in the same form. The scales come first, then the bytes. Where the processor has no products of bytes (mobe-quad.h), ggml's own q8_0 and
// its products serve (mobe-cache.c).

#pragma once

#include "mobe-bytes.h"

#if defined(MOBE_QUAD)

#include "ggml.h"
#include "simd-mappings.h"

#include <math.h>

// whole vectors of bytes
static inline bool mobe_kept_takes(int64_t d) { return d % 64 == 0; }

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

// eight scales of a row
static inline void mobe_kept_scales(mobe_eight scale, int n, ggml_fp16_t * dst) {
    ggml_fp16_t half[8];
#if defined(__F16C__)
    const __m128i v = _mm256_cvtps_ph((__m256) scale, _MM_FROUND_TO_NEAREST_INT);
    memcpy(half, &v, sizeof(half));
#else
    for (int i = 0; i < 8; i++) {
        half[i] = GGML_CPU_FP32_TO_FP16(scale[i]);
    }
#endif
    memcpy(dst, half, n*sizeof(ggml_fp16_t));
}

// columns c0 .. c0 + n of n_row <= MOBE_ENCODED rows of d; values lie MOBE_COLS apart and are lost
static inline void mobe_kept_encode(float * values, int n_row, int64_t n, char * const * rows, int64_t c0, int64_t d) {
    int8_t   * bytes[MOBE_ENCODED];
    mobe_eight scale[MOBE_ENCODED];
    for (int i = 0; i < n_row; i++) {
        bytes[i] = (int8_t *) rows[i] + d/32*sizeof(ggml_fp16_t) + c0;
    }
    mobe_bytes_encode(values, n_row, n, MOBE_WIDE_BIAS, bytes, scale);
    for (int i = 0; i < n_row; i++) {
        mobe_kept_scales(scale[i], (int) (n/32), (ggml_fp16_t *) rows[i] + c0/32);
    }
}

static inline void mobe_kept_encode_input(const float * src, int64_t d, const struct mobe_kept_input * dst) {
    for (int64_t c = 0; c < d; c += MOBE_COLS) {
        const int64_t n = d - c < MOBE_COLS ? d - c : MOBE_COLS;
        int32_t sums[MOBE_COLS/32];
        const mobe_eight scale = mobe_bytes_encode_input(src + c, n, dst->bytes + c, sums);
        for (int64_t b = 0; b < n/32; b++) {
            dst->scale[c/32 + b] = scale[b];
            dst->bias[c/32 + b]  = -(float) MOBE_WIDE_BIAS*sums[b]*scale[b];
        }
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
