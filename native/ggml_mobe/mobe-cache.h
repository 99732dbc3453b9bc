// The cache of formed matrices: where its bytes lie, and the CPU kernel that uses it.
//
// The cache of one projection of one layer is the data of one tensor (ggml_mobe_proj_cached, src[4]), all zeros at first:
//
//   head     struct mobe_cache_head
//   slot     int32 [n]       slot of each expert plus 1, 0 for none
//   expert   int32 [n_slot]  what each slot holds plus 1, 0 for nothing
//   used     uint64 [n_slot] clock of the last use of the slot
//   slots    [n_slot][r] rows of d values: the numbers of q8_0, as mobe-kept.h lays them out or in ggml's type (f16 where 32 does not divide d)
//
// A hit multiplies the rows of a slot as mul_mat_id would those of an ordinary expert. A miss forms, quantizes and stores them,
// in the slot that has been unused longest, and multiplies the very same rows; if all slots are in use by this call, it
// does not store them. So results do not depend on what the cache holds, nor on its size.

#pragma once

#include "ggml-mobe.h"
#include "mobe-layout.h"

struct mobe_cache_head {
    uint64_t clock; // grows with every use
    uint64_t lookups, hits;
};

struct mobe_cache {
    enum ggml_type           type;
    int64_t                  n_slot;
    size_t                   row_bytes, slot_bytes;
    struct mobe_cache_head * head;
    int32_t                * slot;
    int32_t                * expert;
    uint64_t               * used;
    char                   * slots;
};

#if !defined(__cplusplus) // which would have each pointer cast

// Where the parts of a cache with n_slot slots lie from data on; NULL only counts. Returns its bytes.
static inline size_t mobe_cache_layout(struct mobe_cache * cache, const struct ggml_mobe_shape * s, int64_t n_slot, void * data) {
    size_t used = 0;
    cache->type       = ggml_mobe_cache_type(s->d);
    cache->n_slot     = n_slot;
    cache->row_bytes  = ggml_row_size(cache->type, s->d);
    cache->slot_bytes = mobe_align(s->r*cache->row_bytes);
    MOBE_TAKE(data, used, cache->head,   1);
    MOBE_TAKE(data, used, cache->slot,   s->n);
    MOBE_TAKE(data, used, cache->expert, n_slot);
    MOBE_TAKE(data, used, cache->used,   n_slot);
    MOBE_TAKE(data, used, cache->slots,  n_slot*cache->slot_bytes);
    return used;
}

#endif

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// calls of more tokens do not look at the cache: they form each matrix for many tokens at once
bool mobe_cache_takes(const struct ggml_tensor * dst);

size_t mobe_cache_work_size(const struct ggml_tensor * dst, int n_tasks);

void mobe_cache_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
