// Taking two neighbouring quantized bases apart for sums of integers (mobe-pair.h).

#pragma once

#include "mobe-dequant.h"

#include <stdint.h>

// dst[c] = the numbers of both bases at column c as 16-bit multiples of their units, `even` in the low half. NULL for a basis that is not
// read and counts as zeros, with a unit of 0; one of them is not NULL. n_cols <= MOBE_COLS columns, whole blocks; dst is 64-byte
// aligned and MOBE_COLS long. format is mobe_format_of(type).
void mobe_pair_decode(
        enum ggml_type type, const struct mobe_format * format, const char * even, const char * odd, int n_cols, int32_t * dst,
        float * unit_even, float * unit_odd);
