// Sums of the bases of a tile, and f of them: mobe_tile_combine.

#include "mobe-form.h"
#include "mobe-quad-decode.h"
#include "mobe-quad.h"

#include "ggml-impl.h"

#include <string.h>

enum {
    MOBE_SHARE = 32512, // the largest coefficient in units; its upper byte is at most 127, rounded too
#if defined(__AVX512F__) || (defined(__ARM_NEON) && defined(__aarch64__))
    MOBE_SUMS  = 16,    // vectors summed at a time: half of the registers
#else
    MOBE_SUMS  = 8,
#endif
#if defined(__AVX512F__)
    MOBE_IDLE  = 12,    // parts that an expert may have no share in and still be quicker along with others than alone
#else
    MOBE_IDLE  = 2,
#endif
};

MOBE_INLINE void mobe_activate(mobe_vec * values, int n, enum ggml_mobe_activation activation, bool quick) {
    switch (activation) {
        case GGML_MOBE_ACTIVATION_SILU:
            MOBE_UNROLL
            for (int i = 0; i < n; i++) {
                values[i] = quick ? mobe_vec_silu_quick(values[i]) : mobe_vec_silu(values[i]);
            }
            break;
        case GGML_MOBE_ACTIVATION_TANH:
            MOBE_UNROLL
            for (int i = 0; i < n; i++) {
                values[i] = quick ? mobe_vec_tanh_quick(values[i]) : mobe_vec_tanh(values[i]);
            }
            break;
        default: break;
    }
}

// ---- sums of floats

// n_sum vectors for each of n_expert (1 or 2) experts; n_sum and n_expert are constants where this is called. list is NULL for all parts.
MOBE_INLINE void mobe_float_columns(
        const float * const * coefs, float * const * dst, int n_expert, const int32_t * list, int64_t n, const float * data, int64_t c,
        int n_sum, enum ggml_mobe_activation activation) {
    mobe_vec sums[MOBE_SUMS], values[MOBE_SUMS]; // two, or GCC leaves them in memory
    MOBE_UNROLL
    for (int v = 0; v < n_expert*n_sum; v++) {
        sums[v] = mobe_vec_set(0.0f);
    }
    for (int64_t i = 0; i < n; i++) {
        const int64_t part = list ? list[i] : i;
        const float * src  = data + part*MOBE_COLS + c;
        MOBE_KEEP(src);
        mobe_vec coef[2];
        for (int e = 0; e < n_expert; e++) {
            coef[e] = mobe_vec_set(coefs[e][part]);
        }
        MOBE_UNROLL
        for (int v = 0; v < n_sum; v++) {
            const mobe_vec b = mobe_vec_load(src + v*MOBE_VEC);
            for (int e = 0; e < n_expert; e++) {
                sums[e*n_sum + v] = mobe_vec_fma(coef[e], b, sums[e*n_sum + v]);
                MOBE_PIN(sums[e*n_sum + v]);
            }
        }
    }
    MOBE_UNROLL
    for (int v = 0; v < n_expert*n_sum; v++) {
        values[v] = sums[v];
    }
    mobe_activate(values, n_expert*n_sum, activation, false);
    for (int e = 0; e < n_expert; e++) {
        MOBE_UNROLL
        for (int v = 0; v < n_sum; v++) {
            mobe_vec_store(dst[e] + c + v*MOBE_VEC, values[e*n_sum + v]);
        }
    }
}

MOBE_INLINE void mobe_float_row(
        const float * const * coefs, float * const * dst, int n_expert, const int32_t * list, int64_t n, const float * data,
        int64_t n_cols, enum ggml_mobe_activation activation) {
    int64_t c = 0;
    for (; c + MOBE_SUMS/n_expert*MOBE_VEC <= n_cols; c += MOBE_SUMS/n_expert*MOBE_VEC) {
        mobe_float_columns(coefs, dst, n_expert, list, n, data, c, MOBE_SUMS/n_expert, activation);
    }
    for (; c + 4*MOBE_VEC <= n_cols; c += 4*MOBE_VEC) {
        mobe_float_columns(coefs, dst, n_expert, list, n, data, c, 4, activation);
    }
    for (; c < n_cols; c += MOBE_VEC) {
        mobe_float_columns(coefs, dst, n_expert, list, n, data, c, 1, activation);
    }
}

static void mobe_float_combine(
        const struct mobe_former * former, const struct mobe_terms * terms, int n_expert, const struct mobe_tile * tile,
        int64_t n_cols, float * dst, int64_t stride) {
    for (int i = 0; i < n_expert;) {
        // two that mix everything share the loads
        const int64_t n   = tile->list->n[terms[i].group];
        const bool    two = i + 1 < n_expert && terms[i].group == terms[i + 1].group && terms[i].n == n && terms[i + 1].n == n;
        const float * data = (const float *) tile->data + terms[i].group*former->n_part*MOBE_COLS;
        const float * coefs[2] = { terms[i].coef, two ? terms[i + 1].coef : NULL };
        float       * to[2]    = { dst + i*stride, dst + (i + 1)*stride };
        if (two) {
            mobe_float_row(coefs, to, 2, NULL, n, data, n_cols, former->activation);
        } else {
            mobe_float_row(coefs, to, 1, terms[i].part, terms[i].n, data, n_cols, former->activation);
        }
        i += 1 + two;
    }
}

// ---- sums of bytes

#if defined(MOBE_QUAD)

typedef float   mobe_eight __attribute__((vector_size(32)));
typedef int16_t mobe_short __attribute__((vector_size(2*MOBE_VEC))); // MOBE_VEC of them

// as mobe_vec_fma
static inline mobe_eight mobe_eight_fma(mobe_eight a, float b, mobe_eight c) {
#if defined(__aarch64__)
    float32x4_t v[2], sum[2];
    memcpy(v, &a, sizeof(v));
    memcpy(sum, &c, sizeof(sum));
    for (int i = 0; i < 2; i++) {
        sum[i] = vfmaq_n_f32(sum[i], v[i], b);
    }
    memcpy(&c, sum, sizeof(c));
    return c;
#else
    return (mobe_eight) _mm256_fmadd_ps((__m256) a, _mm256_set1_ps(b), (__m256) c);
#endif
}

// What is the same for experts that are formed together. n_expert, n_run, twice and wide are constants where functions take this.
struct mobe_together {
    const struct mobe_former * former;
    const struct mobe_terms  * terms;
    const struct mobe_tile   * tile;
    const int32_t            * list; // of parts, NULL for all
    int64_t                    n;    // parts
    float shift[MOBE_MANY*MOBE_RUNS] MOBE_ALIGNED; // [expert][run] sums of bytes, times unit, plus shift, are the values
    float unit[MOBE_MANY];
};

// bytes of a part's coefficients: [expert][run][4], at least a vector
MOBE_INLINE int mobe_coef_bytes(int n_expert, int n_run) { return n_expert*n_run*4 < 64 ? 64 : n_expert*n_run*4; }

// The coefficients: each times the scales of its basis, as bytes [part][expert][run][4], the lower ones (twice) behind all upper ones;
// and what does not depend on the numbers.
MOBE_INLINE void mobe_bytes_share(struct mobe_together * t, int n_expert, int n_run, bool twice) {
    const struct mobe_former * former = t->former;
    const int64_t   group  = t->terms[0].group;
    const float   * most   = t->tile->most  + group*former->n_pad;
    const float   * shift  = t->tile->shift + group*former->n_pad*MOBE_RUNS;
    const int16_t * scale  = t->tile->scale + group*former->n_part*MOBE_RUNS*4;
    int16_t * const shares = t->tile->shares;
    int8_t  * const high   = t->tile->coefs;
    int8_t  * const low    = high + MOBE_MANY*former->n_part*MOBE_RUNS*4;
    const int64_t   bases  = (t->tile->list->n[group] + MOBE_VEC - 1)/MOBE_VEC*MOBE_VEC;
    const int       each   = mobe_coef_bytes(n_expert, n_run);

    for (int e = 0; e < n_expert; e++) {
        const float * coef = t->terms[e].coef;
        mobe_vec top = mobe_vec_set(0.0f);
        for (int64_t i = 0; i < bases; i += MOBE_VEC) {
            top = mobe_vec_max(top, mobe_vec_abs(mobe_vec_load(coef + i)*mobe_vec_load(most + i)));
        }
        const float largest = mobe_vec_most(top);
        const float to      = largest > 0.0f ? MOBE_SHARE/largest : 0.0f;
        t->unit[e] = largest*((twice ? 1.0f : 256.0f)*32768.0f/32767.0f/MOBE_SHARE);
        for (int64_t i = 0; i < bases; i += MOBE_VEC) {
            const mobe_vec   scaled = mobe_vec_load(coef + i)*mobe_vec_load(most + i);
            const mobe_veci  units  = (mobe_veci) mobe_vec_horner(scaled, mobe_vec_set(to), 12582912.0f); // 1.5*2^23: rounds, in the low bits
            const mobe_short s     = __builtin_convertvector(units, mobe_short);
            memcpy(shares + e*former->n_pad + i, &s, sizeof(s));
        }
    }

    const mobe_quad zero = mobe_quad_set(0x01010101u*(uint32_t) former->zero);
    mobe_quad sums[MOBE_MANY*MOBE_RUNS/MOBE_VEC], low_sums[MOBE_MANY*MOBE_RUNS/MOBE_VEC]; // [expert][run]
    const int n_vec = each/4/MOBE_VEC;
    MOBE_UNROLL
    for (int v = 0; v < n_vec; v++) {
        sums[v] = low_sums[v] = mobe_quad_zero();
    }
    for (int64_t i = 0; i < t->n; i++) {
        const int64_t part = n_expert == 1 && t->list ? t->list[i] : i;
        MOBE_UNROLL
        for (int v = 0; v < n_vec; v++) {
            const int one = v*MOBE_VEC, two = one + 8 < n_expert*n_run ? one + 8 : one;
            const int16_t * of_part = scale + part*MOBE_RUNS*4;
            mobe_quad l;
            const mobe_quad h = mobe_quad_coefs(
                of_part + one%n_run*4, shares + one/n_run*former->n_pad + 4*part, of_part + two%n_run*4,
                shares + two/n_run*former->n_pad + 4*part, twice ? &l : NULL);
            mobe_quad_store(high + part*each + v*4*MOBE_VEC, h);
            sums[v] = mobe_quad_dot(sums[v], zero, h, false);
            if (twice) {
                mobe_quad_store(low + part*each + v*4*MOBE_VEC, l);
                low_sums[v] = mobe_quad_dot(low_sums[v], zero, l, false);
            }
        }
    }
    MOBE_UNROLL
    for (int v = 0; v < n_vec; v++) {
        mobe_vec s = mobe_quad_to_float(sums[v]);
        if (twice) {
            s = mobe_vec_fma(s, mobe_vec_set(256.0f), mobe_quad_to_float(low_sums[v]));
        }
        mobe_vec_store(t->shift + v*MOBE_VEC, s);
    }

    // one sum over the bases, in their order: it must not depend on where on the list they are
    for (int r = 0; r < n_run; r += 8) {
        mobe_eight constant[MOBE_MANY];
        MOBE_UNROLL
        for (int e = 0; e < n_expert; e++) {
            constant[e] = (mobe_eight) { 0 };
        }
        for (int64_t i = 0; i < 4*t->n; i++) {
            const int64_t at = n_expert == 1 && t->list ? 4*t->list[i/4] + i%4 : i;
            mobe_eight s;
            memcpy(&s, shift + at*MOBE_RUNS + r, sizeof(s));
            MOBE_UNROLL
            for (int e = 0; e < n_expert; e++) {
                constant[e] = mobe_eight_fma(s, t->terms[e].coef[at], constant[e]);
            }
        }
        MOBE_UNROLL
        for (int e = 0; e < n_expert; e++) {
            mobe_eight s;
            memcpy(&s, t->shift + e*n_run + r, sizeof(s));
            s = mobe_eight_fma(s, -t->unit[e], constant[e]);
            memcpy(t->shift + e*n_run + r, &s, sizeof(s));
        }
    }
}

MOBE_INLINE void mobe_bytes_add(
        const struct mobe_together * t, int n_expert, int n_run, bool wide, int64_t r, const int8_t * coefs, const char * data,
        mobe_quad * sums) {
    const int n_sum = MOBE_COLS/n_run/MOBE_VEC;
    for (int64_t i = 0; i < t->n; i++) {
        const int64_t  part = n_expert == 1 && t->list ? t->list[i] : i;
        const char   * src  = data + part*MOBE_COLS*4;
        const int8_t * coef = coefs + part*mobe_coef_bytes(n_expert, n_run) + r*4;
        MOBE_KEEP(src);
        MOBE_KEEP(coef);
        mobe_quad b[MOBE_COLS/8/MOBE_VEC];
        for (int v = 0; v < n_sum; v++) {
            b[v] = mobe_quad_load(src + v*4*MOBE_VEC);
        }
        MOBE_UNROLL
        for (int e = 0; e < n_expert; e++) {
            uint32_t four;
            memcpy(&four, coef + e*n_run*4, sizeof(four));
            const mobe_quad c = mobe_quad_set(four);
            MOBE_UNROLL
            for (int v = 0; v < n_sum; v++) {
                sums[e*n_sum + v] = mobe_quad_dot(sums[e*n_sum + v], b[v], c, wide);
                MOBE_PIN(sums[e*n_sum + v]);
            }
        }
    }
}

MOBE_INLINE void mobe_bytes_row(
        struct mobe_together * t, int n_expert, int n_run, bool wide, bool twice, int64_t n_cols, float * dst, int64_t stride) {
    const int run   = MOBE_COLS/n_run;
    const int n_sum = run/MOBE_VEC;
    const int8_t * coefs = t->tile->coefs;
    const int8_t * low   = coefs + MOBE_MANY*t->former->n_part*MOBE_RUNS*4;
    const enum ggml_mobe_activation activation = t->former->activation;

    mobe_bytes_share(t, n_expert, n_run, twice);
    for (int64_t r = 0; r < n_cols/run; r++) {
        const char * data = t->tile->data + (t->terms[0].group*t->former->n_part*MOBE_COLS + r*run)*4;
        mobe_quad sums[MOBE_MANY*MOBE_COLS/8/MOBE_VEC];
        mobe_vec  values[MOBE_MANY*MOBE_COLS/8/MOBE_VEC];
        MOBE_UNROLL
        for (int i = 0; i < n_expert*n_sum; i++) {
            sums[i] = mobe_quad_zero();
        }
        mobe_bytes_add(t, n_expert, n_run, wide, r, coefs, data, sums);
        if (twice) {
            MOBE_UNROLL
            for (int i = 0; i < n_expert*n_sum; i++) {
                sums[i] = (mobe_quad) ((mobe_vecu) sums[i] << 8);
            }
            mobe_bytes_add(t, n_expert, n_run, wide, r, low, data, sums);
        }
        MOBE_UNROLL
        for (int i = 0; i < n_expert*n_sum; i++) {
            values[i] = mobe_vec_fma(mobe_quad_to_float(sums[i]), mobe_vec_set(t->unit[i/n_sum]), mobe_vec_set(t->shift[i/n_sum*n_run + r]));
        }
        mobe_activate(values, n_expert*n_sum, activation, true);
        MOBE_UNROLL
        for (int i = 0; i < n_expert*n_sum; i++) {
            mobe_vec_store(dst + i/n_sum*stride + r*run + i%n_sum*MOBE_VEC, values[i]);
        }
    }
}

// the constants of the functions above: as many experts as share registers, else one
MOBE_INLINE void mobe_bytes_some(
        struct mobe_together * t, int n_expert, int n_run, bool wide, bool twice, int64_t n_cols, float * dst, int64_t stride) {
    switch (n_expert) {
#if MOBE_VEC == 16
        case 8:  mobe_bytes_row(t, 8, n_run, wide, twice, n_cols, dst, stride); break;
        case 4:  mobe_bytes_row(t, 4, n_run, wide, twice, n_cols, dst, stride); break;
#endif
        case 2:  mobe_bytes_row(t, 2, n_run, wide, twice, n_cols, dst, stride); break;
        default: mobe_bytes_row(t, 1, n_run, wide, twice, n_cols, dst, stride); break;
    }
}

typedef void (*mobe_bytes_t)(struct mobe_together * t, int n_expert, int64_t n_cols, float * dst, int64_t stride);

static void mobe_bytes_16(struct mobe_together * t, int n_expert, int64_t n_cols, float * dst, int64_t stride) {
    mobe_bytes_some(t, n_expert, 16, false, false, n_cols, dst, stride);
}

static void mobe_bytes_16_wide(struct mobe_together * t, int n_expert, int64_t n_cols, float * dst, int64_t stride) {
    mobe_bytes_some(t, n_expert, 16, true, false, n_cols, dst, stride);
}

static void mobe_bytes_32(struct mobe_together * t, int n_expert, int64_t n_cols, float * dst, int64_t stride) {
    mobe_bytes_some(t, n_expert, 8, false, false, n_cols, dst, stride);
}

static void mobe_bytes_32_wide(struct mobe_together * t, int n_expert, int64_t n_cols, float * dst, int64_t stride) {
    mobe_bytes_some(t, n_expert, 8, true, false, n_cols, dst, stride);
}

static void mobe_bytes_32_twice(struct mobe_together * t, int n_expert, int64_t n_cols, float * dst, int64_t stride) {
    mobe_bytes_some(t, n_expert, 8, true, true, n_cols, dst, stride);
}

static void mobe_bytes_combine(
        const struct mobe_former * former, const struct mobe_terms * terms, int n_expert, const struct mobe_tile * tile,
        int64_t n_cols, float * dst, int64_t stride) {
    for (int i = 0; i < n_expert;) {
        // those that mix nearly everything share the loads; the rest of it counts as zeros
        const int64_t all = (tile->list->n[terms[i].group] + 3)/4;
        int same = 0;
        while (same < MOBE_MANY && i + same < n_expert && terms[i + same].group == terms[i].group && all - terms[i + same].n <= MOBE_IDLE) {
            same++;
        }
        int n = MOBE_MANY;
        while (n > 1 && n > same) {
            n /= 2;
        }
        struct mobe_together t; // (not all of it set to zero: that would take as long as a part)
        t.former = former;
        t.terms  = terms + i;
        t.tile   = tile;
        t.list   = n > 1 || terms[i].n == all ? NULL : terms[i].part;
        t.n      = n > 1 ? all : terms[i].n;
        const bool wide = mobe_wide(former->format);
        const mobe_bytes_t combine = former->twice ? mobe_bytes_32_twice :
            mobe_run(former->format) == 16 ? (wide ? mobe_bytes_16_wide : mobe_bytes_16) : (wide ? mobe_bytes_32_wide : mobe_bytes_32);
        combine(&t, n, n_cols, dst + i*stride, stride);
        i += n;
    }
}

#endif

void mobe_tile_combine(
        const struct mobe_former * former, const struct mobe_terms * terms, int n_expert, const struct mobe_tile * tile,
        int64_t n_cols, float * dst, int64_t stride) {
#if defined(MOBE_QUAD)
    if (former->bytes) {
        mobe_bytes_combine(former, terms, n_expert, tile, n_cols, dst, stride);
        return;
    }
#endif
    mobe_float_combine(former, terms, n_expert, tile, n_cols, dst, stride);
}
