// The operator's CPU kernel against its reference, as a program of its own: compiled for instruction sets that this machine may
// lack (and run in an emulator), and with sanitizers, neither of which needs the rest of llama.cpp. build.py compiles it.
//
// It prints what it found and exits with 1 when something is beyond its limit.

#include "ggml-mobe.h"
#include "mobe-cpu.h"
#include "mobe-form.h"
#include "mobe-quad.h"
#include "mobe-vec.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

// ---- what the kernel takes from ggml-cpu

float ggml_table_f32_f16[1 << 16];

void ggml_cpu_fp16_to_fp32(const ggml_fp16_t * x, float * y, int64_t n) { ggml_fp16_to_fp32_row(x, y, n); }
void ggml_cpu_bf16_to_fp32(const ggml_bf16_t * x, float * y, int64_t n) { ggml_bf16_to_fp32_row(x, y, n); }

struct ggml_threadpool { pthread_barrier_t barrier; };
void ggml_barrier(struct ggml_threadpool * pool) { pthread_barrier_wait(&pool->barrier); }

static void dot_q8_0(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc) {
    float a[4096], b[4096], sum = 0.0f;
    ggml_get_type_traits(GGML_TYPE_Q8_0)->to_float(x, a, n);
    ggml_get_type_traits(GGML_TYPE_Q8_0)->to_float(y, b, n);
    for (int i = 0; i < n; i++) {
        sum += a[i]*b[i];
    }
    *s = sum;
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
}

const struct ggml_type_traits_cpu * ggml_get_type_traits_cpu(enum ggml_type type) {
    static struct ggml_type_traits_cpu q8_0 = { .vec_dot = dot_q8_0, .vec_dot_type = GGML_TYPE_Q8_0, .nrows = 1 };
    GGML_ASSERT(type == GGML_TYPE_Q8_0);
    return &q8_0;
}

void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}

// ---- one case

struct test {
    enum ggml_type type;
    int d, r, m, n, k, T, groups;
    bool row_mix, own_x;
    int terms; // non-zero coefficients of an expert, 0: all
    enum ggml_mobe_activation activation;
};

static int failures;

static uint64_t state = 88172645463325252u;

static float gauss(void) {
    float sum = 0.0f;
    for (int i = 0; i < 4; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        sum += (float) (state >> 40)/(1 << 24) - 0.5f;
    }
    return 1.732f*sum;
}

struct job {
    struct ggml_compute_params params;
    struct ggml_tensor * z;
};

static void * run_job(void * job) {
    ggml_compute_forward_mobe_proj(&((struct job *) job)->params, ((struct job *) job)->z);
    return NULL;
}

static void compute(struct ggml_tensor * z, int n_threads, bool use_ref) {
    const size_t size = ggml_mobe_proj_cpu_work_size(z, n_threads);
    struct ggml_threadpool pool;
    pthread_barrier_init(&pool.barrier, NULL, n_threads);
    void * work = malloc(size); // of exactly the size that was asked for: a sanitizer sees what goes beyond
    struct job jobs[8];
    pthread_t threads[8];
    for (int i = 0; i < n_threads; i++) {
        jobs[i] = (struct job) { { i, n_threads, size, work, &pool, use_ref }, z };
        pthread_create(&threads[i], NULL, run_job, &jobs[i]);
    }
    for (int i = 0; i < n_threads; i++) {
        pthread_join(threads[i], NULL);
    }
    pthread_barrier_destroy(&pool.barrier);
    free(work);
}

static double nmse(const float * truth, const float * got, int64_t n) {
    double error = 0.0, all = 1e-300;
    for (int64_t i = 0; i < n; i++) {
        error += ((double) got[i] - truth[i])*((double) got[i] - truth[i]);
        all   += (double) truth[i]*truth[i];
    }
    return error/all;
}

static void expect(bool good, const char * what, const struct test * t, double value) {
    if (!good) {
        failures++;
        printf("FAIL %s: %g  %s d=%d r=%d m=%d n=%d k=%d T=%d groups=%d row_mix=%d own_x=%d terms=%d %s\n", what, value,
            ggml_type_name(t->type), t->d, t->r, t->m, t->n, t->k, t->T, t->groups, t->row_mix, t->own_x, t->terms,
            ggml_mobe_activation_name(t->activation));
    }
}

static struct ggml_tensor * tensor(enum ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    struct ggml_tensor * t = calloc(1, sizeof(*t));
    *t = (struct ggml_tensor) { .type = type, .ne = { ne0, ne1, ne2, 1 } };
    t->nb[0] = ggml_type_size(type);
    t->nb[1] = ggml_row_size(type, ne0);
    t->nb[2] = t->nb[1]*ne1;
    t->nb[3] = t->nb[2]*ne2;
    t->data  = malloc(t->nb[3]);
    return t;
}

static void drop(struct ggml_tensor * t) {
    free(t->data);
    free(t);
}

// rows row0 .. r of n_expert experts, by the functions that the operator forms them with: dst[n_expert][r - row0][d]
static void form(const struct mobe_former * former, const int32_t * experts, int n_expert, int64_t row0, float * dst) {
    const struct ggml_mobe_shape * s = &former->shape;
    struct mobe_row row;
    char * memory = aligned_alloc(64, mobe_row_place(former, NULL, n_expert, NULL));
    mobe_row_place(former, &row, n_expert, memory);
    for (int64_t rho = row0; rho < s->r; rho++) {
        mobe_mix_gather(former, &row.list, row.terms, experts, NULL, n_expert, rho, 1);
        for (int64_t c0 = 0; c0 < s->d; c0 += MOBE_COLS) {
            const int64_t n = s->d - c0 < MOBE_COLS ? s->d - c0 : MOBE_COLS;
            float values[8*MOBE_COLS] MOBE_ALIGNED;
            mobe_tile_decode(former, &row.tile, &row.list, rho, c0, n);
            mobe_tile_combine(former, row.terms, n_expert, &row.tile, n, values, MOBE_COLS);
            for (int i = 0; i < n_expert; i++) {
                memcpy(dst + ((i*(s->r - row0)) + rho - row0)*s->d + c0, values + i*MOBE_COLS, n*sizeof(float));
            }
        }
    }
    free(memory);
}

// returns the normalized squared error
static double check(const struct test * t) {
    const int m_group = t->m/t->groups;
    struct ggml_tensor * basis = tensor(t->type, t->d, t->r, t->m);
    struct ggml_tensor * mix   = t->row_mix ? tensor(GGML_TYPE_F32, t->r, m_group, t->n) : tensor(GGML_TYPE_F32, m_group, t->n, 1);
    struct ggml_tensor * x     = tensor(GGML_TYPE_F32, t->d, t->own_x ? t->k : 1, t->T);
    struct ggml_tensor * ids   = tensor(GGML_TYPE_I32, t->k, t->T, 1);
    struct ggml_tensor * z     = tensor(GGML_TYPE_F32, t->r, t->k, t->T);
    z->op     = GGML_OP_MOBE_PROJ;
    z->src[0] = basis;
    z->src[1] = mix;
    z->src[2] = x;
    z->src[3] = ids;
    z->op_params[0] = (int32_t) t->activation;

    float * row = malloc(t->d*sizeof(float));
    float * ones = malloc(t->d*sizeof(float));
    for (int64_t i = 0; i < t->r*t->m; i++) {
        for (int c = 0; c < t->d; c++) {
            row[c] = gauss();
            ones[c] = 1.0f;
        }
        char * to = (char *) basis->data + i*basis->nb[1];
        if (t->type == GGML_TYPE_F32) {
            memcpy(to, row, t->d*sizeof(float));
        } else {
            ggml_quantize_chunk(t->type, row, to, 0, 1, t->d, ones);
        }
    }
    free(ones);
    free(row);
    for (int64_t i = 0; i < ggml_nelements(mix); i++) {
        const int64_t j = i/(t->row_mix ? t->r : 1)%m_group, e = i/(t->row_mix ? t->r : 1)/m_group;
        ((float *) mix->data)[i] = t->terms && (j + e)%m_group >= t->terms ? 0.0f : gauss()/sqrtf((float) m_group);
    }
    for (int64_t i = 0; i < ggml_nelements(x); i++) {
        ((float *) x->data)[i] = gauss();
    }
    for (int i = 0; i < t->T; i++) {
        for (int s = 0; s < t->k; s++) {
            ((int32_t *) ids->data)[i*t->k + s] = (s*(t->n/t->k) + i*i)%t->n;
        }
    }
    expect(ggml_mobe_proj_cpu_supports(z), "supports", t, 0);

    const int64_t n = ggml_nelements(z);
    float * truth = malloc(n*sizeof(float));
    float * one   = malloc(n*sizeof(float));
    compute(z, 1, true);
    memcpy(truth, z->data, n*sizeof(float));
    memset(z->data, 0xff, n*sizeof(float));
    compute(z, 1, false);
    memcpy(one, z->data, n*sizeof(float));
    const double error = nmse(truth, one, n);
    expect(error < (ggml_is_quantized(t->type) ? 2e-4 : 1e-10), "error", t, error);
    for (int n_threads = 2; n_threads <= 3; n_threads++) {
        memset(z->data, 0xff, n*sizeof(float));
        compute(z, n_threads, false);
        expect(memcmp(one, z->data, n*sizeof(float)) == 0, "threads change the result", t, n_threads);
    }

    // formed rows, times x, are the first token's results; each expert's do not depend on the others in the call
    const int32_t * first = ids->data;
    float * rows  = malloc((size_t) t->k*t->r*t->d*sizeof(float));
    float * alone = malloc((size_t) t->r*t->d*sizeof(float));
    struct mobe_former former;
    mobe_former_init(&former, basis, mix, ggml_mobe_proj_shape(basis, mix, x, ids), t->activation);
    form(&former, first, t->k, 0, rows);
    float * product = malloc((size_t) t->k*t->r*sizeof(float));
    for (int s = 0; s < t->k; s++) {
        for (int rho = 0; rho < t->r; rho++) {
            double sum = 0.0;
            for (int c = 0; c < t->d; c++) {
                sum += (double) rows[((int64_t) s*t->r + rho)*t->d + c]*((float *) x->data)[(t->own_x ? s*t->d : 0) + c];
            }
            product[s*t->r + rho] = (float) sum;
        }
    }
    expect(nmse(truth, product, (int64_t) t->k*t->r) < (ggml_is_quantized(t->type) ? 2e-4 : 1e-10), "formed rows", t, 0);
    form(&former, first + t->k - 1, 1, 1, alone);
    expect(memcmp(alone, rows + ((int64_t) (t->k - 1)*t->r + 1)*t->d, (size_t) (t->r - 1)*t->d*sizeof(float)) == 0,
        "formed rows depend on the other experts", t, 0);

    free(product);
    free(alone);
    free(rows);
    free(one);
    free(truth);
    drop(z);
    drop(ids);
    drop(x);
    drop(mix);
    drop(basis);
    return error;
}

// ---- f over the range of floats: every step-th, and the special ones

static uint64_t step = 4099;

static double f_true(double v, int f) { return f == 0 ? tanh(v) : v/(1.0 + exp(-v)); }

static void check_f(const char * name, mobe_vec (*get)(mobe_vec), int f, double limit) {
    double worst = 0.0;
    float  at    = 0.0f;
    for (uint64_t bits = 0; bits < ((uint64_t) 1 << 32) + step; bits += step) {
        const uint32_t specials[] = { 0x7f800000, 0xff800000, 0x7fc00000, 0x80000000, 0x00000001, 0x7f7fffff, 0xff7fffff };
        const bool last = bits >> 32 != 0;
        for (int i = 0; i < (last ? 7 : 1); i++) {
            const uint32_t pattern = last ? specials[i] : (uint32_t) bits;
            float v, got[MOBE_VEC];
            memcpy(&v, &pattern, sizeof(v));
            mobe_vec_store(got, get(mobe_vec_set(0.0f) + v));
            const double truth = f_true(v, f);
            double error = isnan(truth) ? !isnan(got[0]) : fabs(got[0] - truth)/(fabs(truth) + 1e-30);
            if (isnan(v) != (isnan(got[0]) != 0) && !(isinf(v) && f == 1)) {
                error = 1.0; // NaN stays NaN and nothing else becomes it; silu(-inf) may be either, as its formula is
            }
            if (isinf(v) && f == 1) {
                error = v > 0 && got[0] != v;
            }
            if (fabs(truth) < 1e-30 && fabs(got[0]) < 1e-28) {
                error = 0.0; // below 10^-30 it is rounded to less than nothing that matters
            }
            if (!(error <= worst)) {
                worst = error;
                at    = v;
            }
        }
    }
    printf("%-10s largest error relative to the value %.2e, at %g\n", name, worst, at);
    if (!(worst <= limit)) {
        failures++;
        printf("FAIL %s: beyond %g\n", name, limit);
    }
}

static mobe_vec quick_tanh(mobe_vec v) { return mobe_vec_tanh_quick(v); }
static mobe_vec quick_silu(mobe_vec v) { return mobe_vec_silu_quick(v); }
static mobe_vec full_tanh(mobe_vec v) { return mobe_vec_tanh(v); }
static mobe_vec full_silu(mobe_vec v) { return mobe_vec_silu(v); }

int main(int argc, char ** argv) {
    const bool few = argc > 1 && strcmp(argv[1], "few") == 0; // where an emulator or a sanitizer makes it slow
    step = few ? 65537 : step;

    for (int i = 0; i < 1 << 16; i++) {
        ggml_table_f32_f16[i] = ggml_fp16_to_fp32((ggml_fp16_t) i);
    }
    ((struct ggml_type_traits_cpu *) ggml_get_type_traits_cpu(GGML_TYPE_Q8_0))->from_float =
        ggml_get_type_traits(GGML_TYPE_Q8_0)->from_float_ref;

#if defined(MOBE_QUAD)
    printf("sums of bytes, vectors of %d\n", MOBE_VEC);
#else
    printf("sums of floats, vectors of %d\n", MOBE_VEC);
#endif
    check_f("tanh",       full_tanh,  0, 5e-7);
    check_f("silu",       full_silu,  1, 5e-7);
    check_f("quick tanh", quick_tanh, 0, 5e-4);
    check_f("quick silu", quick_silu, 1, 5e-4);

    double worst[GGML_TYPE_COUNT] = { 0 };
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        const struct ggml_type_traits * traits = ggml_get_type_traits(type);
        if (traits->blck_size == 0 || (type != GGML_TYPE_F32 && (!traits->to_float || !traits->from_float_ref))) {
            continue;
        }
        const int activation = type%GGML_MOBE_ACTIVATION_COUNT;
        const int block      = (int) traits->blck_size;
        const int odd_d      = block == 1 ? 333 : block < 256 ? 256 + block : 512;
        const struct test tests[] = {
            { type, 512,   9,  6, 16, 4,  1, 1, false, false, 0, activation },
            { type, odd_d, 6,  5,  8, 3,  3, 1, false, true,  2, activation },
            { type, odd_d, 33, 6,  6, 3, 20, 2, true,  false, 0, activation },
            { type, 512,   21, 7, 12, 2, 29, 1, false, true,  3, activation },
        };
        for (size_t i = few ? 1 + type%3 : 0; i < sizeof(tests)/sizeof(tests[0]); i += few ? 4 : 1) {
            const double error = check(&tests[i]);
            worst[type] = error > worst[type] ? error : worst[type];
        }
    }
    const enum ggml_type some[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_IQ4_XS };
    for (size_t i = 0; i < sizeof(some)/sizeof(some[0]); i++) {
        for (int flags = few ? (int) i%5 : 0; flags < 2*3*3; flags += few ? 5 : 1) {
            const int T = (int[]) { 1, 4, 40 }[flags/2%3];
            const struct test t = { some[i], 256, 19, 8, 12, 3, T, 1 + (flags + (int) i)%2, flags%2, flags%3 == 0, 0, flags/6 };
            const double error = check(&t);
            worst[t.type] = error > worst[t.type] ? error : worst[t.type];
        }
    }
    // more bases than sums of two-byte coefficients have room for
    const struct test many = { GGML_TYPE_Q8_0, 512, 33, 260, 16, 4, 3, 1, false, false, 0, GGML_MOBE_ACTIVATION_NONE };
    const double error = check(&many);
    worst[many.type] = error > worst[many.type] ? error : worst[many.type];

    printf("largest normalized squared error:");
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        if (worst[type] > 0.0) {
            printf(" %s %.1e", ggml_type_name(type), worst[type]);
        }
    }
    printf("\n%s\n", failures ? "FAILED" : "all good");
    return failures != 0;
}
