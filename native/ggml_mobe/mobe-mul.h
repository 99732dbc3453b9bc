// Products of formed rows with inputs, both floats. In a prompt each number that is loaded is used several times.

#pragma once

#include "mobe-dequant.h"
#include "mobe-vec.h"

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

// dst[u][row] += rows[row] . x[u] over n columns; rows are MOBE_COLS apart; n_row and n_x are constants where this is called
MOBE_INLINE void mobe_mul_some(const float * rows, const float * const * x, int n_row, int n_x, int64_t n, float * const * dst) {
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
            v[u] = mobe_vec_load(x[u] + c);
        }
        for (int i = 0; i < n_row; i++) {
            const mobe_vec w = mobe_vec_load(rows + i*MOBE_COLS + c);
            for (int u = 0; u < n_x; u++) {
                sums[i][u] += w*v[u];
            }
        }
    }
    for (int u = 0; u < n_x; u++) {
        for (int i = 0; i < n_row; i++) {
            float sum = mobe_vec_sum(sums[i][u]);
            for (int64_t c = n_vec; c < n; c++) {
                sum += rows[i*MOBE_COLS + c]*x[u][c];
            }
            dst[u][i] += sum;
        }
    }
}

// dst[u][row] += rows[row] . x[u] for n_row rows and up to MOBE_INPUTS inputs
static inline void mobe_mul(const float * rows, int n_row, const float * const * x, int n_x, int64_t n, float * const * dst) {
    int i = 0;
    for (; i + MOBE_MUL <= n_row; i += MOBE_MUL) {
        const float * four = rows + i*MOBE_COLS;
        float       * to[MOBE_INPUTS];
        for (int u = 0; u < n_x; u++) {
            to[u] = dst[u] + i;
        }
        switch (n_x) {
            case 1:  mobe_mul_some(four, x, MOBE_MUL, 1, n, to); break;
            case 2:  mobe_mul_some(four, x, MOBE_MUL, 2, n, to); break;
            case 3:  mobe_mul_some(four, x, MOBE_MUL, 3, n, to); break;
            default: mobe_mul_some(four, x, MOBE_MUL, MOBE_INPUTS, n, to); break;
        }
    }
    for (; i < n_row; i++) {
        for (int u = 0; u < n_x; u++) {
            float * to = dst[u] + i;
            mobe_mul_some(rows + i*MOBE_COLS, x + u, 1, 1, n, &to);
        }
    }
}
