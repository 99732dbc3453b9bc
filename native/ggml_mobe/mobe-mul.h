// Products of formed rows with inputs, for a prompt: each number that is loaded is used several times. Rows and inputs are
// floats, or bf16 where the processor multiplies those twice as fast (AVX-512 BF16), for bases that are summed as integers:
// either rounding has a squared error of 1e-6 relative to the values.

#pragma once

#include "mobe-vec.h"

#include "ggml-impl.h"

#if defined(__GNUC__) && defined(__AVX512F__) && defined(__AVX512BF16__)
#define MOBE_BF16 1
#endif

enum {
    MOBE_MUL = 4,    // rows of a product
#if defined(__AVX512F__) || defined(__aarch64__)
    MOBE_INPUTS = 4, // and inputs: their sums fit into the registers
#else
    MOBE_INPUTS = 3,
#endif
};

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
    mobe_vec sums[MOBE_MUL][MOBE_INPUTS];
    for (int i = 0; i < n_row; i++) {
        for (int u = 0; u < n_x; u++) {
            sums[i][u] = mobe_vec_set(0.0f);
        }
    }
    for (int64_t c = 0; c < n_vec; c += MOBE_VEC) {
        mobe_vec v[MOBE_INPUTS];
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

// The 16 lanes of each of 16 vectors, the other way round.
MOBE_INLINE void mobe_turn_16(__m512i * v) {
    __m512i t[16];
    MOBE_UNROLL
    for (int i = 0; i < 16; i += 2) { // pairs of rows
        t[i]     = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    MOBE_UNROLL
    for (int i = 0; i < 16; i += 4) { // fours: v[i + c] has columns c, c + 4, c + 8, c + 12
        v[i]     = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    MOBE_UNROLL
    for (int c = 0; c < 4; c++) {
        const __m512i low  = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);       // columns c, c + 8 of rows 0 .. 7
        const __m512i high = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);       // c + 4, c + 12
        const __m512i low_2  = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88); // rows 8 .. 15
        const __m512i high_2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
        t[c]      = _mm512_shuffle_i32x4(low, low_2, 0x88);
        t[c + 8]  = _mm512_shuffle_i32x4(low, low_2, 0xdd);
        t[c + 4]  = _mm512_shuffle_i32x4(high, high_2, 0x88);
        t[c + 12] = _mm512_shuffle_i32x4(high, high_2, 0xdd);
    }
    MOBE_UNROLL
    for (int i = 0; i < 16; i++) {
        v[i] = t[i];
    }
}

enum {
    MOBE_LANES  = 16,
    MOBE_TURNED = 2*MOBE_LANES, // rows
    MOBE_SHARED = 8,            // inputs
};

// Up to MOBE_TURNED rows of n bf16 numbers, a multiple of 32, to [n/2] pairs of columns of all rows, side by side: a product with a
// pair of an input then gives numbers of different rows, and nothing is left to be added up across lanes.
static inline void mobe_turn(const char * rows, size_t row_bytes, int n_row, int64_t n, char * dst) {
    const int n_half = (n_row + MOBE_LANES - 1)/MOBE_LANES;
    for (int half = 0; half < n_half; half++) {
        for (int64_t c = 0; c < n; c += 32) {
            __m512i v[MOBE_LANES];
            MOBE_UNROLL
            for (int i = 0; i < MOBE_LANES; i++) {
                const int row = half*MOBE_LANES + i;
                v[i] = _mm512_load_si512(rows + (row < n_row ? row : 0)*row_bytes + 2*c);
            }
            mobe_turn_16(v);
            MOBE_UNROLL
            for (int i = 0; i < MOBE_LANES; i++) {
                _mm512_store_si512(dst + ((c/2 + i)*n_half + half)*64, v[i]);
            }
        }
    }
}

// dst[u][row] += rows[row] . x[u] for turned rows; n_half and n_x are constants where this is called
MOBE_INLINE void mobe_mul_turned_some(
        const char * rows, const char * const * x, int n_half, int n_row, int n_x, int64_t n, float * const * dst) {
    const int n_sum   = n_half*n_x;
    const int n_chain = n_x >= 8 ? 1 : n_x >= 4 ? 2 : 4; // sums that do not wait for each other; as many for half of the rows
    __m512 sums[4][2*MOBE_SHARED];
    for (int k = 0; k < n_chain; k++) {
        for (int i = 0; i < n_sum; i++) {
            sums[k][i] = _mm512_setzero_ps();
        }
    }
    for (int64_t c = 0; c < n/2; c += n_chain) {
        MOBE_UNROLL
        for (int k = 0; k < n_chain; k++) {
            __m512bh w[2];
            for (int half = 0; half < n_half; half++) {
                w[half] = (__m512bh) _mm512_load_si512(rows + ((c + k)*n_half + half)*64);
            }
            MOBE_UNROLL
            for (int u = 0; u < n_x; u++) {
                int32_t pair;
                memcpy(&pair, x[u] + 4*(c + k), sizeof(pair));
                const __m512bh v = (__m512bh) _mm512_set1_epi32(pair);
                for (int half = 0; half < n_half; half++) {
                    sums[k][u*n_half + half] = _mm512_dpbf16_ps(sums[k][u*n_half + half], w[half], v);
                    MOBE_PIN(sums[k][u*n_half + half]);
                }
            }
        }
    }
    for (int u = 0; u < n_x; u++) {
        for (int half = 0; half < n_half; half++) {
            __m512 sum = sums[0][u*n_half + half];
            for (int k = 1; k < n_chain; k++) {
                sum = _mm512_add_ps(sum, sums[k][u*n_half + half]);
            }
            const int left = n_row - half*MOBE_LANES;
            const __mmask16 mask = left >= MOBE_LANES ? 0xffff : (__mmask16) ((1u << left) - 1);
            float * to = dst[u] + half*MOBE_LANES;
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to)));
        }
    }
}

static inline void mobe_mul_turned(const char * rows, int n_row, const char * const * x, int n_x, int64_t n, float * const * dst) {
    for (int u = 0; u < n_x;) {
        const int left = n_x - u;
#define MOBE_SOME(count) \
        if (left >= count) { \
            if (n_row > MOBE_LANES) { \
                mobe_mul_turned_some(rows, x + u, 2, n_row, count, n, dst + u); \
            } else { \
                mobe_mul_turned_some(rows, x + u, 1, n_row, count, n, dst + u); \
            } \
            u += count; \
            continue; \
        }
        MOBE_SOME(MOBE_SHARED)
        MOBE_SOME(4)
        MOBE_SOME(2)
        MOBE_SOME(1)
#undef MOBE_SOME
    }
}

#endif

// dst[u][row] += rows[row] . x[u] for n_row rows and up to MOBE_INPUTS inputs
static inline void mobe_mul(
        const char * rows, size_t row_bytes, int n_row, const char * const * x, int n_x, int64_t n, float * const * dst) {
    int i = 0;
    for (; i + MOBE_MUL <= n_row; i += MOBE_MUL) {
        const char * four = rows + i*row_bytes;
        float      * to[MOBE_INPUTS];
        for (int u = 0; u < n_x; u++) {
            to[u] = dst[u] + i;
        }
        switch (n_x) {
            case 1:  mobe_mul_floats(four, row_bytes, x, MOBE_MUL, 1, n, to); break;
            case 2:  mobe_mul_floats(four, row_bytes, x, MOBE_MUL, 2, n, to); break;
            case 3:  mobe_mul_floats(four, row_bytes, x, MOBE_MUL, 3, n, to); break;
            default: mobe_mul_floats(four, row_bytes, x, MOBE_MUL, MOBE_INPUTS, n, to); break;
        }
    }
    for (; i < n_row; i++) {
        for (int u = 0; u < n_x; u++) {
            float * to = dst[u] + i;
            mobe_mul_floats(rows + i*row_bytes, row_bytes, x + u, 1, 1, n, &to);
        }
    }
}
