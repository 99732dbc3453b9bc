#include "llama-mobe-linear.h"

#include "ggml-backend.h"

#include <algorithm>

// --- the CPU's step ---

static const int64_t COLUMNS = 256; // of a vector: those of all bases, or experts, stay in the first-level cache
static const int64_t TERMS   = 64;  // whose coefficients are gathered at once

// z = sum_i c[i] u_i, added to what is there unless fresh; u_i lies i*stride floats behind u. Two at a time, as a vector is
// longer than what a core keeps in registers.
static void add_terms(float * z, int64_t n, const float * u, int64_t stride, const float * c, int64_t count, bool fresh) {
    for (int64_t i = 0; i < count; i += 2, fresh = false) {
        const float * s = u + i*stride;
        const float   a = c[i];
        if (i + 1 == count) {
            for (int64_t x = 0; x < n; x++) {
                z[x] = fresh ? a*s[x] : z[x] + a*s[x];
            }
            return;
        }
        const float * t = s + stride;
        const float   b = c[i + 1];
        if (fresh) {
            for (int64_t x = 0; x < n; x++) {
                z[x] = a*s[x] + b*t[x];
            }
        } else {
            for (int64_t x = 0; x < n; x++) {
                z[x] += a*s[x] + b*t[x];
            }
        }
    }
}

static const float * mix_of_expert(const ggml_tensor * mix, const ggml_tensor * ids, int64_t s, int64_t t) {
    const int32_t e = *(const int32_t *) ((const char *) ids->data + s*ids->nb[0] + t*ids->nb[1]);
    GGML_ASSERT(e >= 0 && e < mix->ne[1]);
    return (const float *) ((const char *) mix->data + e*mix->nb[1]);
}

// the part of thread ith of nth: stretches of COLUMNS columns, token by token
struct stretches {
    int64_t blocks, begin, end;
    stretches(int64_t r, int64_t T, int ith, int nth) :
        blocks((r + COLUMNS - 1)/COLUMNS), begin(blocks*T*ith/nth), end(blocks*T*(ith + 1)/nth) {}
};

// dst [r, k, T]; src: u [r*m, T], mix [m, n], ids [k, T]
static void mix_products(ggml_tensor * dst, int ith, int nth, void * /* userdata */) {
    const ggml_tensor * u   = dst->src[0];
    const ggml_tensor * mix = dst->src[1];
    const ggml_tensor * ids = dst->src[2];
    const int64_t r = dst->ne[0];
    const int64_t m = mix->ne[0];

    const stretches own(r, dst->ne[2], ith, nth);
    for (int64_t i = own.begin; i < own.end; i++) {
        const int64_t t  = i / own.blocks;
        const int64_t c0 = i % own.blocks*COLUMNS;
        const int64_t n  = std::min(COLUMNS, r - c0);
        const float * products = (const float *) ((const char *) u->data + t*u->nb[1]) + c0;
        for (int64_t s = 0; s < dst->ne[1]; s++) {
            float * z = (float *) ((char *) dst->data + s*dst->nb[1] + t*dst->nb[2]) + c0;
            add_terms(z, n, products, r, mix_of_expert(mix, ids, s, t), m, true);
        }
    }
}

// dst [r, T, m]; src: y [r, k, T], mix [m, n], ids [k, T], weights [1, k, T] if there are
static void sum_experts(ggml_tensor * dst, int ith, int nth, void * /* userdata */) {
    const ggml_tensor * y       = dst->src[0];
    const ggml_tensor * mix     = dst->src[1];
    const ggml_tensor * ids     = dst->src[2];
    const ggml_tensor * weights = dst->src[3];
    const int64_t r = dst->ne[0];
    const int64_t k = y->ne[1];

    const stretches own(r, dst->ne[1], ith, nth);
    for (int64_t i = own.begin; i < own.end; i++) {
        const int64_t t  = i / own.blocks;
        const int64_t c0 = i % own.blocks*COLUMNS;
        const int64_t n  = std::min(COLUMNS, r - c0);
        for (int64_t j = 0; j < dst->ne[2]; j++) {
            float * v = (float *) ((char *) dst->data + t*dst->nb[1] + j*dst->nb[2]) + c0;
            for (int64_t s0 = 0; s0 < k; s0 += TERMS) {
                const int64_t count = std::min(TERMS, k - s0);
                float c[TERMS];
                for (int64_t s = 0; s < count; s++) {
                    const float w = weights ? *(const float *) ((const char *) weights->data + (s0 + s)*weights->nb[1] + t*weights->nb[2]) : 1.0f;
                    c[s] = w*mix_of_expert(mix, ids, s0 + s, t)[j];
                }
                const float * from = (const float *) ((const char *) y->data + s0*y->nb[1] + t*y->nb[2]) + c0;
                add_terms(v, n, from, y->nb[1]/sizeof(float), c, count, s0 == 0);
            }
        }
    }
}

static bool has_gpu() {
    static const bool found = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU) != nullptr ||
                              ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_IGPU) != nullptr;
    return found;
}

static bool is_in_main_memory(const ggml_tensor * weight) {
    if (weight->buffer == nullptr) {
        return false;
    }
    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(weight->buffer);
    ggml_backend_dev_t         dev  = ggml_backend_buft_get_device(buft);
    return dev == nullptr || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU ||
           buft == ggml_backend_dev_host_buffer_type(dev);
}

// Whether the CPU takes the step: where it multiplies the bases. A prompt's products may go to a GPU all the same, from 32
// tokens on, and then the step should not be the only one to stay behind.
static bool cpu_steps(const ggml_tensor * bases, const ggml_tensor * mix, int64_t T) {
    return is_in_main_memory(bases) && is_in_main_memory(mix) && ggml_backend_buffer_is_host(mix->buffer) && (T < 32 || !has_gpu());
}

// --- ggml's operators ---

// the coefficients of a token's experts: [m, k, T]
static ggml_tensor * mix_of(ggml_context * ctx, ggml_tensor * mix, ggml_tensor * ids) {
    const int64_t k = ids->ne[0];
    const int64_t T = ids->ne[1];
    ggml_tensor * rows = ggml_get_rows(ctx, mix, ggml_reshape_1d(ctx, ggml_cont(ctx, ids), k*T));
    return ggml_reshape_3d(ctx, rows, mix->ne[0], k, T);
}

static ggml_tensor * transposed(ggml_context * ctx, ggml_tensor * t) { return ggml_cont(ctx, ggml_permute(ctx, t, 1, 0, 2, 3)); }

ggml_tensor * mobe_project_linear(ggml_context * ctx, ggml_tensor * bases, ggml_tensor * mix, ggml_tensor * x, ggml_tensor * ids) {
    const int64_t d = bases->ne[0];
    const int64_t m = mix->ne[0];
    const int64_t r = bases->ne[1]/m;
    const int64_t k = ids->ne[0];
    const int64_t T = ids->ne[1];

    ggml_tensor * u = ggml_mul_mat(ctx, bases, ggml_reshape_2d(ctx, x, d, T)); // [r*m, T]
    if (cpu_steps(bases, mix, T)) {
        ggml_tensor * sources[] = { u, mix, ids };
        return ggml_custom_4d(ctx, GGML_TYPE_F32, r, k, T, 1, sources, 3, mix_products, GGML_N_TASKS_MAX, nullptr);
    }
    u = transposed(ctx, ggml_reshape_3d(ctx, u, r, m, T)); // [m, r, T]
    return ggml_mul_mat(ctx, u, mix_of(ctx, mix, ids));    // [r, k, T]
}

// some of what lies behind each other along the last axis
static ggml_tensor * part(ggml_context * ctx, ggml_tensor * t, int64_t first, int64_t n) {
    return n == t->ne[2] ? t : ggml_view_3d(ctx, t, t->ne[0], t->ne[1], n, t->nb[1], t->nb[2], first*t->nb[2]);
}

// [d, T, 1]: t, added up along its last axis, half onto half
static ggml_tensor * summed(ggml_context * ctx, ggml_tensor * t) {
    ggml_tensor * odd = nullptr;
    while (t->ne[2] > 1) {
        const int64_t half = t->ne[2]/2;
        if (t->ne[2] % 2 != 0) {
            ggml_tensor * last = part(ctx, t, 2*half, 1);
            odd = odd == nullptr ? last : ggml_add(ctx, odd, last);
        }
        t = ggml_add(ctx, part(ctx, t, 0, half), part(ctx, t, half, half));
    }
    return odd == nullptr ? t : ggml_add(ctx, t, odd);
}

static const int64_t SUMS = 8; // at most, so that the graph stays small

int mobe_sum_linear_nodes() {
    return 12 + 4*SUMS + 10*8; // coefficients; each sum; each halving (of 256 bases at once), with what is left over
}

// [r, T, m]: the experts' rows, summed by the coefficients of each basis
static ggml_tensor * summed_experts(
        ggml_context * ctx, ggml_tensor * bases, ggml_tensor * mix, ggml_tensor * y, ggml_tensor * ids, ggml_tensor * weights) {
    const int64_t T = ids->ne[1];
    if (cpu_steps(bases, mix, T)) {
        ggml_tensor * sources[] = { y, mix, ids, weights };
        return ggml_custom_4d(
            ctx, GGML_TYPE_F32, y->ne[0], T, mix->ne[0], 1, sources, weights ? 4 : 3, sum_experts, GGML_N_TASKS_MAX, nullptr);
    }
    ggml_tensor * c = mix_of(ctx, mix, ids);
    if (weights != nullptr) {
        c = ggml_mul(ctx, c, weights);
    }
    ggml_tensor * v = ggml_mul_mat(ctx, transposed(ctx, y), transposed(ctx, c)); // [r, m, T]
    return ggml_permute(ctx, v, 0, 2, 1, 3);
}

ggml_tensor * mobe_sum_linear(
        ggml_context * ctx, ggml_tensor * bases, ggml_tensor * mix, ggml_tensor * y, ggml_tensor * ids, ggml_tensor * weights) {
    const int64_t m = bases->ne[2];
    const int64_t k = ids->ne[0];
    const int64_t T = ids->ne[1];

    ggml_tensor * v = summed_experts(ctx, bases, mix, y, ids, weights);

    // The products of several bases at once, [d, T, n_at_once], are added up: of a few tokens all bases, of a prompt as many as
    // there are experts, whose own outputs would take as much memory; but no more than SUMS times.
    const int64_t n_at_once = std::min(m, std::max({ k, 256/T, (m + SUMS - 1)/SUMS }));
    const auto product = [&](int64_t j, int64_t n) { return ggml_mul_mat(ctx, part(ctx, bases, j, n), part(ctx, v, j, n)); };

    ggml_tensor * sum = product(0, n_at_once);
    int64_t j = n_at_once;
    for (; j + n_at_once <= m; j += n_at_once) {
        sum = ggml_add(ctx, sum, product(j, n_at_once));
    }
    sum = summed(ctx, sum);
    if (j < m) {
        sum = ggml_add(ctx, sum, summed(ctx, product(j, m - j)));
    }
    return ggml_reshape_2d(ctx, sum, sum->ne[0], T);
}
