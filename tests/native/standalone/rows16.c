// The products of mobe-rows16.c against sums in double of the same numbers, as a program of its own (see operator.c).

#include "mobe-rows16.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-impl.h"
#include "ggml-quants.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// what ggml.c takes from the rest of ggml
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}

static uint32_t state = 1;
static uint32_t draw(void) { return state = state*1664525u + 1013904223u, state >> 8; }

// as fours of rows lie: eight bytes of each in turn
static void interleave(bool is_k, const char * rows[4], char * to, int64_t columns) {
    const int unit = is_k ? QK_K : QK8_0;
    const size_t size = is_k ? sizeof(block_q8_K) : sizeof(block_q8_0);
    for (int64_t u = 0; u < columns/unit; u++, to += 4*size) {
        for (int i = 0; i < 4; i++) {
            const block_q8_0 * x = (const block_q8_0 *) (rows[i] + u*size);
            const block_q8_K * k = (const block_q8_K *) (rows[i] + u*size);
            const int8_t * q = is_k ? k->qs : x->qs;
            char * numbers = to + (is_k ? 16 : 8);
            for (int c = 0; c < unit; c++) { numbers[c/8*32 + i*8 + c%8] = q[c]; }
            if (is_k) {
                memcpy(to + 4*i, &k->d, 4);
                for (int j = 0; j < 16; j++) { memcpy(numbers + 4*QK_K + 2*(j/4*16 + i*4 + j%4), &k->bsums[j], 2); }
            } else {
                memcpy(to + 2*i, &x->d, 2);
            }
        }
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9*t.tv_nsec;
}

// the largest error of any product, of the sum of its terms' sizes
static double check(enum ggml_type type, int64_t columns, int64_t rows, int64_t n, bool time) {
    const bool is_k = type == GGML_TYPE_TQ1_0 || type == GGML_TYPE_TQ2_0;
    const struct ggml_type_traits * traits = ggml_get_type_traits(type);
    const size_t row = ggml_row_size(type, columns), size = is_k ? sizeof(block_q8_K) : sizeof(block_q8_0);
    const size_t input = columns/(is_k ? QK_K : QK8_0)*size;

    char * x = malloc(rows*row), * strips = malloc(rows*row);
    for (size_t i = 0; i < rows*row; i++) { x[i] = draw(); } // all codes, those that no encoder writes among them
    const size_t d = type == GGML_TYPE_Q1_0 || type == GGML_TYPE_Q2_0 ? 0 : traits->type_size - 2;
    for (size_t i = 0; i < rows*row; i += traits->type_size) {
        const ggml_half scale = GGML_FP32_TO_FP16((draw()%2000)/1000.0f - 1.0f);
        memcpy(x + i + d, &scale, 2);
    }
    float * w = malloc(rows*columns*sizeof(float)), * f = malloc(n*columns*sizeof(float)), * s = malloc(n*(rows + 3)*sizeof(float));
    traits->to_float(x, w, rows*columns);
    const double start = now();
    mobe_rows16_repack(type, x, strips, rows, columns);
    if (time) { printf("%s repacked: %.2f G/s\n", ggml_type_name(type), 1e-9*rows*columns/(now() - start)); }

    char * y = malloc(n*input), * fours = malloc(n*input);
    for (int64_t i = 0; i < n*columns; i++) { f[i] = (draw()%20001)/10000.0f - 1.0f; }
    if (is_k) {
        quantize_row_q8_K_ref(f, (block_q8_K *) y, n*columns);
        dequantize_row_q8_K((block_q8_K *) y, f, n*columns);
    } else {
        quantize_row_q8_0_ref(f, (block_q8_0 *) y, n*columns);
        dequantize_row_q8_0((block_q8_0 *) y, f, n*columns);
    }
    for (int64_t i = 0; i + 4 <= n; i += 4) {
        const char * of[4] = { y + i*input, y + (i + 1)*input, y + (i + 2)*input, y + (i + 3)*input };
        interleave(is_k, of, fours + i*input, columns);
    }

    double worst = 0.0;
    for (int many = 0; many <= (n >= 4); many++) {
        const int64_t stride = rows + 3, inputs = many ? n/4*4 : n;
        for (int64_t i = 0; i < n*stride; i++) { s[i] = NAN; }
        if (many) {
            mobe_rows16_gemm(type, columns, s, stride, strips, fours, inputs, rows);
        } else {
            for (int64_t i = 0; i < n; i++) { mobe_rows16_gemv(type, columns, s + i*stride, strips, y + i*input, rows); }
        }
        for (int64_t i = 0; i < inputs; i++) {
            for (int64_t j = 0; j < stride; j++) {
                if (j >= rows) {
                    worst = isnan(s[i*stride + j]) ? worst : INFINITY; // wrote past its rows
                    continue;
                }
                double sum = 0.0, all = 1e-30;
                for (int64_t c = 0; c < columns; c++) {
                    sum += (double) w[j*columns + c]*f[i*columns + c];
                    all += fabs((double) w[j*columns + c]*f[i*columns + c]);
                }
                const double error = fabs(sum - s[i*stride + j])/all;
                worst = error <= worst ? worst : isnan(error) ? INFINITY : error;
            }
        }
        if (time) {
            double best = 1e9;
            for (int r = 0; r < 20; r++) {
                const double start = now();
                if (many) {
                    mobe_rows16_gemm(type, columns, s, stride, strips, fours, inputs, rows);
                } else {
                    mobe_rows16_gemv(type, columns, s, strips, y, rows);
                }
                best = fmin(best, now() - start);
            }
            printf("%s %s: %.1f GMAC/s\n", ggml_type_name(type), many ? "many" : "one", 1e-9*(many ? inputs : 1)*rows*columns/best);
        }
    }
    free(x), free(strips), free(w), free(f), free(s), free(y), free(fours);
    return worst;
}

// with "time", also how fast it is
int main(int argc, char ** argv) {
    const bool time = argc > 1 && strcmp(argv[1], "time") == 0;
    const enum ggml_type types[] = { GGML_TYPE_Q1_0, GGML_TYPE_Q2_0, GGML_TYPE_TQ1_0, GGML_TYPE_TQ2_0 };
    const struct { int columns, rows, n; } shapes[] = {
        { 256, 16, 1 }, { 768, 48, 7 }, { 2048, 32, 12 }, { 4096, 16, 4 }, { 4352, 16, 9 }, { 12544, 16, 13 }, { 512, 0, 4 },
    };
    int taken = 0;
    bool bad = false;
    for (int t = 0; t < 4; t++) {
        if (mobe_rows16_takes(types[t], 24)) {
            printf("%s: takes 24 rows\n", ggml_type_name(types[t]));
            bad = true;
        }
        if (!mobe_rows16_takes(types[t], 32)) {
            printf("%s: not taken\n", ggml_type_name(types[t]));
            continue;
        }
        taken++;
        for (int i = 0; i < (int) (sizeof(shapes)/sizeof(shapes[0])); i++) {
            const double error = check(types[t], shapes[i].columns, shapes[i].rows, shapes[i].n, false);
            if (error > 1e-6) {
                printf("%s, %d columns, %d rows, %d inputs: error %g\n", ggml_type_name(types[t]), shapes[i].columns, shapes[i].rows,
                       shapes[i].n, error);
                bad = true;
            }
        }
        if (time) { check(types[t], 2048, 768, 32, true); }
    }
    if (!bad) { printf("all good, %d types\n", taken); }
    return bad;
}
