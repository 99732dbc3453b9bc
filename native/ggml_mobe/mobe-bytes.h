// Floats as bytes with a scale for each 32 of them, as in q8_0: what a prompt multiplies.

#pragma once

#include "mobe-quad.h"

#if defined(MOBE_QUAD)

#include "mobe-dequant.h"

// 32 floats of each of two scales as bytes
static inline void mobe_bytes_round(const float * src, const float * by, int32_t bias, int8_t * dst) {
#if MOBE_VEC == 16
    __m512i v[4];
    MOBE_UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(src + 16*i), _mm512_set1_ps(by[i/2])));
    }
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i all = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    _mm512_storeu_si512(dst, _mm512_xor_si512(_mm512_permutexvar_epi32(order, all), _mm512_set1_epi8((char) bias)));
#elif MOBE_VEC == 8
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    for (int b = 0; b < 2; b++) {
        __m256i v[4];
        MOBE_UNROLL
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(src + 32*b + 8*i), _mm256_set1_ps(by[b])));
        }
        const __m256i all = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        _mm256_storeu_si256((__m256i *) (dst + 32*b), _mm256_xor_si256(_mm256_permutevar8x32_epi32(all, order), _mm256_set1_epi8((char) bias)));
    }
#else
    (void) bias; // products of signed bytes
    for (int b = 0; b < 4; b++) {
        int16x4_t v[4];
        MOBE_UNROLL
        for (int i = 0; i < 4; i++) {
            v[i] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(src + 16*b + 4*i), by[b/2])));
        }
        vst1q_s8(dst + 16*b, vcombine_s8(vqmovn_s16(vcombine_s16(v[0], v[1])), vqmovn_s16(vcombine_s16(v[2], v[3]))));
    }
#endif
}

// the largest absolute value of each 32 of MOBE_COLS floats
static inline mobe_eight mobe_bytes_most(const float * src) {
    mobe_vec top[8];
    MOBE_UNROLL
    for (int b = 0; b < 8; b++) {
        top[b] = mobe_vec_abs(mobe_vec_load(src + 32*b));
        MOBE_UNROLL
        for (int i = 1; i < 32/MOBE_VEC; i++) {
            top[b] = mobe_vec_max(top[b], mobe_vec_abs(mobe_vec_load(src + 32*b + i*MOBE_VEC)));
        }
    }
    return mobe_vec_most_of(top, 8);
}

enum { MOBE_ENCODED = 8 }; // rows at once

// n columns of n_row <= MOBE_ENCODED rows as bytes, with bias (0 or MOBE_WIDE_BIAS) added; up to the next multiple of 64, as if zeros
// followed. The rows lie MOBE_COLS apart and are cleared from n on. All scales come first: waiting for one row's would keep the next from beginning.
static inline void mobe_bytes_encode(float * src, int n_row, int64_t n, int32_t bias, int8_t * const * dst, mobe_eight * scale) {
    float by[MOBE_ENCODED][8] MOBE_ALIGNED;
    for (int i = 0; i < n_row; i++) {
        for (int64_t c = n; c < MOBE_COLS; c++) {
            src[i*MOBE_COLS + c] = 0.0f;
        }
        const mobe_eight most = mobe_bytes_most(src + i*MOBE_COLS);
        const mobe_eight to   = 127.0f/(most + 1e-30f); // not 0
        scale[i] = most*(1.0f/127.0f);
        memcpy(by[i], &to, sizeof(to));
    }
    for (int i = 0; i < n_row; i++) {
        for (int64_t c = 0; c < n; c += 64) {
            mobe_bytes_round(src + i*MOBE_COLS + c, by[i] + c/32, bias, dst[i] + c);
        }
    }
}

// n <= MOBE_COLS columns of an input, a multiple of 32, as above; sums: of the bytes of each 32, what a bias of the rows is multiplied by
static inline mobe_eight mobe_bytes_encode_input(const float * src, int64_t n, int8_t * dst, int32_t * sums) {
    float values[MOBE_COLS] MOBE_ALIGNED;
    mobe_eight scale;
    memcpy(values, src, n*sizeof(float));
    mobe_bytes_encode(values, 1, n, 0, &dst, &scale);
    for (int64_t b = 0; b < n/32; b++) {
        sums[b] = 0;
        for (int i = 0; i < 32; i++) {
            sums[b] += dst[32*b + i];
        }
    }
    return scale;
}

#endif
