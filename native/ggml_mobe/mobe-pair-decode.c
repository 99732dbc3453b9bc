#include "mobe-pair-decode.h"
#include "mobe-pair.h"

#if defined(MOBE_PAIR)

#include <math.h>
#include <string.h>

enum { MOBE_UNITS = 32600 }; // units of the largest number of a basis in a tile: below 2^15 by more than roundings add up to

typedef uint32_t mobe_eight __attribute__((vector_size(32)));

// Scales and minima of a stretch of one basis as 16-bit multiples of its unit, in the low half of each number.
struct mobe_units {
    mobe_eight scale[2], min[2]; // the second only for runs of 16 columns
    float      unit;
};

// the nearest integers to by times eight floats, their low 16 bits
static inline mobe_eight mobe_eight_round(const float * p, float by) {
    typedef float floats __attribute__((vector_size(32)));
    floats v;
    memcpy(&v, p, sizeof(v));
    return (mobe_eight) (v*by + 12582912.0f); // 1.5*2^23: adding it rounds to an integer, in the low bits
}

MOBE_INLINE struct mobe_units mobe_units_read(const struct mobe_format * format, const char * src, int n_cols, int run, bool table) {
    struct mobe_units u = { 0 };
    if (src) {
        float scale[MOBE_RUNS], min[MOBE_RUNS];
        const float most = format->scales(src, n_cols, scale, min);
        const float to   = most > 0.0f ? MOBE_UNITS/most : 0.0f;
        u.unit = most*(1.0f/MOBE_UNITS);
        for (int i = 0; i < (run == 16 ? 2 : 1); i++) {
            u.scale[i] = mobe_eight_round(scale + 8*i, to);
            u.min[i]   = mobe_eight_round(min + 8*i, to) + (table ? u.scale[i]*128 : 0*u.scale[i]); // looked up: q + 128
        }
    }
    return u;
}

// scale and min of two bases side by side
MOBE_INLINE void mobe_units_join(const struct mobe_units * even, const struct mobe_units * odd, int run, int32_t * scale, int32_t * min) {
    for (int i = 0; i < (run == 16 ? 2 : 1); i++) {
        const mobe_eight s = (even->scale[i] & 0xffff) | (odd->scale[i] << 16);
        const mobe_eight m = (even->min[i] & 0xffff)   | (odd->min[i] << 16);
        memcpy(scale + 8*i, &s, sizeof(s));
        memcpy(min   + 8*i, &m, sizeof(m));
    }
}

static int32_t mobe_two(int16_t even, int16_t odd) { return (int32_t) ((uint32_t) (uint16_t) even | (uint32_t) (uint16_t) odd << 16); }

// types that are not taken apart: through floats
static float mobe_half_pair_from_floats(enum ggml_type type, const char * src, int64_t n_cols, int16_t * dst) {
    float values[MOBE_COLS];
    memset(dst, 0, MOBE_COLS*sizeof(*dst));
    if (!src) {
        return 0.0f;
    }
    mobe_decode(type, src, values, (int) n_cols);
    float most = 0.0f;
    for (int64_t c = 0; c < n_cols; c++) {
        most = fabsf(values[c]) > most ? fabsf(values[c]) : most;
    }
    const float to = most > 0.0f ? MOBE_UNITS/most : 0.0f;
    for (int64_t c = 0; c < n_cols; c++) {
        const float v = values[c]*to;
        dst[c] = (int16_t) (v < 0.0f ? v - 0.5f : v + 0.5f);
    }
    return most/MOBE_UNITS;
}

MOBE_INLINE void mobe_pair_chunk(
        const uint8_t * q_even, const uint8_t * q_odd, int k, const int32_t * scale, const int32_t * min, int apart,
        const uint8_t * table, int32_t * dst) {
    const int c = apart == 16 ? 32*k : 64*(k/2) + 16*(k%2);
    const int h = c + apart;
    const mobe_pair scale_low = mobe_pair_set(scale[c/32]), scale_high = mobe_pair_set(scale[h/32]);
    const mobe_pair min_low   = mobe_pair_set(min[c/32]),   min_high   = mobe_pair_set(min[h/32]);
    for (int i = 0; i < 16; i += MOBE_VEC) {
        const mobe_pair both = mobe_pair_join_unsigned(q_even + i, q_odd + i);
        mobe_pair low  = mobe_pair_low_nibbles(both);
        mobe_pair high = mobe_pair_high_nibbles(both);
        if (table) {
            low  = mobe_pair_look_up(table, low);
            high = mobe_pair_look_up(table, high);
        }
        mobe_pair_store(dst + c + i, mobe_pair_affine(low, scale_low, min_low));
        mobe_pair_store(dst + h + i, mobe_pair_affine(high, scale_high, min_high));
    }
}

// A pair of bases, or one alone: what is not read (NULL) counts as zeros, whatever bytes stand in for it. apart, run and table are
// constants where these are called.
MOBE_INLINE void mobe_pair_decode_nibbles(
        const struct mobe_format * format, const char * even, const char * odd, int n_cols, int apart, const uint8_t * table,
        int32_t * dst, float * unit_even, float * unit_odd) {
    const struct mobe_units units[2] = {
        mobe_units_read(format, even, n_cols, 32, table != NULL), mobe_units_read(format, odd, n_cols, 32, table != NULL),
    };
    *unit_even = units[0].unit;
    *unit_odd  = units[1].unit;
    int32_t scale[8], min[8];
    mobe_units_join(&units[0], &units[1], 32, scale, min);

    const uint8_t * q_even = (const uint8_t *) (even ? even : odd) + format->offset;
    const uint8_t * q_odd  = (const uint8_t *) (odd ? odd : even)  + format->offset;
    const int stride = format->stride;
    if (n_cols == MOBE_COLS) {
        MOBE_UNROLL
        for (int k = 0; k < MOBE_COLS/32; k++) {
            mobe_pair_chunk(q_even + k*stride, q_odd + k*stride, k, scale, min, apart, table, dst);
        }
        return;
    }
    for (int k = 0; k < n_cols/32; k++) {
        mobe_pair_chunk(q_even + k*stride, q_odd + k*stride, k, scale, min, apart, table, dst);
    }
}

MOBE_INLINE void mobe_pair_decode_bytes(
        const struct mobe_format * format, const char * even, const char * odd, int n_cols, int run, int32_t * dst,
        float * unit_even, float * unit_odd) {
    const struct mobe_units units[2] = {
        mobe_units_read(format, even, n_cols, run, false), mobe_units_read(format, odd, n_cols, run, false),
    };
    *unit_even = units[0].unit;
    *unit_odd  = units[1].unit;
    int32_t scale[MOBE_RUNS], min[MOBE_RUNS];
    mobe_units_join(&units[0], &units[1], run, scale, min);

    int8_t q_even[MOBE_COLS], q_odd[MOBE_COLS];
    format->bytes(even ? even : odd, n_cols, q_even);
    format->bytes(odd ? odd : even,  n_cols, q_odd);
    for (int c = 0; c < n_cols; c += run) {
        const mobe_pair s = mobe_pair_set(scale[c/run]);
        const mobe_pair m = mobe_pair_set(min[c/run]);
        for (int i = c; i < c + run; i += MOBE_VEC) {
            mobe_pair_store(dst + i, mobe_pair_affine(mobe_pair_join(q_even + i, q_odd + i), s, m));
        }
    }
}

void mobe_pair_decode(
        enum ggml_type type, const struct mobe_format * format, const char * even, const char * odd, int n_cols, int32_t * dst,
        float * unit_even, float * unit_odd) {
    if (!format) {
        int16_t values[2][MOBE_COLS];
        *unit_even = mobe_half_pair_from_floats(type, even, n_cols, values[0]);
        *unit_odd  = mobe_half_pair_from_floats(type, odd,  n_cols, values[1]);
        for (int c = 0; c < MOBE_COLS; c++) {
            dst[c] = mobe_two(values[0][c], values[1][c]);
        }
    } else if (format->bytes) {
        if (format->run == 16) {
            mobe_pair_decode_bytes(format, even, odd, n_cols, 16, dst, unit_even, unit_odd);
        } else {
            mobe_pair_decode_bytes(format, even, odd, n_cols, 32, dst, unit_even, unit_odd);
        }
    } else if (format->table) {
        mobe_pair_decode_nibbles(format, even, odd, n_cols, 16, format->table, dst, unit_even, unit_odd);
    } else if (format->apart == 16) {
        mobe_pair_decode_nibbles(format, even, odd, n_cols, 16, NULL, dst, unit_even, unit_odd);
    } else {
        mobe_pair_decode_nibbles(format, even, odd, n_cols, 32, NULL, dst, unit_even, unit_odd);
    }
}

#endif
