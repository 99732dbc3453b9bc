#include "mobe-form.h"
#include "mobe-pair-decode.h"
#include "mobe-pair.h"

#include "ggml-impl.h"

#include <string.h>

enum {
    MOBE_SHARE = 32760, // units of an expert's coefficients, all together
    MOBE_PARTS = 1024,  // pairs of a group at most: beyond, floats are summed
#if defined(__AVX512F__) || (defined(__ARM_NEON) && defined(__aarch64__))
    MOBE_SUMS  = 16,    // vectors summed at a time: half of the registers
#else
    MOBE_SUMS  = 8,
#endif
};

static size_t mobe_align(size_t n) { return (n + 63) & ~(size_t) 63; }

void mobe_former_init(
        struct mobe_former * former, const struct ggml_tensor * basis, const struct ggml_tensor * mix,
        struct ggml_mobe_shape shape, enum ggml_mobe_activation activation) {
    former->basis      = basis;
    former->mix        = (const float *) mix->data;
    former->shape      = shape;
    former->activation = activation;
#if defined(MOBE_PAIR)
    former->ints = ggml_is_quantized(basis->type) && shape.m_group <= 2*MOBE_PARTS;
#else
    former->ints = false;
#endif
    former->n_part = former->ints ? (shape.m_group + 1)/2 : shape.m_group;
    former->n_pad  = (former->n_part + 15)/16*16;
}

size_t mobe_terms_place(const struct mobe_former * former, struct mobe_terms * terms, char * memory) {
    const size_t part = mobe_align(former->n_part*sizeof(int32_t));
    const size_t coef = former->n_pad*sizeof(float);
    if (memory) {
        terms->part = (int32_t *) memory;
        terms->even = (float *) (memory + part);
        terms->odd  = (float *) (memory + part + coef);
    }
    return part + 2*coef;
}

size_t mobe_tile_place(const struct mobe_former * former, struct mobe_tile * tile, char * memory) {
    const int64_t n_group = former->shape.m/former->shape.m_group;
    const size_t  data    = n_group*former->n_part*MOBE_COLS*sizeof(int32_t);
    const size_t  unit    = n_group*former->n_pad*sizeof(float);
    if (memory) {
        tile->data = (int32_t *) memory;
        tile->even = (float *) (memory + data);
        tile->odd  = (float *) (memory + data + unit);
        memset(tile->even, 0, 2*unit);
    }
    return data + 2*unit;
}

void mobe_terms_gather(
        const struct mobe_former * former, struct mobe_terms * terms, int64_t expert, int64_t rho, bool * needed) {
    const struct ggml_mobe_shape * s = &former->shape;
    const int64_t stride = s->row_mix ? s->r : 1;
    const float * mix    = former->mix + expert*s->m_group*stride + (s->row_mix ? rho : 0);
    const int     each   = former->ints ? 2 : 1;

    terms->group = expert/(s->n/(s->m/s->m_group));
    terms->n     = 0;
    memset(terms->even, 0, former->n_pad*sizeof(float));
    memset(terms->odd,  0, former->n_pad*sizeof(float));
    for (int64_t j = 0; j < s->m_group; j++) {
        const float a = mix[j*stride];
        if (a == 0.0f) {
            continue;
        }
        const int64_t part = j/each;
        (j%each == 0 ? terms->even : terms->odd)[part] = a;
        if (terms->n == 0 || terms->part[terms->n - 1] != part) {
            terms->part[terms->n++] = (int32_t) part;
        }
        needed[terms->group*s->m_group + j] = true;
    }
}

// What one expert brings along for a tile: coefficients of all parts (pairs of integers, or floats), and what to multiply sums by.
struct mobe_share {
    const void * coefs;
    float        unit;
    float      * dst;
};

// n_sum vectors for each of n_expert (1 or 2) experts. list is NULL for all parts. The same formula for integers and floats;
// n_sum, n_expert, ints and activation are constants where this is called.
MOBE_INLINE void mobe_combine_columns(
        const struct mobe_share * shares, int n_expert, const int32_t * list, int64_t n, const int32_t * data, int64_t c, int n_sum,
        bool ints, enum ggml_mobe_activation activation) {
    mobe_vec values[MOBE_SUMS];
#if defined(MOBE_PAIR)
    if (ints) {
        mobe_pair sums[MOBE_SUMS];
        for (int v = 0; v < n_expert*n_sum; v++) {
            sums[v] = mobe_pair_zero();
        }
        for (int64_t i = 0; i < n; i++) {
            const int64_t   part = list ? list[i] : i;
            const int32_t * src  = data + part*MOBE_COLS + c;
            MOBE_KEEP(src);
            mobe_pair coef[2];
            for (int e = 0; e < n_expert; e++) {
                coef[e] = mobe_pair_set(((const int32_t *) shares[e].coefs)[part]);
            }
            for (int v = 0; v < n_sum; v++) {
                const mobe_pair b = mobe_pair_load(src + v*MOBE_VEC);
                for (int e = 0; e < n_expert; e++) {
                    sums[e*n_sum + v] = mobe_pair_dot(sums[e*n_sum + v], b, coef[e]);
                    MOBE_PIN(sums[e*n_sum + v]);
                }
            }
        }
        for (int e = 0; e < n_expert; e++) {
            const float unit = shares[e].unit;
            MOBE_UNROLL
            for (int v = 0; v < n_sum; v++) {
                values[e*n_sum + v] = mobe_pair_to_float(sums[e*n_sum + v])*unit;
            }
        }
    } else
#endif
    {
        mobe_vec sums[MOBE_SUMS]; // apart from values, or GCC leaves them in memory
        MOBE_UNROLL
        for (int v = 0; v < n_expert*n_sum; v++) {
            sums[v] = mobe_vec_set(0.0f);
        }
        for (int64_t i = 0; i < n; i++) {
            const int64_t part = list ? list[i] : i;
            const float * src  = (const float *) data + part*MOBE_COLS + c;
            MOBE_KEEP(src);
            mobe_vec coef[2];
            for (int e = 0; e < n_expert; e++) {
                coef[e] = mobe_vec_set(((const float *) shares[e].coefs)[part]);
            }
            MOBE_UNROLL
            for (int v = 0; v < n_sum; v++) {
                const mobe_vec b = mobe_vec_load(src + v*MOBE_VEC);
                for (int e = 0; e < n_expert; e++) {
                    sums[e*n_sum + v] += coef[e]*b;
                    MOBE_PIN(sums[e*n_sum + v]);
                }
            }
        }
        MOBE_UNROLL
        for (int v = 0; v < n_expert*n_sum; v++) {
            values[v] = sums[v];
        }
    }
    for (int e = 0; e < n_expert; e++) {
        float * dst = shares[e].dst + c;
        MOBE_UNROLL
        for (int v = 0; v < n_sum; v++) {
            mobe_vec f = values[e*n_sum + v];
            switch (activation) {
                case GGML_MOBE_ACTIVATION_SILU: f = ints ? mobe_vec_silu_quick(f) : mobe_vec_silu(f); break;
                case GGML_MOBE_ACTIVATION_TANH: f = ints ? mobe_vec_tanh_quick(f) : mobe_vec_tanh(f); break;
                default: break;
            }
            mobe_vec_store(dst + v*MOBE_VEC, f);
        }
    }
}

MOBE_INLINE void mobe_combine_row(
        const struct mobe_share * shares, int n_expert, const int32_t * list, int64_t n, const int32_t * data, int64_t n_cols,
        bool ints, enum ggml_mobe_activation activation) {
    int64_t c = 0;
    for (; c + MOBE_SUMS/n_expert*MOBE_VEC <= n_cols; c += MOBE_SUMS/n_expert*MOBE_VEC) {
        mobe_combine_columns(shares, n_expert, list, n, data, c, MOBE_SUMS/n_expert, ints, activation);
    }
    for (; c + 4*MOBE_VEC <= n_cols; c += 4*MOBE_VEC) {
        mobe_combine_columns(shares, n_expert, list, n, data, c, 4, ints, activation);
    }
    for (; c < n_cols; c += MOBE_VEC) {
        mobe_combine_columns(shares, n_expert, list, n, data, c, 1, ints, activation);
    }
}

// shares of two experts that mix all parts, or of one that mixes those listed
typedef void (*mobe_combine_t)(
        const struct mobe_share * shares, bool two, const int32_t * list, int64_t n, const int32_t * data, int64_t n_cols);

#define MOBE_COMBINE(name, ints, activation) \
    static void name( \
            const struct mobe_share * shares, bool two, const int32_t * list, int64_t n, const int32_t * data, int64_t n_cols) { \
        if (two) { \
            mobe_combine_row(shares, 2, NULL, n, data, n_cols, ints, activation); \
        } else { \
            mobe_combine_row(shares, 1, list, n, data, n_cols, ints, activation); \
        } \
    }
MOBE_COMBINE(mobe_combine_float_none, false, GGML_MOBE_ACTIVATION_NONE)
MOBE_COMBINE(mobe_combine_float_silu, false, GGML_MOBE_ACTIVATION_SILU)
MOBE_COMBINE(mobe_combine_float_tanh, false, GGML_MOBE_ACTIVATION_TANH)
#if defined(MOBE_PAIR)
MOBE_COMBINE(mobe_combine_int_none, true, GGML_MOBE_ACTIVATION_NONE)
MOBE_COMBINE(mobe_combine_int_silu, true, GGML_MOBE_ACTIVATION_SILU)
MOBE_COMBINE(mobe_combine_int_tanh, true, GGML_MOBE_ACTIVATION_TANH)
#endif

static const mobe_combine_t mobe_combine_of[2][GGML_MOBE_ACTIVATION_COUNT] = {
    { mobe_combine_float_none, mobe_combine_float_silu, mobe_combine_float_tanh },
#if defined(MOBE_PAIR)
    { mobe_combine_int_none, mobe_combine_int_silu, mobe_combine_int_tanh },
#endif
};

// What is taken apart next follows in memory: the next stretch, or the next row; it is fetched ahead. There are more streams than
// a processor watches by itself.
void mobe_tile_decode(
        const struct mobe_former * former, struct mobe_tile * tile, const bool * needed, int64_t rho, int64_t c0, int64_t n_cols) {
    const struct ggml_tensor     * basis = former->basis;
    const struct ggml_mobe_shape * s     = &former->shape;
    const char * row = (const char *) basis->data + rho*basis->nb[1] + ggml_row_size(basis->type, c0);
    const size_t all = ggml_row_size(basis->type, MOBE_COLS);
#if defined(MOBE_PAIR)
    const struct mobe_format * format = mobe_format_of(basis->type);
#endif

    for (int64_t g = 0; g < s->m/s->m_group; g++) {
        for (int64_t part = 0; part < former->n_part; part++) {
            int32_t * dst = tile->data + (g*former->n_part + part)*MOBE_COLS;
            if (!former->ints) {
                const int64_t j = g*s->m_group + part;
                if (needed[j]) {
                    mobe_prefetch(row + j*basis->nb[2] + all, all);
                    mobe_decode(basis->type, row + j*basis->nb[2], (float *) dst, (int) n_cols);
                    for (int64_t c = n_cols; c % MOBE_VEC != 0; c++) {
                        ((float *) dst)[c] = 0.0f;
                    }
                }
                continue;
            }
#if defined(MOBE_PAIR)
            const int64_t even     = g*s->m_group + 2*part;
            const bool    has_even = needed[even];
            const bool    has_odd  = 2*part + 1 < s->m_group && needed[even + 1];
            if (has_even || has_odd) {
                mobe_prefetch(row + even*basis->nb[2] + all, all);
                if (has_odd) {
                    mobe_prefetch(row + (even + 1)*basis->nb[2] + all, all);
                }
                mobe_pair_decode(basis->type, format,
                    has_even ? row + even*basis->nb[2] : NULL, has_odd ? row + (even + 1)*basis->nb[2] : NULL, (int) n_cols,
                    dst, &tile->even[g*former->n_pad + part], &tile->odd[g*former->n_pad + part]);
            }
#endif
        }
    }
}

#if defined(MOBE_PAIR)
// The coefficients as integers: each times the unit of its basis in this tile, in units of their absolute sum, which is returned.
static float mobe_coefs(const struct mobe_former * former, const struct mobe_terms * terms, const struct mobe_tile * tile, int32_t * coefs) {
    const float * even = tile->even + terms->group*former->n_pad;
    const float * odd  = tile->odd  + terms->group*former->n_pad;
    mobe_vec total = mobe_vec_set(0.0f);
    for (int64_t i = 0; i < former->n_pad; i += MOBE_VEC) {
        total += mobe_vec_abs(mobe_vec_load(terms->even + i)*mobe_vec_load(even + i));
        total += mobe_vec_abs(mobe_vec_load(terms->odd + i)*mobe_vec_load(odd + i));
    }
    const float sum = mobe_vec_sum(total);
    const float to  = sum > 0.0f ? MOBE_SHARE/sum : 0.0f;
    for (int64_t i = 0; i < former->n_pad; i += MOBE_VEC) {
        const mobe_vecu e = mobe_vec_round(mobe_vec_load(terms->even + i)*mobe_vec_load(even + i)*to);
        const mobe_vecu o = mobe_vec_round(mobe_vec_load(terms->odd + i)*mobe_vec_load(odd + i)*to);
        const mobe_vecu both = (e & 0xffff) | (o << 16);
        memcpy(coefs + i, &both, sizeof(both));
    }
    return sum*(1.0f/MOBE_SHARE);
}
#endif

void mobe_tile_combine(
        const struct mobe_former * former, const struct mobe_terms * terms, int n_expert, const struct mobe_tile * tile,
        int64_t n_cols, float * dst, int64_t stride) {
    const mobe_combine_t combine = mobe_combine_of[former->ints][former->activation];
    for (int i = 0; i < n_expert;) {
        // two that mix everything share the loads
        const bool two = i + 1 < n_expert && terms[i].n == former->n_part && terms[i + 1].n == former->n_part &&
            terms[i].group == terms[i + 1].group;
        struct mobe_share shares[2];
#if defined(MOBE_PAIR)
        int32_t coefs[2][MOBE_PARTS] MOBE_ALIGNED;
#endif
        for (int e = 0; e < 1 + two; e++) {
            shares[e] = (struct mobe_share) { terms[i + e].even, 1.0f, dst + (i + e)*stride };
#if defined(MOBE_PAIR)
            if (former->ints) {
                shares[e].unit  = mobe_coefs(former, &terms[i + e], tile, coefs[e]);
                shares[e].coefs = coefs[e];
            }
#endif
        }
        combine(shares, two, terms[i].part, terms[i].n, tile->data + terms[i].group*former->n_part*MOBE_COLS, n_cols);
        i += 1 + two;
    }
}
