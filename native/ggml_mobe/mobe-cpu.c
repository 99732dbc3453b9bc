// The CPU kernel of ggml_mobe_proj (contract and formula: ggml-mobe.h; plain reference: ggml-mobe.c).
//
// One idea a level, from the outside in:
//   threads   each owns a run of the r rows: no two write the same number
//   rows      ROWS at a time when experts have several tokens (a prompt), else one (decoding)
//   columns   MOBE_COLS: the bases in use are taken apart once for all experts (mobe-form.h)
//   experts   EXPERTS at a time: a tile of bases stays in the first-level cache, the formed rows in the second
//   tokens    formed rows are multiplied by the inputs of all tokens that use the expert (mobe-mul.h, mobe-mul-bytes.h)
// The r x d matrix of an expert never exists: only a few of its rows do.

#include "mobe-cpu.h"
#include "mobe-form.h"
#include "mobe-layout.h"
#include "mobe-mul.h"
#include "mobe-mul-bytes.h"

#include "ggml-cpu-impl.h"

#include <stdlib.h>
#include <string.h>

enum {
    MOBE_EXPERTS    = 8,
    MOBE_ROWS       = 32,
    MOBE_TILE_BYTES = 768*1024,    // of a row block in a prompt: most of a second-level cache, for fewer rows with many bases
    MOBE_PROMPT     = 4,           // tokens from which on a call may be a prompt
};

// one expert of one token: where its input and its results lie
struct mobe_use {
    const char * x;
    float      * z;
};

// What a thread works with. All arrays lie in its part of params->wdata.
struct mobe_work {
    int32_t * first;   // [n + 1] where an expert's uses start in `uses`
    struct mobe_use * uses; // [k*T] ordered by expert
    int32_t * experts; // [n]     those in use, ascending
    int64_t   n_expert;

    char  * formed; // [MOBE_EXPERTS][rows of a block][MOBE_COLS] floats, or bytes in a prompt of quantized bases:
    float * scale;  // [MOBE_EXPERTS][MOBE_COLS/32][MOBE_ROWS] of those
    float * sums;   // [k*T][MOBE_ROWS, or MOBE_VEC lanes of a row] for each use

    // decoding
    struct mobe_row row;
    // a prompt
    struct mobe_list    list;
    struct mobe_terms * terms;  // [rows of a block, or 1 when the mix is not row-wise][experts in use]
    struct mobe_tile  * tiles;  // [rows of a block]
};

// rows that are taken apart before they are combined
static int64_t mobe_block_rows(const struct mobe_former * former, bool prompt) {
    if (!prompt) {
        return 1;
    }
    const int64_t fit = MOBE_TILE_BYTES/mobe_tile_place(former, NULL, NULL);
    return fit >= MOBE_ROWS ? MOBE_ROWS : fit >= MOBE_ROWS/2 ? MOBE_ROWS/2 : fit > MOBE_MUL ? fit/MOBE_MUL*MOBE_MUL : MOBE_MUL;
}

// Lays the arrays out from base on, or only counts when base is NULL. Returns the bytes used.
static size_t mobe_work_layout(struct mobe_work * w, char * base, const struct mobe_former * former, bool prompt) {
    const struct ggml_mobe_shape * s = &former->shape;
    const int64_t rows         = mobe_block_rows(former, prompt);
    const int64_t n_expert_max = s->n < s->k*s->T ? s->n : s->k*s->T;
    const int64_t n_terms      = (s->row_mix ? rows : 1)*n_expert_max;

    size_t used = 0;
    MOBE_TAKE(base, used, w->first,   s->n + 1);
    MOBE_TAKE(base, used, w->uses,    s->k*s->T);
    MOBE_TAKE(base, used, w->experts, s->n);
    MOBE_TAKE(base, used, w->formed,  MOBE_EXPERTS*rows*MOBE_COLS*sizeof(float));
    MOBE_TAKE(base, used, w->sums,    s->k*s->T*(prompt ? MOBE_ROWS : MOBE_VEC));
    if (prompt) {
        MOBE_TAKE(base, used, w->scale, MOBE_EXPERTS*MOBE_COLS/32*MOBE_ROWS);
        MOBE_TAKE(base, used, w->terms, n_terms);
        MOBE_TAKE(base, used, w->tiles, rows);
        used += mobe_list_place(former, base ? &w->list : NULL, base ? base + used : NULL);
        for (int64_t i = 0; i < n_terms; i++) {
            used += mobe_terms_place(former, base ? &w->terms[i] : NULL, base ? base + used : NULL);
        }
        for (int64_t i = 0; i < rows; i++) {
            used += mobe_tile_place(former, base ? &w->tiles[i] : NULL, base ? base + used : NULL);
        }
    }
    return used + mobe_row_place(former, base ? &w->row : NULL, n_expert_max, base ? base + used : NULL);
}

static struct mobe_former mobe_node_former(const struct ggml_tensor * dst) {
    struct mobe_former former;
    mobe_former_init(&former, dst->src[0], dst->src[1],
        ggml_mobe_proj_shape(dst->src[0], dst->src[1], dst->src[2], dst->src[3]),
        (enum ggml_mobe_activation) ggml_get_op_params_i32(dst, 0));
    return former;
}

// inputs as bytes, for all threads
static size_t mobe_shared_bytes(const struct mobe_former * former) {
    const struct ggml_mobe_shape * s = &former->shape;
#if defined(MOBE_QUAD)
    return former->bytes && s->T >= MOBE_PROMPT ? s->T*s->x_experts*((s->d + MOBE_COLS - 1)/MOBE_COLS)*sizeof(struct mobe_packed) : 0;
#else
    GGML_UNUSED(s);
    return 0;
#endif
}

size_t ggml_mobe_proj_cpu_work_size(const struct ggml_tensor * dst, int n_tasks) {
    const struct mobe_former former = mobe_node_former(dst);
    struct mobe_work w;
    return 64 + mobe_shared_bytes(&former) + n_tasks*mobe_work_layout(&w, NULL, &former, former.shape.T >= MOBE_PROMPT);
}

bool ggml_mobe_proj_cpu_supports(const struct ggml_tensor * dst) {
    const struct ggml_tensor * basis = dst->src[0];
    return mobe_decodes(basis->type) && MOBE_COLS % ggml_blck_size(basis->type) == 0 &&
        ggml_mobe_proj_check(basis, dst->src[1], dst->src[2], dst->src[3]) == NULL &&
        dst->src[2]->nb[0] == sizeof(float) && dst->src[3]->nb[0] == sizeof(int32_t);
}

// Where inputs lie: float, or bytes in the shared part of the work memory (struct mobe_packed).
struct mobe_inputs {
    const char * data;
    size_t       token, slot; // bytes from one to the next
    size_t       tile;        // bytes from MOBE_COLS columns to the next
};

// Counts the uses of each expert: the first half of a counting sort, O(n + k*T).
static void mobe_count_uses(
        struct mobe_work * w, const struct ggml_mobe_shape * s, const struct ggml_tensor * ids) {
    memset(w->first, 0, (s->n + 1)*sizeof(int32_t));
    for (int64_t t = 0; t < s->T; t++) {
        const int32_t * row = (const int32_t *) ((const char *) ids->data + t*ids->nb[1]);
        for (int64_t i = 0; i < s->k; i++) {
            GGML_ASSERT(row[i] >= 0 && row[i] < s->n);
            w->first[row[i] + 1]++;
        }
    }
    w->n_expert = 0;
    for (int64_t e = 0; e < s->n; e++) {
        if (w->first[e + 1] > 0) {
            w->experts[w->n_expert++] = (int32_t) e;
        }
        w->first[e + 1] += w->first[e];
    }
}

// Orders the uses by expert and notes where each finds its input.
static void mobe_place_uses(
        struct mobe_work * w, const struct ggml_mobe_shape * s, const struct ggml_tensor * ids, const struct mobe_inputs * x, float * z) {
    // first[e] is used as the place to write and so ends up as first[e + 1]; shifted back below
    for (int64_t t = 0; t < s->T; t++) {
        const int32_t * row = (const int32_t *) ((const char *) ids->data + t*ids->nb[1]);
        for (int64_t i = 0; i < s->k; i++) {
            w->uses[w->first[row[i]]++] = (struct mobe_use) { x->data + t*x->token + i*x->slot, z + (t*s->k + i)*s->r };
        }
    }
    memmove(w->first + 1, w->first, s->n*sizeof(int32_t));
    w->first[0] = 0;
}

// sums[u*MOBE_ROWS + row] += rows[row] . x[u] over n_cols columns, which begin `at` bytes into the inputs, for the uses of one expert
static void mobe_multiply(
        const struct mobe_use * uses, int64_t n_use, size_t at, const float * rows, int64_t n_rows, int64_t n_cols, float * sums) {
    for (int64_t u0 = 0; u0 < n_use; u0 += MOBE_INPUTS) {
        const int n_x = n_use - u0 < MOBE_INPUTS ? (int) (n_use - u0) : (int) MOBE_INPUTS;
        const float * xs[MOBE_INPUTS];
        float       * zs[MOBE_INPUTS];
        for (int u = 0; u < n_x; u++) {
            xs[u] = (const float *) (uses[u0 + u].x + at);
            zs[u] = sums + (u0 + u)*MOBE_ROWS;
        }
        for (int64_t u = u0 + MOBE_INPUTS; u < u0 + 2*MOBE_INPUTS && u < n_use; u++) {
            mobe_prefetch(uses[u].x + at, n_cols*sizeof(float), false); // they lie anywhere
        }
        mobe_mul(rows, (int) n_rows, xs, n_x, n_cols, zs);
    }
}

#if defined(MOBE_QUAD)
// The same for bytes. What is written behind the last row's sums, up to the next multiple of MOBE_PANEL, means nothing.
static void mobe_multiply_bytes(
        const struct mobe_use * uses, int64_t n_use, size_t at, const int8_t * rows, const float * scale, int64_t n_rows, int64_t n_cols,
        float * sums) {
    _Static_assert((int) MOBE_ROWS % (int) MOBE_PANEL == 0, "room");
    char turned[MOBE_PANEL*MOBE_COLS] MOBE_ALIGNED;
    for (int64_t row = 0; row < n_rows; row += MOBE_PANEL) {
        mobe_turn(rows + row*MOBE_COLS, (int) (n_rows - row), n_cols, turned);
        for (int64_t u0 = 0; u0 < n_use; u0 += MOBE_SHARED) {
            const int n_x = n_use - u0 < MOBE_SHARED ? (int) (n_use - u0) : (int) MOBE_SHARED;
            const struct mobe_packed * xs[MOBE_SHARED];
            float * zs[MOBE_SHARED];
            for (int u = 0; u < n_x; u++) {
                xs[u] = (const struct mobe_packed *) (uses[u0 + u].x + at);
                zs[u] = sums + (u0 + u)*MOBE_ROWS + row;
            }
            for (int64_t u = u0 + MOBE_SHARED; u < u0 + 2*MOBE_SHARED && u < n_use; u++) {
                mobe_prefetch(uses[u].x + at, sizeof(struct mobe_packed), false); // they lie anywhere
            }
            mobe_mul_bytes(turned, (int) (n_rows - row), scale + row, MOBE_ROWS, xs, n_x, n_cols, zs);
        }
    }
}
#endif

// Few tokens: one row at a time, each formed for the tokens that use it.
static void mobe_decode_rows(
        const struct mobe_former * former, struct mobe_work * w, int64_t row_begin, int64_t row_end) {
    const struct ggml_mobe_shape * s = &former->shape;
    float * formed = (float *) w->formed;

    for (int64_t rho = row_begin; rho < row_end; rho++) {
        if (s->row_mix || rho == row_begin) {
            mobe_mix_gather(former, &w->row.list, w->row.terms, w->experts, NULL, w->n_expert, rho, 1);
        }
        memset(w->sums, 0, s->k*s->T*MOBE_VEC*sizeof(float));
        for (int64_t c0 = 0; c0 < s->d; c0 += MOBE_COLS) {
            const int64_t n_cols = s->d - c0 < MOBE_COLS ? s->d - c0 : MOBE_COLS;
            mobe_tile_decode(former, &w->row.tile, &w->row.list, rho, c0, n_cols);
            for (int64_t e0 = 0; e0 < w->n_expert; e0 += MOBE_EXPERTS) {
                const int64_t n_expert = w->n_expert - e0 < MOBE_EXPERTS ? w->n_expert - e0 : MOBE_EXPERTS;
                mobe_tile_combine(former, w->row.terms + e0, (int) n_expert, &w->row.tile, n_cols, formed, MOBE_COLS);
                for (int64_t e = 0; e < n_expert; e++) {
                    const int32_t expert = w->experts[e0 + e];
                    for (int32_t u = w->first[expert]; u < w->first[expert + 1]; u++) {
                        mobe_dot_add(formed + e*MOBE_COLS, (const float *) w->uses[u].x + c0, n_cols, w->sums + u*MOBE_VEC);
                    }
                }
            }
        }
        for (int64_t u = 0; u < s->k*s->T; u++) {
            w->uses[u].z[rho] = mobe_vec_sum(mobe_vec_load(w->sums + u*MOBE_VEC));
        }
    }
}

#if defined(MOBE_QUAD)
// rounds a row of a few experts for the product: values [n_expert][MOBE_COLS], of which n_cols count
static void mobe_prompt_encode(
        const struct mobe_work * w, float * values, int64_t n_expert, int64_t n_cols, int64_t row, int64_t rows) {
    int8_t   * bytes[MOBE_EXPERTS];
    mobe_eight scale[MOBE_EXPERTS];
    for (int64_t e = 0; e < n_expert; e++) {
        bytes[e] = (int8_t *) w->formed + (e*rows + row)*MOBE_COLS;
    }
    mobe_bytes_encode(values, (int) n_expert, n_cols, MOBE_WIDE_BIAS, bytes, scale);
    for (int64_t e = 0; e < n_expert; e++) {
        for (int b = 0; b < MOBE_COLS/32; b++) {
            w->scale[(e*(MOBE_COLS/32) + b)*MOBE_ROWS + row] = scale[e][b];
        }
    }
}
#endif

// Many tokens: blocks of rows, each formed for all experts in use.
static void mobe_prompt_rows(
        const struct mobe_former * former, struct mobe_work * w, const struct mobe_inputs * inputs, int64_t row_begin, int64_t row_end) {
    const struct ggml_mobe_shape * s = &former->shape;
    const int64_t rows = mobe_block_rows(former, true);

    for (int64_t rho = row_begin; rho < row_end; rho += rows) {
        const int64_t n_rows = row_end - rho < rows ? row_end - rho : rows;

        if (s->row_mix || rho == row_begin) {
            mobe_mix_gather(former, &w->list, w->terms, w->experts, NULL, w->n_expert, rho, s->row_mix ? n_rows : 1);
        }
        memset(w->sums, 0, s->k*s->T*MOBE_ROWS*sizeof(float));
        for (int64_t c0 = 0; c0 < s->d; c0 += MOBE_COLS) {
            const int64_t n_cols = s->d - c0 < MOBE_COLS ? s->d - c0 : MOBE_COLS;

            for (int64_t row = 0; row < n_rows; row++) {
                mobe_tile_decode(former, &w->tiles[row], &w->list, rho + row, c0, n_cols);
            }
            for (int64_t e0 = 0; e0 < w->n_expert; e0 += MOBE_EXPERTS) {
                const int64_t n_expert = w->n_expert - e0 < MOBE_EXPERTS ? w->n_expert - e0 : MOBE_EXPERTS;

                for (int64_t row = 0; row < n_rows; row++) {
                    const struct mobe_terms * terms = w->terms + (s->row_mix ? row*w->n_expert : 0) + e0;
#if defined(MOBE_QUAD)
                    if (former->bytes) {
                        float values[MOBE_EXPERTS*MOBE_COLS] MOBE_ALIGNED;
                        mobe_tile_combine(former, terms, (int) n_expert, &w->tiles[row], n_cols, values, MOBE_COLS);
                        mobe_prompt_encode(w, values, n_expert, n_cols, row, rows);
                        continue;
                    }
#endif
                    mobe_tile_combine(former, terms, (int) n_expert, &w->tiles[row], n_cols, (float *) w->formed + row*MOBE_COLS, rows*MOBE_COLS);
                }
                for (int64_t e = 0; e < n_expert; e++) {
                    const int64_t first = w->first[w->experts[e0 + e]];
                    const int64_t n_use = w->first[w->experts[e0 + e] + 1] - first;
                    const size_t  at    = c0/MOBE_COLS*inputs->tile;
#if defined(MOBE_QUAD)
                    if (former->bytes) {
                        mobe_multiply_bytes(w->uses + first, n_use, at, (const int8_t *) w->formed + e*rows*MOBE_COLS,
                            w->scale + e*(MOBE_COLS/32)*MOBE_ROWS, n_rows, n_cols, w->sums + first*MOBE_ROWS);
                        continue;
                    }
#endif
                    mobe_multiply(w->uses + first, n_use, at, (const float *) w->formed + e*rows*MOBE_COLS, n_rows, n_cols, w->sums + first*MOBE_ROWS);
                }
            }
        }
        for (int64_t u = 0; u < s->k*s->T; u++) {
            memcpy(w->uses[u].z + rho, w->sums + u*MOBE_ROWS, n_rows*sizeof(float));
        }
    }
}

// The reference on this node's data: what test-backend-ops compares the kernel with (ggml_backend_cpu_set_use_ref).
static void mobe_forward_ref(const struct mobe_former * former, struct ggml_tensor * dst) {
    const struct ggml_mobe_shape * s = &former->shape;
    const struct ggml_tensor * basis = dst->src[0];
    const struct ggml_tensor * x     = dst->src[2];
    const struct ggml_tensor * ids   = dst->src[3];

    float   * b = malloc(s->m*s->r*s->d*sizeof(float));
    float   * a = malloc(s->T*s->x_experts*s->d*sizeof(float));
    int32_t * e = malloc(s->T*s->k*sizeof(int32_t));
    GGML_ASSERT(b && a && e);

    const ggml_to_float_t to_float = ggml_get_type_traits(basis->type)->to_float;
    for (int64_t i = 0; i < s->m*s->r; i++) {
        const char * row = (const char *) basis->data + i/s->r*basis->nb[2] + i%s->r*basis->nb[1];
        if (to_float) {
            to_float(row, b + i*s->d, s->d);
        } else {
            memcpy(b + i*s->d, row, s->d*sizeof(float));
        }
    }
    for (int64_t t = 0; t < s->T; t++) {
        memcpy(e + t*s->k, (const char *) ids->data + t*ids->nb[1], s->k*sizeof(int32_t));
        for (int64_t i = 0; i < s->x_experts; i++) {
            memcpy(a + (t*s->x_experts + i)*s->d, (const char *) x->data + t*x->nb[2] + i*x->nb[1], s->d*sizeof(float));
        }
    }
    ggml_mobe_proj_ref(s, former->activation, b, former->mix, a, e, (float *) dst->data);

    free(b);
    free(a);
    free(e);
}

void ggml_compute_forward_mobe_proj(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * x   = dst->src[2];
    const struct ggml_tensor * ids = dst->src[3];

    GGML_ASSERT(ggml_mobe_proj_cpu_supports(dst));
    GGML_ASSERT(ggml_is_contiguous(dst));

    const struct mobe_former former = mobe_node_former(dst);
    const struct ggml_mobe_shape s  = former.shape;

    if (params->use_ref) {
        if (params->ith == 0) {
            mobe_forward_ref(&former, dst);
        }
        return;
    }

    bool prompt = s.T >= MOBE_PROMPT;
    struct mobe_work w = { 0 };
    char * const shared = (char *) mobe_align((size_t) params->wdata);
    {
        const size_t n_shared = mobe_shared_bytes(&former);
        const size_t each     = mobe_work_layout(&w, NULL, &former, prompt);
        GGML_ASSERT((size_t) (shared - (char *) params->wdata) + n_shared + params->nth*each <= params->wsize);
        mobe_work_layout(&w, shared + n_shared + params->ith*each, &former, prompt);
    }

    mobe_count_uses(&w, &s, ids);

    prompt = prompt && 2*s.k*s.T >= 3*w.n_expert; // with fewer uses of each, rounding rows to bytes takes longer than it saves
    struct mobe_inputs inputs = { (const char *) x->data, x->nb[2], s.x_experts == 1 ? 0 : x->nb[1], MOBE_COLS*sizeof(float) };
#if defined(MOBE_QUAD)
    if (prompt && former.bytes) {
        const size_t  each = sizeof(struct mobe_packed);
        const int64_t n    = s.T*s.x_experts;
        for (int64_t i = params->ith; i < n; i += params->nth) {
            const char * src = (const char *) x->data + i/s.x_experts*x->nb[2] + i%s.x_experts*x->nb[1];
            for (int64_t c = 0; c < s.d; c += MOBE_COLS) {
                const int64_t n_cols = s.d - c < MOBE_COLS ? s.d - c : MOBE_COLS; // a multiple of 32: bytes
                mobe_packed_encode((const float *) src + c, n_cols, (struct mobe_packed *) shared + c/MOBE_COLS*n + i);
            }
        }
        ggml_barrier(params->threadpool);
        inputs = (struct mobe_inputs) { shared, s.x_experts*each, s.x_experts == 1 ? 0 : each, n*each };
    }
#endif

    mobe_place_uses(&w, &s, ids, &inputs, (float *) dst->data);

    // whole groups of MOBE_MUL rows, so that a thread's last rows are not multiplied one by one
    const int64_t per_thread = ((s.r + params->nth - 1)/params->nth + MOBE_MUL - 1)/MOBE_MUL*MOBE_MUL;
    const int64_t row_begin  = params->ith*per_thread;
    const int64_t row_end    = row_begin + per_thread < s.r ? row_begin + per_thread : s.r;

    if (prompt) {
        mobe_prompt_rows(&former, &w, &inputs, row_begin, row_end);
    } else {
        mobe_decode_rows(&former, &w, row_begin, row_end);
    }
}
