#include "mobe-rows16-layout.h"

#include <string.h>

// The first byte is the lowest, as on every processor that has this product. Each repack_* writes the four bytes of a row into
// each vector of a block, and returns the block's scale.
static inline uint32_t word(const uint8_t * p) { uint32_t w; memcpy(&w, p, sizeof(w)); return w; }

static ggml_half repack_bits1(const block_q1_0 * x, uint8_t * q) {
    for (int v = 0; v < QK1_0/32; v++, q += VECTOR) {
        for (int i = 0; i < 4; i++) { // each fourth bit, beginning with i
            uint32_t t = word(x->qs + 4*v) >> i & 0x11111111;
            t = (t | t >> 3) & 0x03030303;
            t = (t | t >> 6) & 0x000f000f;
            q[i] = t | t >> 12;
        }
    }
    return x->d;
}

static ggml_half repack_bits2(const block_q2_0 * x, uint8_t * q) {
    for (int v = 0; v < QK2_0/16; v++, q += VECTOR) { // four bytes of four codes are transposed
        uint32_t t = word(x->qs + 4*v);
        const uint32_t a = (t ^ t >> 6) & 0x00cc00cc;
        t ^= a ^ a << 6;
        const uint32_t b = (t ^ t >> 12) & 0x0000f0f0;
        t ^= b ^ b << 12;
        memcpy(q, &t, sizeof(t));
    }
    return x->d;
}

static ggml_half repack_ternary(const block_tq2_0 * x, uint8_t * q) {
    for (int v = 0; v < QK_K/16; v++, q += VECTOR) {
        const uint8_t * from = x->qs + v/8*32 + v%2*16;
        uint32_t t = 0;
        for (int i = 0; i < 4; i++) { t |= (word(from + 4*i) >> 2*(v/2%4) & 0x03030303) << 2*i; }
        memcpy(q, &t, sizeof(t));
    }
    return x->d;
}

static ggml_half repack_trits(const block_tq1_0 * x, uint8_t * q) {
    static const uint8_t pow3[5] = { 1, 3, 9, 27, 81 };
    uint8_t codes[QK_K], * c = codes;
#define DIGIT(byte, n) ((uint8_t) ((byte)*pow3[n])*3 >> 8)
    for (int n = 0; n < 5; n++) { for (int m = 0; m < 32; m++) { *c++ = DIGIT(x->qs[m], n); } }
    for (int n = 0; n < 5; n++) { for (int m = 0; m < 16; m++) { *c++ = DIGIT(x->qs[32 + m], n); } }
    for (int n = 0; n < 4; n++) { for (int m = 0; m < 4; m++) { *c++ = DIGIT(x->qh[m], n); } }
#undef DIGIT
    c = codes;
    for (int v = 0; v < 12; v++, q += VECTOR, c += 20) { // no byte runs over: 2 + 3*2 + ... = 242
        const uint32_t t = word(c) + 3*word(c + 4) + 9*word(c + 8) + 27*word(c + 12) + 81*word(c + 16);
        memcpy(q, &t, sizeof(t));
    }
    const uint32_t t = word(c) | word(c + 4) << 2 | word(c + 8) << 4 | word(c + 12) << 6;
    memcpy(q, &t, sizeof(t));
    return x->d;
}

static ggml_half repack_block(enum kind kind, const void * from, int64_t i, uint8_t * q) {
    switch (kind) {
        case BITS1:   return repack_bits1((const block_q1_0 *) from + i, q);
        case BITS2:   return repack_bits2((const block_q2_0 *) from + i, q);
        case TERNARY: return repack_ternary((const block_tq2_0 *) from + i, q);
        default:      return repack_trits((const block_tq1_0 *) from + i, q);
    }
}

void mobe_rows16_repack(enum ggml_type type, const void * from, void * to, int64_t rows, int64_t columns) {
    const enum kind kind = kind_of(type);
    const layout l = LAYOUTS[kind];
    const int64_t blocks = columns/l.block;
    for (int64_t strip = 0; strip < rows/ROWS; strip++) {
        uint8_t * p = (uint8_t *) to + strip*ROWS*ggml_row_size(type, columns);
        for (int64_t b = 0; b < blocks; b++) {
            const int pair = b/2*2 + 1 < blocks ? 2 : 1; // blocks whose scales lie together
            ggml_half * d = (ggml_half *) p + b%2*ROWS;
            uint8_t *   q = p + pair*SCALES + b%2*l.vectors*VECTOR;
            for (int row = 0; row < ROWS; row++) {
                d[row] = repack_block(kind, from, (strip*ROWS + row)*blocks + b, q + 4*row);
            }
            p += b%2 == pair - 1 ? pair*(SCALES + l.vectors*VECTOR) : 0;
        }
    }
}
