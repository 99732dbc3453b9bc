// Sums of the bases of a tile, and f of them: mobe_tile_combine.

#include "mobe-form.h"
#include "mobe-quad-decode.h"
#include "mobe-quad.h"

#include "ggml-impl.h"

#include <string.h>

enum {
    MOBE_SHARE = 2032, // the largest coefficient in units: times MOBE_SCALE, and shifted by 15 bits, at most 127
    MOBE_SHARE_TWICE = 32512, // its upper byte is at most 127, rounded too
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

typedef int16_t mobe_short __attribute__((vector_size(2*MOBE_VEC))); // MOBE_VEC of them

// What is the same for experts that are formed together. n_expert, n_run (8 or 16), wide, shifts and twice are constants
// where functions take this.
struct mobe_together {
    const struct mobe_former * former;
    const struct mobe_terms  * terms;
    const struct mobe_tile   * tile;
    const int32_t            * list; // of parts, NULL for all
    int64_t                    n;    // parts
    float shift[MOBE_MANY*MOBE_RUNS] MOBE_ALIGNED; // [expert][run] sums of bytes, times unit, plus shift, are the values
    float unit[8] MOBE_ALIGNED;
};

// bytes of a part's coefficients: [expert][run][4], at least a vector
MOBE_INLINE int mobe_coef_bytes(int n_expert, int n_run) { return n_expert*n_run*4 < 64 ? 64 : n_expert*n_run*4; }

// by[e] for a vector of runs; when it has the runs of two experts, by[e + 1] for its second half
MOBE_INLINE mobe_vec mobe_two_of(const float * by, int e, int n_run, float times) {
#if MOBE_VEC == 16
    if (n_run == 8) {
        return (mobe_vec) _mm512_insertf32x8(_mm512_set1_ps(by[e]*times), _mm256_set1_ps(by[e + 1 < 8 ? e + 1 : e]*times), 1);
    }
#endif
    (void) n_run;
    return mobe_vec_set(by[e]*times);
}

// The coefficients: each times the scales of its basis, as bytes [part][expert][run][4], the lower ones (twice) behind all upper ones;
// and what does not depend on the numbers.
MOBE_INLINE void mobe_bytes_share(struct mobe_together * t, int n_expert, int n_run, bool shifts, bool twice) {
    const struct mobe_former * former = t->former;
    const int64_t   group  = t->terms[0].group;
    const float   * most   = t->tile->most  + group*former->n_pad;
    const int16_t * shift  = t->tile->shift + group*former->n_part*MOBE_RUNS*4;
    const int16_t * scale  = t->tile->scale + group*former->n_part*MOBE_RUNS*4;
    int16_t * const shares = t->tile->shares;
    int8_t  * const high   = t->tile->coefs;
    int8_t  * const low    = high + MOBE_MANY*former->n_part*MOBE_RUNS*4;
    const int64_t   bases  = (t->tile->list->n[group] + MOBE_VEC - 1)/MOBE_VEC*MOBE_VEC;
    const int       each   = mobe_coef_bytes(n_expert, n_run);

    // as fractions of the largest
    const float one = twice ? MOBE_SHARE_TWICE : MOBE_SHARE;
    mobe_vec top[MOBE_MANY];
    MOBE_UNROLL
    for (int e = 0; e < n_expert; e++) {
        top[e] = mobe_vec_set(0.0f);
    }
    for (int64_t i = 0; i < bases; i += MOBE_VEC) {
        const mobe_vec m = mobe_vec_load(most + i);
        MOBE_UNROLL
        for (int e = 0; e < n_expert; e++) {
            top[e] = mobe_vec_max(top[e], mobe_vec_abs(mobe_vec_load(t->terms[e].coef + i)*m));
        }
    }
    const mobe_eight largest = mobe_vec_most_of(top, n_expert) + 1e-30f; // not 0
    const mobe_eight to       = one/largest;
    const mobe_eight unit     = largest*(1.0f/one);
    const mobe_eight unit_sum = unit*(twice ? 32768.0f/MOBE_SCALE_TWICE : 32768.0f/MOBE_SCALE);
    float units[8] MOBE_ALIGNED;
    memcpy(units, &unit, sizeof(units));
    memcpy(t->unit, &unit_sum, sizeof(t->unit));
    for (int64_t i = 0; i < bases; i += MOBE_VEC) {
        const mobe_vec m = mobe_vec_load(most + i);
        int16_t * dst = shares + i/32*MOBE_MANY*32 + i%32;
        MOBE_UNROLL
        for (int e = 0; e < n_expert; e++) {
            const mobe_vec   scaled = mobe_vec_load(t->terms[e].coef + i)*m;
            const mobe_veci  number = (mobe_veci) mobe_vec_horner(scaled, mobe_vec_set(to[e]), 12582912.0f); // 1.5*2^23: rounds, in the low bits
            const mobe_short s      = __builtin_convertvector(number, mobe_short);
            memcpy(dst + 32*e, &s, sizeof(s));
        }
    }

    const mobe_quad zero = mobe_quad_set(0x01010101u*(uint32_t) former->zero);
    mobe_quad sums[MOBE_MANY*MOBE_RUNS/MOBE_VEC], low_sums[MOBE_MANY*MOBE_RUNS/MOBE_VEC]; // [expert][run]
    mobe_quad shifted[MOBE_MANY*MOBE_RUNS*2/MOBE_VEC]; // [expert][run][2]
    const int n_vec   = each/4/MOBE_VEC;
    const int n_shift = n_run*2/MOBE_VEC; // vectors of an expert
    MOBE_UNROLL
    for (int v = 0; v < n_vec; v++) {
        sums[v] = low_sums[v] = mobe_quad_zero();
    }
    MOBE_UNROLL
    for (int v = 0; v < n_expert*n_shift; v++) {
        shifted[v] = mobe_quad_zero();
    }
    for (int64_t i = 0; i < t->n; i++) {
        const int64_t   part     = n_expert == 1 && t->list ? t->list[i] : i;
        const int16_t * of_scale = scale + part*MOBE_RUNS*4;
        const int16_t * of_shift = shift + part*MOBE_RUNS*4;
        const int16_t * share    = shares + part/8*MOBE_MANY*32 + part%8*4;
        int8_t        * dst      = high + part*each;
        MOBE_KEEP(share);
        MOBE_UNROLL
        for (int v = 0; v < n_vec; v++) {
            const int one_run = v*MOBE_VEC, two_run = one_run + 8 < n_expert*n_run ? one_run + 8 : one_run;
            const int16_t * s[4] = { of_scale + one_run%n_run*4, share + one_run/n_run*32, of_scale + two_run%n_run*4, share + two_run/n_run*32 };
            mobe_quad l;
            const mobe_quad h = twice ? mobe_quad_coefs_twice(s[0], s[1], s[2], s[3], &l) : mobe_quad_coefs(s[0], s[1], s[2], s[3]);
            mobe_quad_store(dst + v*4*MOBE_VEC, h);
            sums[v] = mobe_quad_dot(sums[v], zero, h, false);
            if (twice) {
                mobe_quad_store(low + part*each + v*4*MOBE_VEC, l);
                low_sums[v] = mobe_quad_dot(low_sums[v], zero, l, false);
            }
        }
        if (shifts) {
            MOBE_UNROLL
            for (int e = 0; e < n_expert; e++) {
                const mobe_quad four = mobe_quad_repeat(share + 32*e);
                for (int v = 0; v < n_shift; v++) {
                    shifted[e*n_shift + v] = mobe_quad_dot_16(shifted[e*n_shift + v], mobe_quad_load(of_shift + v*2*MOBE_VEC), four);
                }
            }
        }
    }

    // of the values: shifts, less what zero is in the sums
    const int vectors = n_expert*n_shift;
    MOBE_UNROLL
    for (int v = 0; v < n_vec; v++) {
        const int e = v*MOBE_VEC/n_run; // and, where a vector has the runs of two, the next
        mobe_vec s = mobe_quad_to_float(sums[v]);
        if (twice) {
            s = mobe_vec_fma(s, mobe_vec_set(256.0f), mobe_quad_to_float(low_sums[v]));
        }
        s *= mobe_two_of(t->unit, e, n_run, -1.0f);
        if (shifts) {
            const mobe_quad of_runs = mobe_quad_add_pairs(shifted[2*v], shifted[2*v + 1 < vectors ? 2*v + 1 : 2*v]);
            s = mobe_vec_fma(mobe_quad_to_float(of_runs), mobe_two_of(units, e, n_run, 1.0f/MOBE_SHIFT), s);
        }
        mobe_vec_store(t->shift + v*MOBE_VEC, s);
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
        const struct mobe_together * t, int n_expert, int n_run, bool wide, bool twice, int64_t n_cols, float * dst, int64_t stride) {
    const int run   = MOBE_COLS/n_run;
    const int n_sum = run/MOBE_VEC;
    const int8_t * coefs = t->tile->coefs;
    const int8_t * low   = coefs + MOBE_MANY*t->former->n_part*MOBE_RUNS*4;
    const enum ggml_mobe_activation activation = t->former->activation;

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

// The constants of the functions above: as many experts as share registers, else one. Two functions for each kind of bases: in a
// single one, GCC would leave the sums in memory.
#if MOBE_VEC == 16
#define MOBE_EACH(call) switch (n_expert) { case 8: call(8) case 4: call(4) case 2: call(2) default: call(1) }
#else
#define MOBE_EACH(call) switch (n_expert) { case 2: call(2) default: call(1) }
#endif

typedef void (*mobe_share_t)(struct mobe_together * t, int n_expert);
typedef void (*mobe_row_t)(const struct mobe_together * t, int n_expert, int64_t n_cols, float * dst, int64_t stride);

struct mobe_kind {
    mobe_share_t share;
    mobe_row_t   row;
};

#define MOBE_SHARE_CALL(n) mobe_bytes_share(t, n, N_RUN, SHIFTS, TWICE); return;
#define MOBE_ROW_CALL(n)   mobe_bytes_row(t, n, N_RUN, WIDE, TWICE, n_cols, dst, stride); return;
#define MOBE_KIND(name, n_run, wide, shifts, twice) \
    static __attribute__((noinline)) void mobe_share_##name(struct mobe_together * t, int n_expert) { \
        enum { N_RUN = n_run, SHIFTS = shifts, TWICE = twice }; \
        MOBE_EACH(MOBE_SHARE_CALL) \
    } \
    static __attribute__((noinline)) void mobe_row_##name( \
            const struct mobe_together * t, int n_expert, int64_t n_cols, float * dst, int64_t stride) { \
        enum { N_RUN = n_run, WIDE = wide, TWICE = twice }; \
        MOBE_EACH(MOBE_ROW_CALL) \
    }
//                n_run wide shifts twice
MOBE_KIND(16,        16,   0,     0,    0)
MOBE_KIND(16_shifts, 16,   0,     1,    0)
MOBE_KIND(16_wide,   16,   1,     0,    0)
MOBE_KIND(32,         8,   0,     0,    0)
MOBE_KIND(32_shifts,  8,   0,     1,    0)
MOBE_KIND(32_wide,    8,   1,     0,    0)
MOBE_KIND(32_twice,   8,   1,     0,    1)

static struct mobe_kind mobe_kind_of(const struct mobe_former * former) {
#define MOBE_OF(name) (struct mobe_kind) { mobe_share_##name, mobe_row_##name }
    const bool wide = mobe_wide(former->format), shifts = mobe_shifts(former->format);
    if (mobe_run(former->format) == 16) {
        return wide ? MOBE_OF(16_wide) : shifts ? MOBE_OF(16_shifts) : MOBE_OF(16);
    }
    return former->twice ? MOBE_OF(32_twice) : wide ? MOBE_OF(32_wide) : shifts ? MOBE_OF(32_shifts) : MOBE_OF(32);
#undef MOBE_OF
}

static void mobe_bytes_combine(
        const struct mobe_former * former, const struct mobe_terms * terms, int n_expert, const struct mobe_tile * tile,
        int64_t n_cols, float * dst, int64_t stride) {
    const struct mobe_kind kind = mobe_kind_of(former);
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
        kind.share(&t, n);
        kind.row(&t, n, n_cols, dst + i*stride, stride);
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
