// Times GGML_OP_MOBE_PROJ on one device and prints a table: microseconds an operation, bases' bytes a second and as a share of
// what the device's own copy reaches, multiply-adds a second; beside it ggml's mul_mat_id on the uncompressed experts.
//
//   gpu_ops [DEVICE] [RUNS] [NAME] [COUNT]     (CUDA0, 20, shapes whose name contains NAME, the first COUNT cases of each)
//
// A graph holds several layers with bases of their own, more than any cache, so that each run reads them from memory; the
// backend's graph capture applies as it does in a model. Median of RUNS. bench/gpu.sh compiles this against the built libraries.
//
// What a graph has computed after all runs is compared with the formula at some places: test-backend-ops has no shapes of this size,
// and computes each graph once, so never a captured one.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-mobe.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

struct shape {
    const char * name;
    int64_t d, r, m;
    int n, k;
};

static const shape SHAPES[] = {
    { "qwen3-30b",   2048,  768, 32, 128, 8 },
    { "qwen3-235b",  4096, 1536, 32, 128, 8 },
    { "deepseek-v3", 7168, 2048, 64, 256, 8 },
};

static std::mt19937 rng(1);

static std::vector<float> normal(size_t n, float scale) {
    std::normal_distribution<float> distribution(0.0f, scale);
    std::vector<float> v(n);
    for (float & x : v) {
        x = distribution(rng);
    }
    return v;
}

// t = random numbers of its type: 61 rows quantized once and repeated over all rows (so that bases differ: none has a multiple of 61)
static void fill(ggml_tensor * t) {
    const int64_t rows = std::min<int64_t>(61, ggml_nrows(t));
    const auto values = normal(rows*t->ne[0], 1.0f);
    std::vector<char> data(rows*t->nb[1]);
    const std::vector<float> importance(t->ne[0], 1.0f);
    ggml_quantize_chunk(t->type, values.data(), data.data(), 0, rows, t->ne[0], importance.data());
    for (int64_t row = 0; row < ggml_nrows(t); row += rows) {
        ggml_backend_tensor_set(t, data.data(), row*t->nb[1], std::min(rows, ggml_nrows(t) - row)*t->nb[1]);
    }
}

static void fill_ids(ggml_tensor * ids, int n) {
    std::vector<int32_t> all(n), chosen;
    std::iota(all.begin(), all.end(), 0);
    for (int64_t t = 0; t < ids->ne[1]; t++) {
        std::shuffle(all.begin(), all.end(), rng);
        chosen.insert(chosen.end(), all.begin(), all.begin() + ids->ne[0]);
    }
    ggml_backend_tensor_set(ids, chosen.data(), 0, ggml_nbytes(ids));
}

// seconds of one graph: the median of `runs` after 3 that warm up (ggml captures a graph on the third)
static double seconds(ggml_backend_t backend, ggml_cgraph * graph, int runs) {
    std::vector<double> times;
    for (int i = 0; i < runs + 3; i++) {
        ggml_backend_synchronize(backend);
        const auto start = std::chrono::steady_clock::now();
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            fprintf(stderr, "gpu_ops: the graph failed\n");
            exit(1);
        }
        ggml_backend_synchronize(backend);
        times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::nth_element(times.begin() + 3, times.begin() + 3 + runs/2, times.end());
    return times[3 + runs/2];
}

static std::vector<float> row_of(const ggml_tensor * t, int64_t row) {
    std::vector<char>  data(t->nb[1]);
    std::vector<float> values(t->ne[0]);
    ggml_backend_tensor_get(t, data.data(), row*t->nb[1], t->nb[1]);
    if (t->type == GGML_TYPE_F32) {
        memcpy(values.data(), data.data(), data.size());
    } else {
        ggml_get_type_traits(t->type)->to_float(data.data(), values.data(), t->ne[0]);
    }
    return values;
}

// normalized squared error of some results of a MOBE_PROJ node (tanh, one x a token, one group), among them the first and the last
static double error_of(const ggml_tensor * z) {
    const ggml_tensor * basis = z->src[0], * mix = z->src[1], * x = z->src[2], * ids = z->src[3];
    const int64_t d = basis->ne[0], r = basis->ne[1], m = basis->ne[2], k = ids->ne[0], T = ids->ne[1];
    double error = 0, norm = 0;
    for (int i = 0; i < 32; i++) {
        const int64_t row = i == 0 ? 0 : i == 1 ? r - 1 : rng()%r;
        const int64_t use = i == 0 ? 0 : i == 1 ? k*T - 1 : rng()%(k*T);
        int32_t expert = 0;
        float   got    = 0;
        ggml_backend_tensor_get(ids, &expert, use*sizeof(expert), sizeof(expert));
        ggml_backend_tensor_get(z, &got, (use*r + row)*sizeof(got), sizeof(got));
        const auto alpha = row_of(mix, expert);
        const auto input = row_of(x, use/k);
        std::vector<double> sum(d);
        for (int64_t j = 0; j < m; j++) {
            const auto values = row_of(basis, j*r + row);
            for (int64_t c = 0; c < d; c++) {
                sum[c] += (double) alpha[j]*values[c];
            }
        }
        double truth = 0;
        for (int64_t c = 0; c < d; c++) {
            truth += tanh(sum[c])*input[c];
        }
        error += (got - truth)*(got - truth);
        norm  += truth*truth;
    }
    return error/norm;
}

static bool wrong = false;

struct scratch {
    ggml_context * ctx;
    ggml_backend_buffer_t buffer = nullptr;
    scratch() : ctx(ggml_init({ ggml_tensor_overhead()*512 + ggml_graph_overhead(), nullptr, true })) {}
    ~scratch() { ggml_backend_buffer_free(buffer); ggml_free(ctx); }
    bool alloc(ggml_backend_t backend) { return (buffer = ggml_backend_alloc_ctx_tensors(ctx, backend)) != nullptr; }
};

static double copy_bandwidth(ggml_backend_t backend, bool small) {
    scratch s;
    const int64_t n = small ? 16 << 20 : 256 << 20;
    ggml_tensor * from = ggml_new_tensor_1d(s.ctx, GGML_TYPE_F32, n);
    ggml_tensor * to   = ggml_new_tensor_1d(s.ctx, GGML_TYPE_F32, n);
    ggml_tensor * copy = ggml_cpy(s.ctx, from, to);
    ggml_cgraph * graph = ggml_new_graph(s.ctx);
    ggml_build_forward_expand(graph, copy);
    if (!s.alloc(backend)) {
        return 0;
    }
    ggml_backend_buffer_clear(s.buffer, 0);
    return 2.0*ggml_nbytes(from)/seconds(backend, graph, 10);
}

static void bench(ggml_backend_t backend, const shape & c, ggml_type type, int64_t T, bool dense, int runs, double copy, bool small) {
    scratch s;
    const int64_t matrix = ggml_row_size(type, c.d)*c.r;
    const int64_t bytes  = dense ? matrix*c.n : matrix*c.m;
    const int layers = small ? 1 : (int) std::clamp<int64_t>((1ll << 30)/bytes, 2, 16);

    std::vector<ggml_tensor *> weights, mixes, idss;
    ggml_tensor * x = ggml_new_tensor_3d(s.ctx, GGML_TYPE_F32, c.d, 1, T);
    ggml_cgraph * graph = ggml_new_graph(s.ctx);
    for (int i = 0; i < layers; i++) {
        weights.push_back(ggml_new_tensor_3d(s.ctx, type, c.d, c.r, dense ? c.n : c.m));
        mixes.push_back(ggml_new_tensor_2d(s.ctx, GGML_TYPE_F32, c.m, c.n));
        idss.push_back(ggml_new_tensor_2d(s.ctx, GGML_TYPE_I32, c.k, T));
        ggml_tensor * out = dense ?
            ggml_mul_mat_id(s.ctx, weights[i], x, idss[i]) :
            ggml_mobe_proj(s.ctx, weights[i], mixes[i], x, idss[i], GGML_MOBE_ACTIVATION_TANH);
        if (!ggml_backend_supports_op(backend, out)) {
            printf("%-12s %-6s %5d  not supported\n", c.name, ggml_type_name(type), (int) T);
            return;
        }
        ggml_build_forward_expand(graph, out);
    }
    if (!s.alloc(backend)) {
        printf("%-12s %-6s %5d  not enough memory\n", c.name, ggml_type_name(type), (int) T);
        return;
    }
    for (int i = 0; i < layers; i++) {
        fill(weights[i]);
        const auto mix = normal(ggml_nelements(mixes[i]), 1.0f/sqrtf((float) c.m));
        ggml_backend_tensor_set(mixes[i], mix.data(), 0, ggml_nbytes(mixes[i]));
        fill_ids(idss[i], c.n);
    }
    const auto input = normal(ggml_nelements(x), 1.0f);
    ggml_backend_tensor_set(x, input.data(), 0, ggml_nbytes(x));

    const double each = seconds(backend, graph, runs)/layers;
    double error = 0;
    if (!dense) {
        ggml_tensor * first = ggml_graph_node(graph, 0), * last = ggml_graph_node(graph, -1);
        ggml_backend_tensor_memset(first, 0xff, 0, ggml_nbytes(first)); // NaNs
        ggml_backend_tensor_memset(last,  0xff, 0, ggml_nbytes(last));
        ggml_backend_graph_compute(backend, graph);
        error = (error_of(first) + error_of(last))/2;
        wrong = wrong || !(error < 1e-3);
    }
    // bytes that have to be read once: all bases, or the experts in use
    const double needed = dense ? (double) matrix*std::min<double>(c.n, c.k*T) : (double) bytes;
    const double macs   = (double) c.k*T*c.r*c.d*(dense ? 1 : c.m + 1);
    printf("%-12s %-6s %5d  %-10s %9.1f us %8.0f GB/s %5.1f %%  %8.2f TMAC/s", c.name, ggml_type_name(type), (int) T,
        dense ? "mul_mat_id" : "mobe_proj", each*1e6, needed/each*1e-9, 100*needed/each/copy, macs/each*1e-12);
    printf(dense ? "\n" : "   error %.0e%s\n", error, error < 1e-3 ? "" : " WRONG");
    fflush(stdout);
}

int main(int argc, char ** argv) {
    const char * device = argc > 1 ? argv[1] : "CUDA0";
    const int    runs   = argc > 2 ? std::max(1, atoi(argv[2])) : 20;
    const char * only   = argc > 3 ? argv[3] : "";
    const int    count  = argc > 4 ? atoi(argv[4]) : 1 << 20;

    ggml_backend_load_all();
    ggml_backend_t backend = ggml_backend_init_by_name(device, nullptr);
    if (backend == nullptr) {
        fprintf(stderr, "gpu_ops: no device %s; there are:", device);
        for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
            fprintf(stderr, " %s", ggml_backend_dev_name(ggml_backend_dev_get(i)));
        }
        fprintf(stderr, "\n");
        return 1;
    }
    const bool small = strcmp(device, "CPU") == 0; // one layer, one token: to try this program
    const double copy = copy_bandwidth(backend, small);
    printf("%s: a copy reads and writes %.0f GB/s\n", ggml_backend_dev_description(ggml_backend_get_device(backend)), copy*1e-9);
    printf("%-12s %-6s %5s  %-10s %12s %13s %7s  %15s\n", "shape", "type", "T", "operator", "time", "read", "of copy", "work");

    for (const shape & c : SHAPES) {
        if (strstr(c.name, only) == nullptr) {
            continue;
        }
        int left = count;
        for (ggml_type type : { GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_XS, GGML_TYPE_F16 }) {
            for (int64_t T : { 1, 2, 4, 8, 32, 512 }) {
                if ((type != GGML_TYPE_Q4_K && T != 1) || (small && T > 1) || left-- <= 0) {
                    continue;
                }
                bench(backend, c, type, T, false, runs, copy, small);
                if (type == GGML_TYPE_Q4_K) {
                    bench(backend, c, type, T, true, runs, copy, small);
                }
            }
        }
    }
    ggml_backend_free(backend);
    if (wrong) {
        fprintf(stderr, "gpu_ops: some results are wrong\n");
    }
    return wrong ? 1 : 0;
}
