// The CPU kernel of ggml_mobe_proj (contract and formula: ggml-mobe.h; plain reference: ggml-mobe.c).
//
// One idea a level, from the outside in:
//   threads   each owns a run of the r rows: no two write the same number, no barrier is needed
//   rows      ROWS at a time when experts have several tokens (a prompt), else one (decoding)
//   columns   COLS at a time: the blocks of all bases in use are dequantized once, into cache, for all experts
//   experts   LANES at a time: a number of a basis, once loaded, is used for LANES combinations
//   tokens    a formed tile ROWS x COLS is multiplied by the inputs of all tokens that use its expert
// The r x d matrix of an expert never exists: only its tile does.

#include "mobe-cpu.h"
#include "ggml-mobe.h"

#include "ggml-cpu-impl.h"
#include "mobe-dequant.h"
#include "mobe-vec.h"

#include <stdlib.h>
#include <string.h>

enum {
    MOBE_COLS  = 256, // the longest quantization block, so that a tile starts at a block's start for every type
    MOBE_LANES = 8,
    MOBE_ROWS  = 4,
};

// The bases that a batch of up to MOBE_LANES experts of one group mixes, and their coefficients.
// Bases with nothing but zeros are left out: they are neither read nor added.
struct mobe_terms {
    int64_t   n;
    int32_t * basis; // [m_group] index into all m bases
    float   * coef;  // [m_group][MOBE_LANES]
};

// What a thread works with. All arrays lie in its part of params->wdata.
struct mobe_work {
    int32_t * first;   // [n + 1] where an expert's uses start in `uses`
    int32_t * uses;    // [k*T]   t*k + slot, ordered by expert
    int32_t * experts; // [n]     those in use, ascending
    int32_t * batch;   // [n + 1] where a batch starts in `experts`
    int64_t   n_batch;

    struct mobe_terms * terms; // [rows of a block, or 1 for a scalar mix][n_batch]

    bool  * needed; // [m] some expert in use mixes this basis
    float * block;  // [MOBE_ROWS][m][MOBE_COLS] of the needed bases, dequantized
    float * tile;   // [MOBE_LANES][MOBE_ROWS][MOBE_COLS]
};

static size_t mobe_align(size_t n) { return (n + 63) & ~(size_t) 63; }

// Lays the arrays out from base on, or only counts when base is NULL. Returns the bytes used.
static size_t mobe_work_layout(struct mobe_work * w, char * base, const struct ggml_mobe_shape * s) {
    const int64_t n_batch_max = s->n < s->k*s->T ? s->n : s->k*s->T; // one expert each at worst (groups cut batches)
    const int64_t n_terms     = (s->row_mix ? MOBE_ROWS : 1)*n_batch_max;

    size_t used = 0;
#define MOBE_TAKE(field, count) \
    do { if (base) { w->field = (void *) (base + used); } used += mobe_align((count)*sizeof(*w->field)); } while (0)
    MOBE_TAKE(first,   s->n + 1);
    MOBE_TAKE(uses,    s->k*s->T);
    MOBE_TAKE(experts, s->n);
    MOBE_TAKE(batch,   s->n + 1);
    MOBE_TAKE(terms,   n_terms);
    MOBE_TAKE(needed,  s->m);
    MOBE_TAKE(block,   MOBE_ROWS*s->m*MOBE_COLS);
    MOBE_TAKE(tile,    MOBE_LANES*MOBE_ROWS*MOBE_COLS);
#undef MOBE_TAKE
    for (int64_t i = 0; i < n_terms; i++) {
        if (base) {
            w->terms[i].basis = (int32_t *) (base + used);
            w->terms[i].coef  = (float *) (base + used + mobe_align(s->m_group*sizeof(int32_t)));
        }
        used += mobe_align(s->m_group*sizeof(int32_t)) + mobe_align(s->m_group*MOBE_LANES*sizeof(float));
    }
    return used;
}

static struct ggml_mobe_shape mobe_node_shape(const struct ggml_tensor * dst) {
    return ggml_mobe_proj_shape(dst->src[0], dst->src[1], dst->src[2], dst->src[3]);
}

size_t ggml_mobe_proj_cpu_work_size(const struct ggml_tensor * dst, int n_tasks) {
    const struct ggml_mobe_shape s = mobe_node_shape(dst);
    struct mobe_work w;
    return 64 + n_tasks*mobe_work_layout(&w, NULL, &s);
}

bool ggml_mobe_proj_cpu_supports(const struct ggml_tensor * dst) {
    const struct ggml_tensor * basis = dst->src[0];
    const bool readable = basis->type == GGML_TYPE_F32 || mobe_dequantizer(basis->type) != NULL;
    return readable && MOBE_COLS % ggml_blck_size(basis->type) == 0 &&
        ggml_mobe_proj_check(basis, dst->src[1], dst->src[2], dst->src[3]) == NULL &&
        dst->src[2]->nb[0] == sizeof(float) && dst->src[3]->nb[0] == sizeof(int32_t);
}

// Orders the uses by expert (a counting sort, O(n + k*T)) and cuts the experts in use into batches of one group each.
static void mobe_sort_uses(struct mobe_work * w, const struct ggml_mobe_shape * s, const struct ggml_tensor * ids) {
    const int64_t per_group = s->n / (s->m / s->m_group);

    memset(w->first, 0, (s->n + 1)*sizeof(int32_t));
    for (int64_t t = 0; t < s->T; t++) {
        const int32_t * row = (const int32_t *) ((const char *) ids->data + t*ids->nb[1]);
        for (int64_t i = 0; i < s->k; i++) {
            GGML_ASSERT(row[i] >= 0 && row[i] < s->n);
            w->first[row[i] + 1]++;
        }
    }
    int64_t n_used = 0;
    w->n_batch = 0;
    for (int64_t e = 0; e < s->n; e++) {
        if (w->first[e + 1] > 0) {
            const int64_t in_batch = w->n_batch == 0 ? 0 : n_used - w->batch[w->n_batch - 1];
            const bool    same     = in_batch > 0 && w->experts[n_used - 1]/per_group == e/per_group;
            if (!same || in_batch == MOBE_LANES) {
                w->batch[w->n_batch++] = (int32_t) n_used;
            }
            w->experts[n_used++] = (int32_t) e;
        }
        w->first[e + 1] += w->first[e];
    }
    w->batch[w->n_batch] = (int32_t) n_used;

    // first[e] is used as the place to write and so ends up as first[e + 1]; shifted back below
    for (int64_t t = 0; t < s->T; t++) {
        const int32_t * row = (const int32_t *) ((const char *) ids->data + t*ids->nb[1]);
        for (int64_t i = 0; i < s->k; i++) {
            w->uses[w->first[row[i]]++] = (int32_t) (t*s->k + i);
        }
    }
    memmove(w->first + 1, w->first, s->n*sizeof(int32_t));
    w->first[0] = 0;
}

// The terms of every batch for one row of the basis (any row when mix is scalar), and which bases they need.
static void mobe_gather_terms(
        struct mobe_work * w, struct mobe_terms * terms, const struct ggml_mobe_shape * s, const float * mix, int64_t rho) {
    const int64_t per_group = s->n / (s->m / s->m_group);
    const int64_t stride    = s->row_mix ? s->r : 1;
    const int64_t offset    = s->row_mix ? rho  : 0;

    for (int64_t b = 0; b < w->n_batch; b++) {
        const int32_t * experts = w->experts + w->batch[b];
        const int       n_lane  = w->batch[b + 1] - w->batch[b];
        const int64_t   group   = experts[0]/per_group;
        struct mobe_terms * term = &terms[b];

        term->n = 0;
        for (int64_t j = 0; j < s->m_group; j++) {
            float * coef = term->coef + term->n*MOBE_LANES;
            bool    any  = false;
            for (int lane = 0; lane < MOBE_LANES; lane++) {
                coef[lane] = lane < n_lane ? mix[(experts[lane]*s->m_group + j)*stride + offset] : 0.0f;
                any |= coef[lane] != 0.0f;
            }
            if (any) {
                const int64_t basis = group*s->m_group + j;
                term->basis[term->n++] = (int32_t) basis;
                w->needed[basis] = true;
            }
        }
    }
}

// dst[:] of one row of one basis, columns c0 .. c0 + n_cols; what lies between n_cols and the next vector is set to zero
static void mobe_dequantize(
        const struct ggml_tensor * basis, ggml_to_float_t to_float, int64_t j, int64_t rho, int64_t c0, int64_t n_cols, float * dst) {
    const char * src = (const char *) basis->data + j*basis->nb[2] + rho*basis->nb[1] + ggml_row_size(basis->type, c0);
    if (to_float) {
        to_float(src, dst, n_cols);
    } else {
        memcpy(dst, src, n_cols*sizeof(float));
    }
    for (int64_t c = n_cols; c % MOBE_VEC != 0; c++) {
        dst[c] = 0.0f;
    }
}

// tile[lane][c] = f( sum_t coef[t][lane] * block[basis[t]][c] ) for MOBE_LANES experts and one row
static void mobe_form(
        const struct mobe_terms * terms, const float * block, int64_t n_cols, enum ggml_mobe_activation activation,
        float * tile) {
    for (int64_t c = 0; c < n_cols; c += MOBE_VEC) {
        mobe_vec acc[MOBE_LANES];
        for (int lane = 0; lane < MOBE_LANES; lane++) {
            acc[lane] = mobe_vec_set(0.0f);
        }
        for (int64_t t = 0; t < terms->n; t++) {
            const mobe_vec v    = mobe_vec_load(block + (int64_t) terms->basis[t]*MOBE_COLS + c);
            const float  * coef = terms->coef + t*MOBE_LANES;
            for (int lane = 0; lane < MOBE_LANES; lane++) {
                acc[lane] += mobe_vec_set(coef[lane])*v;
            }
        }
        for (int lane = 0; lane < MOBE_LANES; lane++) {
            mobe_vec v = acc[lane];
            switch (activation) {
                case GGML_MOBE_ACTIVATION_SILU: v = mobe_vec_silu(v); break;
                case GGML_MOBE_ACTIVATION_TANH: v = mobe_vec_tanh(v); break;
                default: break;
            }
            mobe_vec_store(tile + lane*MOBE_ROWS*MOBE_COLS + c, v);
        }
    }
}

// sums[u] = tile[0 .. n_cols) . x[u][0 .. n_cols) for n_token (a constant where it is called) tokens:
// a number of the tile, once loaded, is used for all of them
static inline void mobe_dot(const float * tile, const float * const * x, int n_token, int64_t n_cols, float * sums) {
    const int64_t n_vec = n_cols - n_cols % MOBE_VEC;
    mobe_vec acc[4] = { mobe_vec_set(0.0f), mobe_vec_set(0.0f), mobe_vec_set(0.0f), mobe_vec_set(0.0f) };
    for (int64_t c = 0; c < n_vec; c += MOBE_VEC) {
        const mobe_vec v = mobe_vec_load(tile + c);
        for (int u = 0; u < n_token; u++) {
            acc[u] += v*mobe_vec_load(x[u] + c);
        }
    }
    for (int u = 0; u < n_token; u++) {
        sums[u] = mobe_vec_sum(acc[u]);
        for (int64_t c = n_vec; c < n_cols; c++) {
            sums[u] += tile[c]*x[u][c];
        }
    }
}

// z[rho + row, use] (+)= tile[row] . x[c0 .. c0 + n_cols, use] for the tokens that use one expert; "+" from the second c0 on
static void mobe_multiply(
        const struct ggml_mobe_shape * s, const struct ggml_tensor * x, struct ggml_tensor * dst,
        const int32_t * uses, int64_t n_use, const float * tile, int64_t rho, int n_rows, int64_t c0, int64_t n_cols) {
    for (int64_t u0 = 0; u0 < n_use; u0 += 4) {
        const int n_token = n_use - u0 < 4 ? (int) (n_use - u0) : 4;
        const float * xs[4];
        float       * zs[4];
        for (int u = 0; u < n_token; u++) {
            const int64_t t    = uses[u0 + u]/s->k;
            const int64_t slot = uses[u0 + u]%s->k;
            xs[u] = (const float *) ((const char *) x->data + t*x->nb[2] + (s->x_experts == 1 ? 0 : slot*x->nb[1])) + c0;
            zs[u] = (float *) dst->data + uses[u0 + u]*s->r + rho;
        }
        for (int row = 0; row < n_rows; row++) {
            float sums[4];
            if (n_token == 4) {
                mobe_dot(tile + row*MOBE_COLS, xs, 4, n_cols, sums);
            } else {
                for (int u = 0; u < n_token; u++) {
                    mobe_dot(tile + row*MOBE_COLS, xs + u, 1, n_cols, sums + u);
                }
            }
            for (int u = 0; u < n_token; u++) {
                zs[u][row] = c0 == 0 ? sums[u] : zs[u][row] + sums[u];
            }
        }
    }
}

// The reference on this node's data: what test-backend-ops compares the kernel with (ggml_backend_cpu_set_use_ref).
static void mobe_forward_ref(const struct ggml_mobe_shape * s, enum ggml_mobe_activation activation, struct ggml_tensor * dst) {
    const struct ggml_tensor * basis = dst->src[0];
    const struct ggml_tensor * x     = dst->src[2];
    const struct ggml_tensor * ids   = dst->src[3];

    const int64_t d_padded = (s->d + MOBE_VEC - 1)/MOBE_VEC*MOBE_VEC; // mobe_dequantize() fills up to a vector
    float   * b = malloc((s->m*s->r*s->d + d_padded)*sizeof(float));
    float   * a = malloc(s->T*s->x_experts*s->d*sizeof(float));
    int32_t * e = malloc(s->T*s->k*sizeof(int32_t));
    GGML_ASSERT(b && a && e);

    for (int64_t i = 0; i < s->m*s->r; i++) {
        for (int64_t c0 = 0; c0 < s->d; c0 += MOBE_COLS) {
            const int64_t n_cols = s->d - c0 < MOBE_COLS ? s->d - c0 : MOBE_COLS;
            mobe_dequantize(basis, ggml_get_type_traits(basis->type)->to_float, i/s->r, i%s->r, c0, n_cols, b + i*s->d + c0);
        }
    }
    for (int64_t t = 0; t < s->T; t++) {
        memcpy(e + t*s->k, (const char *) ids->data + t*ids->nb[1], s->k*sizeof(int32_t));
        for (int64_t i = 0; i < s->x_experts; i++) {
            memcpy(a + (t*s->x_experts + i)*s->d, (const char *) x->data + t*x->nb[2] + i*x->nb[1], s->d*sizeof(float));
        }
    }
    ggml_mobe_proj_ref(s, activation, b, (const float *) dst->src[1]->data, a, e, (float *) dst->data);

    free(b);
    free(a);
    free(e);
}

void ggml_compute_forward_mobe_proj(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * basis = dst->src[0];
    const struct ggml_tensor * x     = dst->src[2];
    const struct ggml_tensor * ids   = dst->src[3];
    const float              * mix   = (const float *) dst->src[1]->data;

    const struct ggml_mobe_shape    s          = mobe_node_shape(dst);
    const enum ggml_mobe_activation activation = (enum ggml_mobe_activation) ggml_get_op_params_i32(dst, 0);

    GGML_ASSERT(ggml_mobe_proj_cpu_supports(dst));
    GGML_ASSERT(ggml_is_contiguous(dst));

    const ggml_to_float_t to_float = mobe_dequantizer(basis->type);

    if (params->use_ref) {
        if (params->ith == 0) {
            mobe_forward_ref(&s, activation, dst);
        }
        return;
    }

    struct mobe_work w;
    {
        char * base = (char *) mobe_align((size_t) params->wdata);
        const size_t each = mobe_work_layout(&w, NULL, &s);
        GGML_ASSERT((size_t) (base - (char *) params->wdata) + params->nth*each <= params->wsize);
        mobe_work_layout(&w, base + params->ith*each, &s);
    }

    const int64_t per_thread = (s.r + params->nth - 1)/params->nth;
    const int64_t row_begin  = params->ith*per_thread;
    const int64_t row_end    = row_begin + per_thread < s.r ? row_begin + per_thread : s.r;
    if (row_begin >= row_end) {
        return;
    }

    mobe_sort_uses(&w, &s, ids);

    // several rows at a time pay when the experts in use have several tokens each
    const int n_rows_max = s.k*s.T >= 4*w.batch[w.n_batch] ? MOBE_ROWS : 1;

    if (!s.row_mix) {
        memset(w.needed, 0, s.m*sizeof(bool));
        mobe_gather_terms(&w, w.terms, &s, mix, 0);
    }

    for (int64_t rho = row_begin; rho < row_end; rho += n_rows_max) {
        const int n_rows = (int) (row_end - rho < n_rows_max ? row_end - rho : n_rows_max);

        if (s.row_mix) {
            memset(w.needed, 0, s.m*sizeof(bool));
            for (int row = 0; row < n_rows; row++) {
                mobe_gather_terms(&w, w.terms + row*w.n_batch, &s, mix, rho + row);
            }
        }

        for (int64_t c0 = 0; c0 < s.d; c0 += MOBE_COLS) {
            const int64_t n_cols = s.d - c0 < MOBE_COLS ? s.d - c0 : MOBE_COLS;

            for (int row = 0; row < n_rows; row++) {
                for (int64_t j = 0; j < s.m; j++) {
                    if (w.needed[j]) {
                        mobe_dequantize(basis, to_float, j, rho + row, c0, n_cols, w.block + (row*s.m + j)*MOBE_COLS);
                    }
                }
            }
            for (int64_t b = 0; b < w.n_batch; b++) {
                for (int row = 0; row < n_rows; row++) {
                    const struct mobe_terms * terms = &w.terms[(s.row_mix ? row*w.n_batch : 0) + b];
                    mobe_form(terms, w.block + row*s.m*MOBE_COLS, n_cols, activation, w.tile + row*MOBE_COLS);
                }
                for (int lane = 0; lane < w.batch[b + 1] - w.batch[b]; lane++) {
                    const int32_t e = w.experts[w.batch[b] + lane];
                    mobe_multiply(&s, x, dst, w.uses + w.first[e], w.first[e + 1] - w.first[e],
                        w.tile + lane*MOBE_ROWS*MOBE_COLS, rho, n_rows, c0, n_cols);
                }
            }
        }
    }
}
