// A context's memory for formed matrices: a tensor for each projection that the CPU computes (layout: mobe-cache.h).

#pragma once

#include "ggml-cpp.h"

#include <cstddef>
#include <unordered_map>

struct llama_mobe;

struct llama_mobe_cache {
    // at most `budget` bytes, in as many slots for each projection; says in the log what came of it
    llama_mobe_cache(const llama_mobe & mobe, size_t budget);

    // says in the log what it was good for
    ~llama_mobe_cache();

    // the cache of the projection that belongs to w (an A), or nullptr
    ggml_tensor * find(const ggml_tensor * w) const;

private:
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;

    std::unordered_map<const ggml_tensor *, ggml_tensor *> by_transform;
};
