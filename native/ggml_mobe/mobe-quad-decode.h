// Taking four quantized bases apart for sums of bytes (mobe-quad.h).

#pragma once

#include "mobe-dequant.h"

#include <stdint.h>

// Runs of columns with a scale of their own in a stretch: 16 of 16 columns, or 8 of 32.
static inline int mobe_run(const struct mobe_format * format) { return format ? format->run : 16; }
// eight bits and a sign, rather than 0 .. 127
static inline bool mobe_wide(const struct mobe_format * format) { return !format || format->wide; }

// Whether numbers of a stretch are shifted by something of their own: those of q4_0, say, lie around the middle.
static inline bool mobe_shifts(const struct mobe_format * format) { return format && format->shifts; }

enum {
    MOBE_SCALE       = 2047,  // one, in units of scale: coefficients of a byte are no finer
    MOBE_SCALE_TWICE = 32767, // for coefficients of two bytes
    MOBE_SHIFT       = 128,   // one, in units of shift: as many as 16, in twelve bits
};

// What four bases are in a stretch. The number at column c of basis p is most[p]*(scale*(q - zero) + shift), with
//   q     = data[4*c + p], as mobe-quad.h wants it
//   zero  = the middle of the numbers, the same for all: mobe_zero
//   scale = scale[4*run + p]/MOBE_SCALE, or MOBE_SCALE_TWICE
//   shift = shift[4*run + p]/MOBE_SHIFT, if mobe_shifts
struct mobe_four {
    uint8_t * data;  // [4*MOBE_COLS], 64-byte aligned
    int16_t * scale; // [4*MOBE_RUNS], too
    int16_t * shift; // [4*MOBE_RUNS], too
    float   * most;  // [4]
};

float mobe_zero(const struct mobe_format * format);

// n_cols <= MOBE_COLS columns, whole blocks. A basis that is not read (NULL) has scales and shifts of 0, whatever bytes stand in
// for it; one of them is not NULL. format is mobe_format_of(type). twice: scales for coefficients of two bytes.
void mobe_quad_decode(
        enum ggml_type type, const struct mobe_format * format, bool twice, const char * const * src, int n_cols, const struct mobe_four * dst);
