// Forming rows of f( sum_j alpha_j B_j ): the part of the CPU kernel that knows what a basis is made of.
//
// A tile is a stretch of MOBE_COLS columns of one row of the bases on a list. It is taken apart once and lies in the first-level
// cache while experts combine it, one after the other. What comes out for an expert depends on nothing but its own
// coefficients and the bases: not on the other experts, the list, the threads or the number of tokens.
//
// Quantized bases are summed as bytes where the processor has instructions for it (mobe-quad.h). A tile has their numbers as they are
// in the file, and the scales of each run of 32 (or 16) columns apart from them. An expert's coefficients, times the scales of
// a run, are rounded to 8 bits, of which the largest uses nearly all: as exact as what ggml makes of a matrix in q8_0 or of the inputs of a
// product. q8_0 bases, for which that would be coarse, get 16 bits in two rounds. What belongs to the middle of the numbers
// is added in float, so that only the distance from there is rounded. Squared error relative to the values: 1e-5 to 6e-5, q8_0 1e-8.
// Bases in f32, f16 and bf16 are summed as floats, all others too where there are no such instructions.

#pragma once

#include "ggml-mobe.h"
#include "mobe-dequant.h"

// experts that share loads, at most
#if defined(__AVX512F__)
enum { MOBE_MANY = 8 };
#else
enum { MOBE_MANY = 2 };
#endif

// what to form from; the same for all threads of a call
struct mobe_former {
    const struct ggml_tensor * basis;
    const float              * mix;
    struct ggml_mobe_shape     shape;
    enum ggml_mobe_activation  activation;
    const struct mobe_format * format;
    bool    bytes;  // sums of bytes, not of floats
    bool    twice;  // with coefficients of two bytes
    float   zero;   // what numbers of zero lie in a tile as
    size_t  stretch; // bytes of MOBE_COLS columns
    int64_t n_part; // parts of a group: a part is four bases on a list for bytes (the last may have fewer), else one
    int64_t n_pad;  // bases of a group, rounded up to whole vectors of 16 bits
};

void mobe_former_init(
        struct mobe_former * former, const struct ggml_tensor * basis, const struct ggml_tensor * mix,
        struct ggml_mobe_shape shape, enum ggml_mobe_activation activation);

// The bases that some experts mix, each group's in ascending order.
struct mobe_list {
    int32_t * n;     // [groups]
    int32_t * basis; // [groups][m_group] n of them, numbered within the group
    int32_t * place; // [groups][m_group] where on the list a basis is, -1: not there
};

// What one expert mixes (in one row, when the mix is not row-wise), in the order of a list. Parts with nothing but zero
// coefficients are not listed.
struct mobe_terms {
    int64_t   group;
    int64_t   n;
    int32_t * part; // [n_part] ascending, n of them
    float   * coef; // [n_pad]  zeros from the list's end on
};

struct mobe_tile {
    const struct mobe_list * list;
    char    * data;  // [groups][n_part] bytes [MOBE_COLS][4], or floats [MOBE_COLS]
    int16_t * scale; // [groups][n_part][MOBE_RUNS][4] bytes only: see mobe_four, as for the next two
    int16_t * shift; // [groups][n_part][MOBE_RUNS][4]
    float   * most;  // [groups][n_pad]
    int16_t * shares; // [n_pad/32][MOBE_MANY][32] room for the coefficients of a few experts: as fractions of the largest
    int8_t  * coefs;  // times scales
};

// Each lays its arrays out from memory on (64-byte aligned) and returns the bytes used, a multiple of 64; NULL only counts.
size_t mobe_list_place(const struct mobe_former * former, struct mobe_list * list, char * memory);
size_t mobe_terms_place(const struct mobe_former * former, struct mobe_terms * terms, char * memory);
size_t mobe_tile_place(const struct mobe_former * former, struct mobe_tile * tile, char * memory);

// The list and the terms [n_rows][n_expert] of experts in rows rho .. rho + n_rows, of experts[index[i]] when there is an index. When the
// mix is not row-wise, one row serves all.
void mobe_mix_gather(
        const struct mobe_former * former, struct mobe_list * list, struct mobe_terms * terms, const int32_t * experts, const int32_t * index,
        int64_t n_expert, int64_t rho, int64_t n_rows);

// Takes columns c0 .. c0 + n_cols <= c0 + MOBE_COLS of row rho of the bases on a list apart. c0 is a multiple of MOBE_COLS.
void mobe_tile_decode(
        const struct mobe_former * former, struct mobe_tile * tile, const struct mobe_list * list, int64_t rho, int64_t c0, int64_t n_cols);

// dst[e*stride + c] = f( sum ) for n_expert experts, whose terms are in the order of the tile's list, and c < n_cols; up to the next
// multiple of MOBE_VEC something finite. dst and stride are multiples of 64 bytes.
void mobe_tile_combine(
        const struct mobe_former * former, const struct mobe_terms * terms, int n_expert, const struct mobe_tile * tile,
        int64_t n_cols, float * dst, int64_t stride);

// What a few experts mix in one row.
struct mobe_row {
    struct mobe_list    list;
    struct mobe_terms * terms; // [n_expert]
    struct mobe_tile    tile;
};

size_t mobe_row_place(const struct mobe_former * former, struct mobe_row * row, int64_t n_expert, char * memory);
