// Forming rows of f( sum_j alpha_j B_j ): the part of the CPU kernel that knows what a basis is made of.
//
// A tile is a stretch of MOBE_COLS columns of one row of all bases that are needed. It is taken apart once and lies in the first-level
// cache while the experts in use combine it, one after the other. What comes out for an expert depends on nothing but its own
// coefficients and the bases: not on the other experts, the threads or the number of tokens.
//
// Quantized bases are summed as integers where the processor has instructions for it (mobe-pair.h): in a tile the numbers of a basis are
// 16-bit multiples of a unit, so chosen that the largest is about 2^15; an expert's coefficients, each times the unit of its
// basis, become 16-bit multiples of a unit of their own, so chosen that their absolute sum is below 2^15, and no sum can
// overflow. Squared error relative to the values: 1e-8 for bases of up to 6 bits, 1.3e-6 for q8_0, whose own rounding it is.
// Bases in f32, f16 and bf16 are summed as floats, all others too where there are no such instructions.

#pragma once

#include "ggml-mobe.h"
#include "mobe-dequant.h"

// what to form from; the same for all threads of a call
struct mobe_former {
    const struct ggml_tensor * basis;
    const float              * mix;
    struct ggml_mobe_shape     shape;
    enum ggml_mobe_activation  activation;
    bool    ints;
    int64_t n_part; // parts of a group: a part is a pair of neighbouring bases for integers (the last may lack a partner), else one basis
    int64_t n_pad;  // n_part, rounded up such that arrays of parts end at the end of a vector
};

void mobe_former_init(
        struct mobe_former * former, const struct ggml_tensor * basis, const struct ggml_tensor * mix,
        struct ggml_mobe_shape shape, enum ggml_mobe_activation activation);

// What one expert mixes (in one row, when the mix is row-wise). Parts with nothing but zero coefficients are not listed.
struct mobe_terms {
    int64_t   group;
    int64_t   n;
    int32_t * part; // [n_part] ascending, n of them
    float   * even; // [n_pad]  coefficients of all parts: of the first basis of a pair, or of the basis
    float   * odd;  // [n_pad]  of the second basis of a pair
};

struct mobe_tile {
    int32_t * data; // [groups][n_part][MOBE_COLS] pairs of 16-bit numbers, or floats
    float   * even; // [groups][n_pad] integers only: units of the first bases of the pairs
    float   * odd;
};

// Each lays its arrays out from memory on (64-byte aligned) and returns the bytes used, a multiple of 64; NULL only counts.
size_t mobe_terms_place(const struct mobe_former * former, struct mobe_terms * terms, char * memory);
size_t mobe_tile_place(const struct mobe_former * former, struct mobe_tile * tile, char * memory);

// The coefficients of an expert for row rho (any row when the mix is not row-wise); marks the bases that it mixes in needed[m].
void mobe_terms_gather(
        const struct mobe_former * former, struct mobe_terms * terms, int64_t expert, int64_t rho, bool * needed);

// Takes columns c0 .. c0 + n_cols <= c0 + MOBE_COLS of row rho of the needed bases apart. c0 is a multiple of MOBE_COLS.
void mobe_tile_decode(
        const struct mobe_former * former, struct mobe_tile * tile, const bool * needed, int64_t rho, int64_t c0, int64_t n_cols);

// dst[e*stride + c] = f( sum ) for n_expert experts and c < n_cols; up to the next multiple of MOBE_VEC something finite. dst and stride
// are multiples of 64 bytes.
void mobe_tile_combine(
        const struct mobe_former * former, const struct mobe_terms * terms, int n_expert, const struct mobe_tile * tile,
        int64_t n_cols, float * dst, int64_t stride);
