// Products of matrices in one to two bits (q1_0, q2_0, tq1_0, tq2_0) that a repack buffer keeps with 16 rows interleaved, on x86.
//
// The numbers of a matrix are codes of 0 and more less an offset of one: (code - 1)*d, or (2*bit - 1)*d for q1_0. 64 bytes hold one
// byte of each of 16 rows and four neighbouring columns, and a byte holds the codes of several such columns ("planes"): eight of
// a bit, four of two bits, or five numbers of three values (tq1_0). So a plane is one mask or shift away from 64 unsigned bytes. One
// instruction multiplies these by four inputs and adds them up for 16 rows, and nothing is summed across a vector. The offset is
// the sum of the inputs, which all rows share. Sums are exact integers up to the inputs' own scale (32 columns of q8_0, 256 of q8_K),
// as in the plain product; so the results differ by the order in which such sums are added.
//
// A strip of 16 rows takes as many bytes as in the file and is read from the first to the last: the scales of two blocks, [block][row],
// then their vectors. (With all scales at the end of a strip, processors do not see that it is read in order: half the speed.)

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// whether this file's instruction set has the product for the type, and the rows are whole strips
bool mobe_rows16_takes(enum ggml_type type, int64_t rows);

// to: as many bytes as from, which has rows*columns numbers in the file's order
void mobe_rows16_repack(enum ggml_type type, const void * from, void * to, int64_t rows, int64_t columns);

// s[j] = product of row j < rows of x with y; y: one row in q8_0 (q1_0, q2_0) or q8_K (tq1_0, tq2_0)
void mobe_rows16_gemv(enum ggml_type type, int64_t columns, float * s, const void * x, const void * y, int64_t rows);

// s[i*stride + j], for inputs i < n_inputs, a multiple of 4; y: fours of rows, eight bytes of each in turn (block_q8_0x4, block_q8_Kx4)
void mobe_rows16_gemm(enum ggml_type type, int64_t columns, float * s, int64_t stride, const void * x, const void * y,
                      int64_t n_inputs, int64_t rows);

#ifdef __cplusplus
}
#endif
