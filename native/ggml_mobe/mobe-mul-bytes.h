// Products of formed rows with inputs in a prompt, both as bytes with a scale for each 32 columns, where the processor multiplies bytes in
// one instruction. Each rounding has a squared error of about 2e-5 relative to the values, as that of inputs in ggml's own products.

#pragma once

#include "mobe-bytes.h"

#include <stdbool.h>

#if defined(MOBE_QUAD)

enum {
    MOBE_RUN_32 = MOBE_COLS/32,
#if MOBE_VEC == 16
    MOBE_PANEL_VECS = 2, MOBE_SHARED = 4, // inputs: two sums for each vector of rows fit into the registers
#elif MOBE_VEC == 8
    MOBE_PANEL_VECS = 2, MOBE_SHARED = 3,
#else
    MOBE_PANEL_VECS = 4, MOBE_SHARED = 3,
#endif
    MOBE_PANEL = MOBE_PANEL_VECS*MOBE_VEC, // rows
};

// MOBE_COLS columns of an input
struct mobe_packed {
    int8_t  bytes[MOBE_COLS];
    float   scale[MOBE_RUN_32];
    int32_t bias[MOBE_RUN_32]; // what MOBE_WIDE_BIAS in the rows adds to the products, to be taken away
};

// n columns, a multiple of 32
static inline void mobe_packed_encode(const float * src, int64_t n, struct mobe_packed * dst) {
    const mobe_eight scale = mobe_bytes_encode_input(src, n, dst->bytes, dst->bias);
    memcpy(dst->scale, &scale, sizeof(dst->scale));
    for (int64_t b = 0; b < n/32; b++) {
        dst->bias[b] *= -MOBE_WIDE_BIAS;
    }
}

// The lower and the upper lanes of each 128 bits of two vectors, one of either in turns: of 32 bits, and of 64.
#if MOBE_VEC == 16
#define MOBE_LOW(bits, a, b)  _mm512_unpacklo_epi##bits(a, b)
#define MOBE_HIGH(bits, a, b) _mm512_unpackhi_epi##bits(a, b)
#elif MOBE_VEC == 8
#define MOBE_LOW(bits, a, b)  _mm256_unpacklo_epi##bits(a, b)
#define MOBE_HIGH(bits, a, b) _mm256_unpackhi_epi##bits(a, b)
#else
#define MOBE_LOW(bits, a, b)  vreinterpretq_s32_s##bits(vzip1q_s##bits(vreinterpretq_s##bits##_s32(a), vreinterpretq_s##bits##_s32(b)))
#define MOBE_HIGH(bits, a, b) vreinterpretq_s32_s##bits(vzip2q_s##bits(vreinterpretq_s##bits##_s32(a), vreinterpretq_s##bits##_s32(b)))
#define vreinterpretq_s32_s32(v) (v)
#endif

// The lanes of each of MOBE_VEC vectors, the other way round.
MOBE_INLINE void mobe_quad_turn(mobe_quad * v) {
    mobe_quad t[MOBE_VEC];
    MOBE_UNROLL
    for (int i = 0; i < MOBE_VEC; i += 2) { // pairs of rows
        t[i]     = MOBE_LOW(32, v[i], v[i + 1]);
        t[i + 1] = MOBE_HIGH(32, v[i], v[i + 1]);
    }
    MOBE_UNROLL
    for (int i = 0; i < MOBE_VEC; i += 4) { // fours: v[i + c] has columns c, c + 4, c + 8, c + 12
        v[i]     = MOBE_LOW(64, t[i], t[i + 2]);
        v[i + 1] = MOBE_HIGH(64, t[i], t[i + 2]);
        v[i + 2] = MOBE_LOW(64, t[i + 1], t[i + 3]);
        v[i + 3] = MOBE_HIGH(64, t[i + 1], t[i + 3]);
    }
#if MOBE_VEC == 16
    MOBE_UNROLL
    for (int c = 0; c < 4; c++) {
        const __m512i low  = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);       // columns c, c + 8 of rows 0 .. 7
        const __m512i high = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);       // c + 4, c + 12
        const __m512i low_2  = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88); // rows 8 .. 15
        const __m512i high_2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
        v[c]      = _mm512_shuffle_i32x4(low, low_2, 0x88);
        v[c + 8]  = _mm512_shuffle_i32x4(low, low_2, 0xdd);
        v[c + 4]  = _mm512_shuffle_i32x4(high, high_2, 0x88);
        v[c + 12] = _mm512_shuffle_i32x4(high, high_2, 0xdd);
    }
#elif MOBE_VEC == 8
    MOBE_UNROLL
    for (int c = 0; c < 4; c++) {
        const mobe_quad low = _mm256_permute2x128_si256(v[c], v[4 + c], 0x20);
        v[4 + c] = _mm256_permute2x128_si256(v[c], v[4 + c], 0x31);
        v[c]     = low;
    }
#endif
}

#undef MOBE_LOW
#undef MOBE_HIGH
#undef vreinterpretq_s32_s32

// MOBE_PANEL rows of n columns to [n/4] quads of all rows, side by side: a product with four numbers of an input then gives numbers of
// different rows, and nothing is left to be added up across lanes. Behind the last row stands anything.
static inline void mobe_turn(const int8_t * rows, int n_row, int64_t n, char * dst) {
    for (int part = 0; part < MOBE_PANEL_VECS && part*MOBE_VEC < n_row; part++) {
        for (int64_t c = 0; c < n; c += 4*MOBE_VEC) {
            mobe_quad v[MOBE_VEC];
            MOBE_UNROLL
            for (int i = 0; i < MOBE_VEC; i++) {
                const int row = part*MOBE_VEC + i;
                memcpy(&v[i], rows + (row < n_row ? row : 0)*MOBE_COLS + c, sizeof(mobe_quad));
            }
            mobe_quad_turn(v);
            MOBE_UNROLL
            for (int i = 0; i < MOBE_VEC; i++) {
                mobe_quad_store(dst + ((c/4 + i)*MOBE_PANEL_VECS + part)*4*MOBE_VEC, v[i]);
            }
        }
    }
}

// dst[u][row] += rows[row] . x[u] over n columns for the first n_vec vectors of rows of a panel; n_vec and n_x are constants where this is
// called
MOBE_INLINE void mobe_mul_panel(
        const char * turned, int n_vec, const float * scale, int64_t scale_stride, const struct mobe_packed * const * x, int n_x, int64_t n,
        float * const * dst) {
    mobe_vec sums[MOBE_SHARED*MOBE_PANEL_VECS];
    MOBE_UNROLL
    for (int i = 0; i < n_x*n_vec; i++) {
        sums[i] = mobe_vec_load(dst[i/n_vec] + i%n_vec*MOBE_VEC);
    }
    for (int64_t b = 0; b < n/32; b++) {
        mobe_quad dots[MOBE_SHARED*MOBE_PANEL_VECS];
        MOBE_UNROLL
        for (int i = 0; i < n_x*n_vec; i++) {
            dots[i] = mobe_quad_set((uint32_t) x[i/n_vec]->bias[b]);
        }
        MOBE_UNROLL
        for (int c = 0; c < 8; c++) {
            mobe_quad w[MOBE_PANEL_VECS];
            for (int i = 0; i < n_vec; i++) {
                w[i] = mobe_quad_load(turned + ((8*b + c)*MOBE_PANEL_VECS + i)*4*MOBE_VEC);
            }
            MOBE_UNROLL
            for (int u = 0; u < n_x; u++) {
                uint32_t four;
                memcpy(&four, x[u]->bytes + 32*b + 4*c, sizeof(four));
                const mobe_quad v = mobe_quad_set(four);
                for (int i = 0; i < n_vec; i++) {
                    dots[u*n_vec + i] = mobe_quad_dot(dots[u*n_vec + i], w[i], v, true);
                    MOBE_PIN(dots[u*n_vec + i]);
                }
            }
        }
        MOBE_UNROLL
        for (int i = 0; i < n_x*n_vec; i++) {
            const mobe_vec s = mobe_vec_load(scale + b*scale_stride + i%n_vec*MOBE_VEC)*mobe_vec_set(x[i/n_vec]->scale[b]);
            sums[i] = mobe_vec_fma(mobe_quad_to_float(dots[i]), s, sums[i]);
            MOBE_PIN(sums[i]);
        }
    }
    MOBE_UNROLL
    for (int i = 0; i < n_x*n_vec; i++) {
        mobe_vec_store(dst[i/n_vec] + i%n_vec*MOBE_VEC, sums[i]);
    }
}

// The same for n_row rows of a panel, or all of it, and up to MOBE_SHARED inputs. What is added behind the last row means nothing.
static inline void mobe_mul_bytes(
        const char * turned, int n_row, const float * scale, int64_t scale_stride, const struct mobe_packed * const * x, int n_x, int64_t n,
        float * const * dst) {
    const bool half = n_row <= MOBE_PANEL/2;
#define MOBE_SOME(n_x) \
    if (half) { \
        mobe_mul_panel(turned, MOBE_PANEL_VECS/2, scale, scale_stride, x, n_x, n, dst); \
    } else { \
        mobe_mul_panel(turned, MOBE_PANEL_VECS, scale, scale_stride, x, n_x, n, dst); \
    } \
    break;
    switch (n_x) {
        case 1:  MOBE_SOME(1)
        case 2:  MOBE_SOME(2)
        case 3:  MOBE_SOME(3)
        default: MOBE_SOME(MOBE_SHARED)
    }
#undef MOBE_SOME
}

#endif
