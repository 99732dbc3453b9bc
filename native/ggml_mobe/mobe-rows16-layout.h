// What mobe-rows16.c and mobe-rows16-repack.c know of a strip (see mobe-rows16.h).

#pragma once

#include "mobe-rows16.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-impl.h"

// rows of a strip, bytes of what is decoded at once, bytes of a block's scales
#define ROWS 16
#define VECTOR 64
#define SCALES (ROWS*sizeof(ggml_half))

// q1_0, q2_0, tq2_0, tq1_0
enum kind { BITS1, BITS2, TERNARY, TRITS };

typedef struct {
    int block;   // columns with the same scale
    int unit;    // columns whose inputs have the same scale
    int vectors; // of a block
} layout;

static const layout LAYOUTS[] = {
    [BITS1]   = { QK1_0, QK8_0, 4 },
    [BITS2]   = { QK2_0, QK8_0, 4 },
    [TERNARY] = { QK_K, QK_K, 16 },
    [TRITS]   = { QK_K, QK_K, 13 }, // twelve of five planes, one of four
};

// -1 for other types
static inline int kind_of(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q1_0:  return BITS1;
        case GGML_TYPE_Q2_0:  return BITS2;
        case GGML_TYPE_TQ2_0: return TERNARY;
        case GGML_TYPE_TQ1_0: return TRITS;
        default:              return -1;
    }
}
