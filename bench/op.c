// What bench/op.py measures: the operator on the installed library's CPU backend, one thread, and this core's peaks.
//
//   op peaks                                    one line a peak: name, units a second
//   op TYPE d r m n k T terms repetitions       seconds of CPU time of each repetition

#include "ggml-backend.h"
#include "ggml-mobe.h"
#include "ggml.h"
#include "mobe-quad.h"
#include "mobe-vec.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9*t.tv_nsec;
}

// the shortest of nine, in units a second; BODY is done for each of 16 independent registers a[i]
#define PEAK(name, type, first, body, units) { \
        double best = 1e9; \
        for (int rep = 0; rep < 9; rep++) { \
            type a[16]; \
            for (int i = 0; i < 16; i++) { a[i] = first; } \
            const double start = cpu_seconds(); \
            for (int round = 0; round < 1000000; round++) { \
                _Pragma("GCC unroll 16") \
                for (int i = 0; i < 16; i++) { body; MOBE_PIN(a[i]); } \
            } \
            const double seconds = cpu_seconds() - start; \
            best = seconds < best ? seconds : best; \
            for (int i = 0; i < 16; i++) { volatile type keep = a[i]; (void) keep; } \
        } \
        printf("%s %.6g\n", name, 16e6*(units)/best); \
    }

static void peaks(void) {
    const mobe_vec one = mobe_vec_set(0.999f);
    PEAK("fma", mobe_vec, one, a[i] += one*one, MOBE_VEC)
    PEAK("tanh", mobe_vec, mobe_vec_set(0.1f*i), a[i] = mobe_vec_tanh_quick(a[i]), MOBE_VEC)
#if defined(MOBE_QUAD)
    const mobe_quad four = mobe_quad_set(0x01010101);
    PEAK("int8", mobe_quad, four, a[i] = mobe_quad_dot(a[i], four, four, false), 4*MOBE_VEC)
#endif
#if defined(__AVX512BF16__)
    const __m512bh half = (__m512bh) _mm512_set1_epi16(0x3f00);
    PEAK("bf16", __m512, (__m512) one, a[i] = _mm512_dpbf16_ps(a[i], half, half), 2*MOBE_VEC)
#endif
    const size_t size = (size_t) 256 << 20;
    char * memory = aligned_alloc(64, size);
    memset(memory, 1, size);
    double best = 1e9;
    for (int rep = 0; rep < 7; rep++) {
        mobe_vec sums[8] = { one, one, one, one, one, one, one, one };
        const double start = cpu_seconds();
        for (size_t at = 0; at < size; at += 8*sizeof(mobe_vec)) {
            for (int i = 0; i < 8; i++) {
                sums[i] += mobe_vec_load((const float *) (memory + at) + i*MOBE_VEC);
                MOBE_PIN(sums[i]);
            }
        }
        const double seconds = cpu_seconds() - start;
        best = seconds < best ? seconds : best;
        for (int i = 0; i < 8; i++) { volatile float keep = mobe_vec_sum(sums[i]); (void) keep; }
    }
    printf("read %.6g\n", size/best);
}

int main(int argc, char ** argv) {
    if (argc == 2 && strcmp(argv[1], "peaks") == 0) {
        peaks();
        return 0;
    }
    if (argc != 10) {
        return 2;
    }
    int type = 0;
    while (type < GGML_TYPE_COUNT && (ggml_blck_size(type) == 0 || strcmp(ggml_type_name(type), argv[1]) != 0)) {
        type++;
    }
    int size[8];
    for (int i = 0; i < 8; i++) {
        size[i] = atoi(argv[i + 2]);
    }
    const int d = size[0], r = size[1], m = size[2], n = size[3], k = size[4], T = size[5], terms = size[6], repetitions = size[7];

    struct ggml_context * ctx = ggml_init((struct ggml_init_params) { 16*ggml_tensor_overhead() + ggml_graph_overhead(), NULL, true });
    struct ggml_tensor * basis = ggml_new_tensor_3d(ctx, type, d, r, m);
    struct ggml_tensor * mix   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, m, n);
    struct ggml_tensor * x     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d, 1, T);
    struct ggml_tensor * ids   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, k, T);
    struct ggml_tensor * z     = ggml_mobe_proj(ctx, basis, mix, x, ids, GGML_MOBE_ACTIVATION_TANH);
    struct ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, z);

    ggml_backend_load_all_from_path(getenv("MOBE_LIB"));
    ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL);
    void (*set_n_threads)(ggml_backend_t, int) = (void (*)(ggml_backend_t, int)) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(ggml_backend_get_device(backend)), "ggml_backend_set_n_threads");
    set_n_threads(backend, 1);
    ggml_backend_alloc_ctx_tensors(ctx, backend);

    srand(1);
    float * row = malloc((d > T*d ? d : T*d)*sizeof(float));
    char  * packed = malloc(basis->nb[1]);
    for (int i = 0; i < T*d; i++) {
        row[i] = rand()*(2.0f/RAND_MAX) - 1.0f;
    }
    ggml_backend_tensor_set(x, row, 0, ggml_nbytes(x));
    for (int j = 0; j < r*m; j++) {
        if (j < 64) { // the rest repeats: values do not change the time
            for (int i = 0; i < d; i++) {
                row[i] = rand()*(2.0f/RAND_MAX) - 1.0f;
            }
            if (type == GGML_TYPE_F32) {
                memcpy(packed, row, d*sizeof(float));
            } else {
                ggml_quantize_chunk(type, row, packed, 0, 1, d, NULL);
            }
        }
        ggml_backend_tensor_set(basis, packed, j*basis->nb[1], basis->nb[1]);
    }
    for (int e = 0; e < n; e++) {
        for (int j = 0; j < m; j++) {
            const float a = terms && (5*j + 7*(e%17) + e)%m >= terms ? 0.0f : rand()*(1.0f/RAND_MAX) - 0.4f;
            ggml_backend_tensor_set(mix, &a, (e*m + j)*sizeof(float), sizeof(float));
        }
    }
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < k; i++) {
            const int32_t e = (i*(n/k) + t*5 + t*t%7)%n; // distinct within a token, all experts used within a prompt
            ggml_backend_tensor_set(ids, &e, (t*k + i)*sizeof(e), sizeof(e));
        }
    }
    const double begin = cpu_seconds();
    do { // the first runs are slower: memory is mapped, the core's clock rises
        ggml_backend_graph_compute(backend, graph);
    } while (cpu_seconds() - begin < 0.2);
    for (int i = 0; i < repetitions; i++) {
        const double start = cpu_seconds();
        ggml_backend_graph_compute(backend, graph);
        printf("%.9f\n", cpu_seconds() - start);
    }
    return 0;
}
