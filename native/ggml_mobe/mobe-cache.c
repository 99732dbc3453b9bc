#include "mobe-cache.h"
#include "mobe-form.h"
#include "mobe-kept.h"
#include "mobe-layout.h"
#include "mobe-vec.h"

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <string.h>

enum { MOBE_TOGETHER = 8 }; // experts that are formed in one call

// What all threads share, and what each has of its own. All arrays lie in params->wdata.
struct mobe_cache_work {
    int32_t * experts; // [k*T]  those in use, each once
    int32_t * index;   // [n]    place of an expert in `experts`
    int64_t * at;      // [k*T]  its slot, or -1: it is not kept
    int32_t * found;   // [k*T]  places in `experts` of those whose slots have them
    int32_t * missed;  // [k*T]  of those to be formed
    int64_t * n;       // [2]    lengths of `found` and of `missed`
    int32_t * first;   // [k*T + 1] where the uses of an expert begin in `uses`, by its place
    int32_t * uses;    // [k*T]  token*k + slot of the token
    char    * x;       // [T*x_experts] inputs as the product takes them

    struct mobe_row row;  // of missed experts
    char          * rows; // [k*T] one row of each missed expert that is not kept
};

static int64_t mobe_most(const struct ggml_mobe_shape * s) { return s->k*s->T < s->n ? s->k*s->T : s->n; }

static struct mobe_cache mobe_cache_of(const struct ggml_tensor * dst, const struct ggml_mobe_shape * s) {
    struct mobe_cache cache;
    mobe_cache_layout(&cache, s, ggml_mobe_cache_slots(s, ggml_nbytes(dst->src[4])), dst->src[4]->data);
    return cache;
}

static struct mobe_former mobe_cache_former(const struct ggml_tensor * dst) {
    struct mobe_former former;
    mobe_former_init(&former, dst->src[0], dst->src[1],
        ggml_mobe_proj_shape(dst->src[0], dst->src[1], dst->src[2], dst->src[3]),
        (enum ggml_mobe_activation) ggml_get_op_params_i32(dst, 0));
    return former;
}

// rows in the form of mobe-kept.h, else in ggml's types; both take the same room
static bool mobe_cache_own_rows(int64_t d) {
#if defined(MOBE_QUAD)
    return mobe_kept_takes(d);
#else
    GGML_UNUSED(d);
    return false;
#endif
}

static size_t mobe_input_bytes(const struct ggml_mobe_shape * s) {
#if defined(MOBE_QUAD)
    if (mobe_cache_own_rows(s->d)) {
        return mobe_align(mobe_kept_input_bytes(s->d));
    }
#endif
    const enum ggml_type type = ggml_get_type_traits_cpu(ggml_mobe_cache_type(s->d))->vec_dot_type;
    return mobe_align(ggml_row_size(type, s->d));
}

// Each lays its arrays out from base on, or only counts when base is NULL. Returns the bytes used.
static size_t mobe_cache_shared(struct mobe_cache_work * w, char * base, const struct ggml_mobe_shape * s) {
    size_t used = 0;
    MOBE_TAKE(base, used, w->experts, mobe_most(s));
    MOBE_TAKE(base, used, w->index,   s->n);
    MOBE_TAKE(base, used, w->at,      mobe_most(s));
    MOBE_TAKE(base, used, w->found,   mobe_most(s));
    MOBE_TAKE(base, used, w->missed,  mobe_most(s));
    MOBE_TAKE(base, used, w->n,       2);
    MOBE_TAKE(base, used, w->first,   mobe_most(s) + 2);
    MOBE_TAKE(base, used, w->uses,    s->k*s->T);
    MOBE_TAKE(base, used, w->x,       s->T*s->x_experts*mobe_input_bytes(s));
    return used;
}

static size_t mobe_cache_own(struct mobe_cache_work * w, char * base, const struct mobe_former * former) {
    const struct ggml_mobe_shape * s = &former->shape;
    size_t used = 0;
    MOBE_TAKE(base, used, w->rows, mobe_most(s)*mobe_align(ggml_row_size(ggml_mobe_cache_type(s->d), s->d)));
    return used + mobe_row_place(former, base ? &w->row : NULL, mobe_most(s), base ? base + used : NULL);
}

bool mobe_cache_takes(const struct ggml_tensor * dst) {
    return dst->src[4] != NULL && dst->ne[2] <= GGML_MOBE_CACHE_TOKENS;
}

size_t mobe_cache_work_size(const struct ggml_tensor * dst, int n_tasks) {
    const struct mobe_former former = mobe_cache_former(dst);
    struct mobe_cache_work w;
    return 64 + mobe_cache_shared(&w, NULL, &former.shape) + n_tasks*mobe_cache_own(&w, NULL, &former);
}

// Finds the experts in use, and a slot for each that has none. O(k*T*n_slot) at worst, when all miss.
static void mobe_cache_look_up(
        const struct mobe_cache * cache, const struct ggml_mobe_shape * s, const struct ggml_tensor * ids, struct mobe_cache_work * w) {
    uint64_t * clock = &cache->head->clock;
    const uint64_t before = *clock; // a slot with a later time is in use by this call
    int64_t n = 0;
    int64_t n_found = 0, n_missed = 0;

    memset(w->first, 0, (mobe_most(s) + 2)*sizeof(int32_t));
    memset(w->index, 0xff, s->n*sizeof(int32_t));
    for (int64_t t = 0; t < s->T; t++) {
        const int32_t * row = (const int32_t *) ((const char *) ids->data + t*ids->nb[1]);
        for (int64_t i = 0; i < s->k; i++) {
            const int32_t e = row[i];
            GGML_ASSERT(e >= 0 && e < s->n);
            if (w->index[e] >= 0) {
                w->first[w->index[e] + 2]++;
                continue;
            }
            w->first[n + 2] = 1;
            w->index[e]   = (int32_t) n;
            w->experts[n] = e;
            w->at[n]      = (int64_t) cache->slot[e] - 1;
            if (w->at[n] >= 0) {
                cache->used[w->at[n]] = ++*clock;
                w->found[n_found++]   = (int32_t) n;
            } else {
                w->missed[n_missed++] = (int32_t) n;
            }
            n++;
        }
    }
    // uses by place, a counting sort: first[place + 1] is where the next one goes and ends as where the place's end
    for (int64_t i = 1; i < n; i++) {
        w->first[i + 1] += w->first[i];
    }
    for (int64_t t = 0; t < s->T; t++) {
        const int32_t * row = (const int32_t *) ((const char *) ids->data + t*ids->nb[1]);
        for (int64_t i = 0; i < s->k; i++) {
            w->uses[w->first[w->index[row[i]] + 1]++] = (int32_t) (t*s->k + i);
        }
    }
    for (int64_t i = 0; i < n_missed; i++) {
        int64_t oldest = -1;
        for (int64_t slot = 0; slot < cache->n_slot; slot++) {
            if (cache->used[slot] <= before && (oldest < 0 || cache->used[slot] < cache->used[oldest])) {
                oldest = slot;
            }
        }
        if (oldest < 0) {
            break; // all are in use: the others are formed and not kept
        }
        const int32_t e = w->experts[w->missed[i]];
        if (cache->expert[oldest] > 0) {
            cache->slot[cache->expert[oldest] - 1] = 0;
        }
        cache->expert[oldest]  = e + 1;
        cache->slot[e]         = (int32_t) oldest + 1;
        cache->used[oldest]    = ++*clock;
        w->at[w->missed[i]]    = oldest;
    }
    cache->head->lookups += n;
    cache->head->hits    += n - n_missed;
    w->n[0] = n_found;
    w->n[1] = n_missed;
}

// row rho of the expert at a place in `experts`: in its slot, or in the thread's own memory
static char * mobe_cache_row(const struct mobe_cache * cache, const struct mobe_cache_work * w, int32_t place, int64_t rho) {
    const int64_t slot = w->at[place];
    return slot >= 0 ? cache->slots + slot*cache->slot_bytes + rho*cache->row_bytes : w->rows + place*mobe_align(cache->row_bytes);
}

static void mobe_cache_encode_input(const float * src, char * dst, int64_t d) {
#if defined(MOBE_QUAD)
    if (mobe_cache_own_rows(d)) {
        const struct mobe_kept_input x = mobe_kept_input_at(dst, d);
        mobe_kept_encode_input(src, d, &x);
        return;
    }
#endif
    const struct ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(ggml_mobe_cache_type(d));
    ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(src, dst, d);
}

// columns c0 .. c0 + n of n_row <= MOBE_TOGETHER rows; the values, MOBE_COLS apart, are lost
static void mobe_cache_encode(float * values, int n_row, int64_t n, char * const * rows, int64_t c0, int64_t d) {
#if defined(MOBE_QUAD)
    _Static_assert((int) MOBE_TOGETHER <= (int) MOBE_ENCODED, "room");
    if (mobe_cache_own_rows(d)) {
        mobe_kept_encode(values, n_row, n, rows, c0, d);
        return;
    }
#endif
    const enum ggml_type type = ggml_mobe_cache_type(d);
    for (int i = 0; i < n_row; i++) {
        ggml_get_type_traits_cpu(type)->from_float(values + i*MOBE_COLS, rows[i] + ggml_row_size(type, c0), n);
    }
}

static float mobe_cache_dot(const char * row, char * input, int64_t d) {
#if defined(MOBE_QUAD)
    if (mobe_cache_own_rows(d)) {
        const struct mobe_kept_input x = mobe_kept_input_at(input, d);
        return mobe_kept_dot(row, d, &x);
    }
#endif
    float z;
    ggml_get_type_traits_cpu(ggml_mobe_cache_type(d))->vec_dot((int) d, &z, 0, row, 0, input, 0, 1);
    return z;
}

// row rho of the expert at a place, for all its uses
static void mobe_cache_multiply(
        const struct mobe_cache * cache, const struct mobe_cache_work * w, const struct ggml_mobe_shape * s, int32_t place, int64_t rho,
        float * z) {
    const size_t input_bytes = mobe_input_bytes(s);
    const char * row = mobe_cache_row(cache, w, place, rho);
    for (int32_t i = w->first[place]; i < w->first[place + 1]; i++) {
        const int64_t use = w->uses[i];
        z[use*s->r + rho] = mobe_cache_dot(row, w->x + (s->x_experts == 1 ? use/s->k : use)*input_bytes, s->d);
    }
}

void mobe_cache_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * x   = dst->src[2];
    const struct ggml_tensor * ids = dst->src[3];

    const struct mobe_former     former = mobe_cache_former(dst);
    const struct ggml_mobe_shape s      = former.shape;
    const struct mobe_cache      cache  = mobe_cache_of(dst, &s);

    const size_t input_bytes = mobe_input_bytes(&s);

    struct mobe_cache_work w = { 0 };
    {
        char * base = (char *) mobe_align((size_t) params->wdata);
        const size_t shared = mobe_cache_shared(&w, base, &s);
        const size_t own    = mobe_cache_own(&w, NULL, &former);
        GGML_ASSERT((size_t) (base - (char *) params->wdata) + shared + params->nth*own <= params->wsize);
        mobe_cache_own(&w, base + shared + params->ith*own, &former);
    }

    for (int64_t i = params->ith; i < s.T*s.x_experts; i += params->nth) {
        const char * src = (const char *) x->data + i/s.x_experts*x->nb[2] + i%s.x_experts*x->nb[1];
        mobe_cache_encode_input((const float *) src, w.x + i*input_bytes, s.d);
    }
    if (params->ith == 0) {
        mobe_cache_look_up(&cache, &s, ids, &w);
    }
    ggml_barrier(params->threadpool);

    const int64_t n_found    = w.n[0];
    const int64_t n_missed   = w.n[1];
    const int64_t per_thread = (s.r + params->nth - 1)/params->nth;
    const int64_t row_begin  = params->ith*per_thread;
    const int64_t row_end    = row_begin + per_thread < s.r ? row_begin + per_thread : s.r;

    // what is found: one expert after the other, as its rows lie in memory
    for (int64_t i = 0; i < n_found; i++) {
        for (int64_t rho = row_begin; rho < row_end; rho++) {
            mobe_cache_multiply(&cache, &w, &s, w.found[i], rho, (float *) dst->data);
        }
    }

    for (int64_t rho = row_begin; n_missed > 0 && rho < row_end; rho++) {
        if (s.row_mix || rho == row_begin) {
            mobe_mix_gather(&former, &w.row.list, w.row.terms, w.experts, w.missed, n_missed, rho, 1);
        }
        for (int64_t c0 = 0; c0 < s.d; c0 += MOBE_COLS) {
            const int64_t n_cols = s.d - c0 < MOBE_COLS ? s.d - c0 : MOBE_COLS;
            mobe_tile_decode(&former, &w.row.tile, &w.row.list, rho, c0, n_cols);
            for (int64_t i0 = 0; i0 < n_missed; i0 += MOBE_TOGETHER) {
                const int n = n_missed - i0 < MOBE_TOGETHER ? (int) (n_missed - i0) : MOBE_TOGETHER;
                float values[MOBE_TOGETHER*MOBE_COLS] __attribute__((aligned(64)));
                char * rows[MOBE_TOGETHER];
                mobe_tile_combine(&former, w.row.terms + i0, n, &w.row.tile, n_cols, values, MOBE_COLS);
                for (int i = 0; i < n; i++) {
                    rows[i] = mobe_cache_row(&cache, &w, w.missed[i0 + i], rho);
                }
                mobe_cache_encode(values, n, n_cols, rows, c0, s.d);
            }
        }
        for (int64_t i = 0; i < n_missed; i++) {
            mobe_cache_multiply(&cache, &w, &s, w.missed[i], rho, (float *) dst->data);
        }
    }
}
