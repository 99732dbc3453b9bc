#include "mobe-cache.h"
#include "mobe-form.h"
#include "mobe-kept.h"
#include "mobe-vec.h"

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <string.h>

enum { MOBE_TOGETHER = 8 }; // experts that are formed in one call

static size_t mobe_align(size_t n) { return (n + 63) & ~(size_t) 63; }

// What all threads share, and what each has of its own. All arrays lie in params->wdata.
struct mobe_cache_work {
    int32_t * experts; // [k*T]  those in use, each once
    int32_t * index;   // [n]    place of an expert in `experts`
    int64_t * at;      // [k*T]  its slot, or -1: it is not kept
    int32_t * missed;  // [k*T]  places in `experts` of those to be formed
    int64_t * n;       // [2]    lengths of `experts` and of `missed`
    char    * x;       // [T*x_experts] inputs as the product takes them

    struct mobe_row row;  // of missed experts
    char          * rows; // [k*T] one row of each missed expert that is not kept
};

static int64_t mobe_most(const struct ggml_mobe_shape * s) { return s->k*s->T < s->n ? s->k*s->T : s->n; }

static struct mobe_cache mobe_cache_of(const struct ggml_tensor * dst, const struct ggml_mobe_shape * s) {
    struct mobe_cache cache = { 0 };
    cache.type       = ggml_mobe_cache_type(s->d);
    cache.n_slot     = ggml_mobe_cache_slots(s, ggml_nbytes(dst->src[4]));
    cache.row_bytes  = ggml_row_size(cache.type, s->d);
    cache.slot_bytes = mobe_align(s->r*cache.row_bytes);

    char * data  = dst->src[4]->data;
    cache.head   = (struct mobe_cache_head *) data;
    cache.slot   = (int32_t *) (data + 64);
    cache.expert = (int32_t *) ((char *) cache.slot + mobe_align(s->n*sizeof(int32_t)));
    cache.used   = (uint64_t *) ((char *) cache.expert + mobe_align(cache.n_slot*sizeof(int32_t)));
    cache.slots  = (char *) cache.used + mobe_align(cache.n_slot*sizeof(uint64_t));
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
#define MOBE_TAKE(field, count) \
    do { if (base) { w->field = (void *) (base + used); } used += mobe_align((count)*sizeof(*w->field)); } while (0)

static size_t mobe_cache_shared(struct mobe_cache_work * w, char * base, const struct ggml_mobe_shape * s) {
    size_t used = 0;
    MOBE_TAKE(experts, mobe_most(s));
    MOBE_TAKE(index,   s->n);
    MOBE_TAKE(at,      mobe_most(s));
    MOBE_TAKE(missed,  mobe_most(s));
    MOBE_TAKE(n,       2);
    MOBE_TAKE(x,       s->T*s->x_experts*mobe_input_bytes(s));
    return used;
}

static size_t mobe_cache_own(struct mobe_cache_work * w, char * base, const struct mobe_former * former) {
    const struct ggml_mobe_shape * s = &former->shape;
    size_t used = 0;
    MOBE_TAKE(rows, mobe_most(s)*mobe_align(ggml_row_size(ggml_mobe_cache_type(s->d), s->d)));
    return used + mobe_row_place(former, base ? &w->row : NULL, mobe_most(s), base ? base + used : NULL);
}
#undef MOBE_TAKE

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
    int64_t n_missed = 0;

    memset(w->index, 0xff, s->n*sizeof(int32_t));
    for (int64_t t = 0; t < s->T; t++) {
        const int32_t * row = (const int32_t *) ((const char *) ids->data + t*ids->nb[1]);
        for (int64_t i = 0; i < s->k; i++) {
            const int32_t e = row[i];
            GGML_ASSERT(e >= 0 && e < s->n);
            if (w->index[e] >= 0) {
                continue;
            }
            w->index[e]   = (int32_t) n;
            w->experts[n] = e;
            w->at[n]      = (int64_t) cache->slot[e] - 1;
            if (w->at[n] >= 0) {
                cache->used[w->at[n]] = ++*clock;
            } else {
                w->missed[n_missed++] = (int32_t) n;
            }
            n++;
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
    w->n[0] = n;
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

// columns c0 .. c0 + n of a row
static void mobe_cache_encode(const float * src, int64_t c0, int64_t n, char * row, int64_t d) {
#if defined(MOBE_QUAD)
    if (mobe_cache_own_rows(d)) {
        mobe_kept_encode(src, c0, n, row, d);
        return;
    }
#endif
    const enum ggml_type type = ggml_mobe_cache_type(d);
    ggml_get_type_traits_cpu(type)->from_float(src, row + ggml_row_size(type, c0), n);
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

    const int64_t n_missed   = w.n[1];
    const int64_t per_thread = (s.r + params->nth - 1)/params->nth;
    const int64_t row_begin  = params->ith*per_thread;
    const int64_t row_end    = row_begin + per_thread < s.r ? row_begin + per_thread : s.r;

    for (int64_t rho = row_begin; rho < row_end; rho++) {
        if (n_missed > 0 && (s.row_mix || rho == row_begin)) {
            mobe_row_gather(&former, &w.row, w.experts, w.missed, n_missed, rho);
        }
        for (int64_t c0 = 0; n_missed > 0 && c0 < s.d; c0 += MOBE_COLS) {
            const int64_t n_cols = s.d - c0 < MOBE_COLS ? s.d - c0 : MOBE_COLS;
            mobe_tile_decode(&former, &w.row.tile, &w.row.list, rho, c0, n_cols);
            for (int64_t i0 = 0; i0 < n_missed; i0 += MOBE_TOGETHER) {
                const int n = n_missed - i0 < MOBE_TOGETHER ? (int) (n_missed - i0) : MOBE_TOGETHER;
                float values[MOBE_TOGETHER*MOBE_COLS] __attribute__((aligned(64)));
                mobe_tile_combine(&former, w.row.terms + i0, n, &w.row.tile, n_cols, values, MOBE_COLS);
                for (int i = 0; i < n; i++) {
                    const int32_t place = w.missed[i0 + i];
                    char * row = mobe_cache_row(&cache, &w, place, rho);
                    mobe_cache_encode(values + i*MOBE_COLS, c0, n_cols, row, s.d);
                }
            }
        }
        for (int64_t t = 0; t < s.T; t++) {
            const int32_t * used = (const int32_t *) ((const char *) ids->data + t*ids->nb[1]);
            for (int64_t i = 0; i < s.k; i++) {
                const char * row = mobe_cache_row(&cache, &w, w.index[used[i]], rho);
                mobe_prefetch(row + cache.row_bytes, cache.row_bytes); // the next one
                char * input     = w.x + (t*s.x_experts + (s.x_experts == 1 ? 0 : i))*input_bytes;
                ((float *) dst->data)[(t*s.k + i)*s.r + rho] = mobe_cache_dot(row, input, s.d);
            }
        }
    }
}
