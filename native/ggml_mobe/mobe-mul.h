// Products of formed rows with inputs, for a prompt: each number that is loaded is used several times. Rows and inputs are
// floats, or bf16 where the processor multiplies those twice as fast (AVX-512 BF16), for bases that are summed as integers:
// either rounding has a squared error of 1e-6 relative to the values.

#pragma once

#include "mobe-vec.h"

#include "ggml-impl.h"

#if defined(__GNUC__) && defined(__AVX512F__) && defined(__AVX512BF16__)
#define MOBE_BF16 1
#endif

enum { MOBE_MUL = 4 }; // rows, and inputs, of a product

// sums[MOBE_VEC] += a*b over n columns, whichever lane a column falls into
static inline void mobe_dot_add(const float * a, const float * b, int64_t n, float * sums) {
    mobe_vec sum[4] = { mobe_vec_load(sums), mobe_vec_set(0.0f), mobe_vec_set(0.0f), mobe_vec_set(0.0f) };
    int64_t c = 0;
    for (; c + 4*MOBE_VEC <= n; c += 4*MOBE_VEC) {
        for (int v = 0; v < 4; v++) {
            sum[v] += mobe_vec_load(a + c + v*MOBE_VEC)*mobe_vec_load(b + c + v*MOBE_VEC);
        }
    }
    for (; c + MOBE_VEC <= n; c += MOBE_VEC) {
        sum[0] += mobe_vec_load(a + c)*mobe_vec_load(b + c);
    }
    mobe_vec_store(sums, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; c < n; c++) {
        sums[0] += a[c]*b[c];
    }
}

// dst[row + u*stride] += rows[row] . x[u] over n columns, for n_row rows that are row_bytes apart and n_x inputs; n_row and n_x are
// constants where this is called
MOBE_INLINE void mobe_mul_floats(
        const char * rows, size_t row_bytes, const char * const * x, int n_row, int n_x, int64_t n, float * const * dst) {
    const int64_t n_vec = n - n%MOBE_VEC;
    mobe_vec sums[MOBE_MUL][MOBE_MUL];
    for (int i = 0; i < n_row; i++) {
        for (int u = 0; u < n_x; u++) {
            sums[i][u] = mobe_vec_set(0.0f);
        }
    }
    for (int64_t c = 0; c < n_vec; c += MOBE_VEC) {
        mobe_vec v[MOBE_MUL];
        for (int u = 0; u < n_x; u++) {
            v[u] = mobe_vec_load((const float *) x[u] + c);
        }
        for (int i = 0; i < n_row; i++) {
            const mobe_vec w = mobe_vec_load((const float *) (rows + i*row_bytes) + c);
            for (int u = 0; u < n_x; u++) {
                sums[i][u] += w*v[u];
            }
        }
    }
    for (int u = 0; u < n_x; u++) {
        for (int i = 0; i < n_row; i++) {
            float sum = mobe_vec_sum(sums[i][u]);
            for (int64_t c = n_vec; c < n; c++) {
                sum += ((const float *) (rows + i*row_bytes))[c]*((const float *) x[u])[c];
            }
            dst[u][i] += sum;
        }
    }
}

#if defined(MOBE_BF16)

// n floats, a multiple of 32
static inline void mobe_bf16_from_float(const float * src, uint16_t * dst, int64_t n) {
    for (int64_t c = 0; c < n; c += 32) {
        const __m512bh v = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(src + c + 16), _mm512_loadu_ps(src + c));
        memcpy(dst + c, &v, sizeof(v));
    }
}

static inline __m512bh mobe_bf16_load(const void * p) { return (__m512bh) _mm512_loadu_si512(p); }

// sums of the 16 lanes of each of four vectors
static inline __m128 mobe_sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); // a b a b in each 128 bits
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 s  = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee)); // a b c d
    const __m256 t  = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}

// as mobe_mul_floats; n is a multiple of 32, n_row 1 or MOBE_MUL
MOBE_INLINE void mobe_mul_bf16(
        const char * rows, size_t row_bytes, const char * const * x, int n_row, int n_x, int64_t n, float * const * dst) {
    __m512 sums[MOBE_MUL][MOBE_MUL];
    for (int i = 0; i < n_row; i++) {
        for (int u = 0; u < n_x; u++) {
            sums[i][u] = _mm512_setzero_ps();
        }
    }
    for (int64_t c = 0; c < n; c += 32) {
        __m512bh v[MOBE_MUL];
        for (int u = 0; u < n_x; u++) {
            v[u] = mobe_bf16_load(x[u] + 2*c);
            MOBE_PIN(v[u]); // or it is loaded again for each row
        }
        for (int i = 0; i < n_row; i++) {
            const __m512bh w = mobe_bf16_load(rows + i*row_bytes + 2*c);
            for (int u = 0; u < n_x; u++) {
                sums[i][u] = _mm512_dpbf16_ps(sums[i][u], w, v[u]);
            }
        }
    }
    for (int u = 0; u < n_x; u++) {
        if (n_row == 1) {
            dst[u][0] += _mm512_reduce_add_ps(sums[0][u]);
            continue;
        }
        const __m128 sum = mobe_sum_four(sums[0][u], sums[1][u], sums[2][u], sums[3][u]);
        _mm_storeu_ps(dst[u], _mm_add_ps(_mm_loadu_ps(dst[u]), sum));
    }
}

#endif

// dst[u][row] += rows[row] . x[u] for n_row rows and up to MOBE_MUL inputs, of numbers of x_each bytes (2: bf16)
static inline void mobe_mul(
        const char * rows, size_t row_bytes, int n_row, const char * const * x, int n_x, size_t x_each, int64_t n, float * const * dst) {
    int i = 0;
    for (; i + MOBE_MUL <= n_row; i += MOBE_MUL) {
        const char * four = rows + i*row_bytes;
        float      * to[MOBE_MUL];
        for (int u = 0; u < n_x; u++) {
            to[u] = dst[u] + i;
        }
#if defined(MOBE_BF16)
        if (x_each == sizeof(uint16_t)) {
            switch (n_x) {
                case 1:  mobe_mul_bf16(four, row_bytes, x, MOBE_MUL, 1, n, to); break;
                case 2:  mobe_mul_bf16(four, row_bytes, x, MOBE_MUL, 2, n, to); break;
                case 3:  mobe_mul_bf16(four, row_bytes, x, MOBE_MUL, 3, n, to); break;
                default: mobe_mul_bf16(four, row_bytes, x, MOBE_MUL, 4, n, to); break;
            }
            continue;
        }
#endif
        switch (n_x) {
            case 1:  mobe_mul_floats(four, row_bytes, x, MOBE_MUL, 1, n, to); break;
            case 2:  mobe_mul_floats(four, row_bytes, x, MOBE_MUL, 2, n, to); break;
            case 3:  mobe_mul_floats(four, row_bytes, x, MOBE_MUL, 3, n, to); break;
            default: mobe_mul_floats(four, row_bytes, x, MOBE_MUL, 4, n, to); break;
        }
    }
    for (; i < n_row; i++) {
        for (int u = 0; u < n_x; u++) {
            float * to = dst[u] + i;
#if defined(MOBE_BF16)
            if (x_each == sizeof(uint16_t)) {
                mobe_mul_bf16(rows + i*row_bytes, row_bytes, x + u, 1, 1, n, &to);
                continue;
            }
#endif
            mobe_mul_floats(rows + i*row_bytes, row_bytes, x + u, 1, 1, n, &to);
        }
    }
    GGML_UNUSED(x_each);
}
