#include "llama-mobe-cache.h"

#include "ggml-backend.h"
#include "llama-impl.h"
#include "llama-mobe.h"
#include "mobe-cache.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>
#include <utility>
#include <vector>

static ggml_mobe_shape shape_of(const llama_mobe::factors & f) {
    ggml_mobe_shape shape = {};
    shape.d       = f.basis->ne[0];
    shape.r       = f.basis->ne[1];
    shape.row_mix = f.mix->ne[2] > 1;
    shape.n       = f.mix->ne[shape.row_mix ? 2 : 1];
    return shape;
}

llama_mobe_cache::llama_mobe_cache(const llama_mobe & mobe, size_t budget) {
    std::vector<std::pair<const ggml_tensor *, ggml_mobe_shape>> projections;
    size_t  one   = 0; // bytes of a slot for each
    int64_t n_max = 0;
    for (const auto & it : mobe.by_transform) {
        const llama_mobe::factors & f = it.second;
        if (f.linear || f.basis->buffer == nullptr || !ggml_backend_buffer_is_host(f.basis->buffer)) {
            continue; // nothing is formed, or not here
        }
        projections.emplace_back(it.first, shape_of(f));
        one   += ggml_mobe_cache_size(&projections.back().second, 1);
        n_max  = std::max(n_max, projections.back().second.n);
    }
    if (projections.empty()) {
        LLAMA_LOG_WARN("%s: the model has no factorized experts that the CPU forms: --mobe-cache is of no use\n", __func__);
        return;
    }
    const int64_t n_slot = std::min<int64_t>(budget/one, n_max);
    if (n_slot < 1) {
        LLAMA_LOG_WARN("%s: %.1f MiB hold no matrix of each of the %zu projections: they need %.1f MiB\n",
            __func__, budget/1024.0/1024.0, projections.size(), one/1024.0/1024.0);
        return;
    }

    ctx.reset(ggml_init({ ggml_tensor_overhead()*projections.size(), nullptr, true }));
    for (const auto & p : projections) {
        const size_t size = ggml_mobe_cache_size(&p.second, std::min(n_slot, p.second.n));
        ggml_tensor * cache = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, (int64_t) size);
        ggml_format_name(cache, "%s (cache)", p.first->name);
        by_transform.emplace(p.first, cache);
    }
    buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    if (!buffer) {
        throw std::runtime_error(format("no memory for a cache of %.1f MiB", budget/1024.0/1024.0));
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
    LLAMA_LOG_INFO("%s: %.1f MiB: %" PRId64 " formed matrices for each of %zu projections\n", __func__,
        ggml_backend_buffer_get_size(buffer.get())/1024.0/1024.0, n_slot, projections.size());
}

llama_mobe_cache::~llama_mobe_cache() {
    uint64_t lookups = 0;
    uint64_t hits    = 0;
    for (const auto & it : by_transform) {
        mobe_cache_head head;
        ggml_backend_tensor_get(it.second, &head, 0, sizeof(head));
        lookups += head.lookups;
        hits    += head.hits;
    }
    if (lookups > 0) {
        LLAMA_LOG_INFO("%s: %" PRIu64 " matrices asked for, %" PRIu64 " of them found (%.1f %%)\n", __func__, lookups, hits, 100.0*hits/lookups);
    }
}

ggml_tensor * llama_mobe_cache::find(const ggml_tensor * w) const {
    const auto it = by_transform.find(w);
    return it == by_transform.end() ? nullptr : it->second;
}
