// Stretches of quantized rows, taken apart: compiled with the CPU variant's instructions, where libggml's own decoders live in
// ggml-base, which is compiled for the oldest processor.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    MOBE_COLS = 256, // the longest quantization block, so that a stretch starts at a block's start for every type
    MOBE_RUNS = 16,  // runs of columns with a scale of their own in a stretch, at most
};

// A type whose numbers are scale*q - min, scale and min the same for `run` columns. A stretch is n <= MOBE_COLS columns, whole blocks.
struct mobe_format {
    int  run;
    int  zero;  // the middle of the numbers, unless they are wide
    bool wide;  // q is -128 .. 127, not 0 .. 127
    bool shifts; // min is not zero*scale (0, when wide)
    bool twice; // so fine that a coefficient of eight bits would be coarse beside it
    // scale and min [n/run], in eights, the last filled up with zeros; returns a bound of |scale|, close to the largest
    float (*scales)(const void * src, int n, float * scale, float * min);
    void  (*bytes)(const void * src, int n, int8_t * q); // [n]; NULL for nibbles:

    // 16 bytes hold 16 columns in their low and 16 in their high halves, `apart` columns further on; the k-th 16 bytes of a stretch
    // begin at offset + k*stride; what they hold is q + 128 of `table` if there is one
    int apart, offset, stride;
    const uint8_t * table;
};

// the column that the k-th 16 bytes begin with
static inline int mobe_format_column(const struct mobe_format * format, int k) {
    return format->apart == 16 ? 32*k : 64*(k/2) + 16*(k%2);
}

// NULL for types that have no such form here (floats, and those that are tables of whole vectors)
const struct mobe_format * mobe_format_of(enum ggml_type type);

// some decoder of the type to float exists
bool mobe_decodes(enum ggml_type type);

// n columns, whole blocks, as float: the numbers that ggml's decoder gives, but for the rounding of one multiplication
void mobe_decode(enum ggml_type type, const void * src, float * dst, int n);

#ifdef __cplusplus
}
#endif
