#include "mobe-quad-decode.h"
#include "mobe-quad.h"

#if defined(MOBE_QUAD)

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

typedef float    mobe_eight  __attribute__((vector_size(32)));
typedef uint32_t mobe_eightu __attribute__((vector_size(32)));
typedef int16_t  mobe_eights __attribute__((vector_size(16)));

float mobe_zero(const struct mobe_format * format) {
    return mobe_wide(format) ? (float) MOBE_WIDE_BIAS : (float) format->zero;
}

// scales and shifts of one run in eights of four bases: fractions of the largest, those of a run side by side
MOBE_INLINE void mobe_quad_scales(
        const float (*scale)[MOBE_RUNS], const float (*min)[MOBE_RUNS], float zero, int n_run, const struct mobe_four * dst) {
    for (int i = 0; i < n_run; i += 8) {
        mobe_piece s[4];
        for (int p = 0; p < 4; p++) {
            mobe_eight v, m;
            memcpy(&v, scale[p] + i, sizeof(v));
            memcpy(&m, min[p] + i, sizeof(m));
            const float to = dst->most[p] > 0.0f ? 32767.0f/dst->most[p] : 0.0f;
            const mobe_eightu rounded = (mobe_eightu) (v*to + 12582912.0f); // 1.5*2^23: adding it rounds to an integer, in the low bits
            const mobe_eights half    = __builtin_convertvector(rounded, mobe_eights);
            s[p] = mobe_piece_load(&half);
            m = v*zero - m;
            memcpy(dst->shift + MOBE_RUNS*p + i, &m, sizeof(m));
        }
        const mobe_piece ab_low = mobe_zip_low_16(s[0], s[1]), ab_high = mobe_zip_high_16(s[0], s[1]);
        const mobe_piece cd_low = mobe_zip_low_16(s[2], s[3]), cd_high = mobe_zip_high_16(s[2], s[3]);
        mobe_piece_store(dst->scale + 4*i,      mobe_zip_low_32(ab_low, cd_low));
        mobe_piece_store(dst->scale + 4*i + 8,  mobe_zip_high_32(ab_low, cd_low));
        mobe_piece_store(dst->scale + 4*i + 16, mobe_zip_low_32(ab_high, cd_high));
        mobe_piece_store(dst->scale + 4*i + 24, mobe_zip_high_32(ab_high, cd_high));
    }
}

#define MOBE_OF_63 (32767.0f/520.0f) // of which 520 times a scale are a fraction

// The same for q4_K and q5_K, in integers. A block begins with d and dmin in half precision, two bytes each, and 12 bytes of scales and
// minima of six bits.
static inline void mobe_quad_scales_k4(const char * const * src, float zero, const struct mobe_four * dst) {
    mobe_piece six[4]; // scales, then minima, of the eight runs
    for (int p = 0; p < 4; p++) {
#if defined(__aarch64__)
        float two[2] = { 0.0f, 0.0f };
        uint32_t in[4] = { 0 };
        if (src[p]) {
            memcpy(in, src[p], sizeof(in));
        }
        const uint32_t out[4] = {
            in[1] & 0x3f3f3f3f, (in[3] & 0x0f0f0f0f)        | ((in[1] >> 2) & 0x30303030),
            in[2] & 0x3f3f3f3f, ((in[3] >> 4) & 0x0f0f0f0f) | ((in[2] >> 2) & 0x30303030),
        };
        six[p] = mobe_piece_load(out);
        const float32x4_t halves = vcvt_f32_f16(vreinterpret_f16_u32(vdup_n_u32(in[0])));
        two[0] = vgetq_lane_f32(halves, 0);
        two[1] = vgetq_lane_f32(halves, 1);
        float s[8], m[8];
        for (int i = 0; i < 8; i++) {
            s[i] = (float) ((const uint8_t *) out)[i];
            m[i] = (float) ((const uint8_t *) out)[i + 8];
        }
        mobe_eight scale, min;
        memcpy(&scale, s, sizeof(scale));
        memcpy(&min, m, sizeof(min));
        const mobe_eight shift = scale*(zero*two[0]) - min*two[1];
        dst->most[p] = two[0]*MOBE_OF_63;
#else
        const __m128i in   = src[p] ? mobe_piece_load(src[p]) : _mm_setzero_si128();
        const __m128i low  = _mm_srlv_epi32(_mm_shuffle_epi32(in, 0xed), _mm_set_epi32(4, 0, 0, 0)); // of words 1 3 2 3
        const __m128i high = _mm_srli_epi32(_mm_shuffle_epi32(in, 0xa5), 2);                         // of words 1 1 2 2
        six[p] = _mm_or_si128(_mm_and_si128(low, _mm_set_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f)),
            _mm_and_si128(high, _mm_set_epi32(0x30303030, 0, 0x30303030, 0)));
        const __m128 two   = _mm_cvtph_ps(in);
        const mobe_eight scale = (mobe_eight) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(six[p]));
        const mobe_eight min   = (mobe_eight) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(six[p], six[p])));
        const mobe_eight d     = (mobe_eight) _mm256_broadcastss_ps(two);
        const mobe_eight dmin  = (mobe_eight) _mm256_broadcastss_ps(_mm_movehdup_ps(two));
        const mobe_eight shift = scale*(d*zero) - min*dmin;
        dst->most[p] = _mm_cvtss_f32(two)*MOBE_OF_63;
#endif
        memcpy(dst->shift + MOBE_RUNS*p, &shift, sizeof(shift));
    }
    // fractions: 63*520 is nearly one
    const mobe_piece ab = mobe_zip_low_8(six[0], six[1]), cd = mobe_zip_low_8(six[2], six[3]);
    const mobe_piece runs[2] = { mobe_zip_low_16(ab, cd), mobe_zip_high_16(ab, cd) };
    for (int i = 0; i < 2; i++) {
#if defined(__aarch64__)
        vst1q_s16(dst->scale + 16*i,     vmulq_n_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(runs[i]))), 520));
        vst1q_s16(dst->scale + 16*i + 8, vmulq_n_s16(vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(runs[i]))), 520));
#else
        const __m256i s = _mm256_mullo_epi16(_mm256_cvtepu8_epi16(runs[i]), _mm256_set1_epi16(520));
        _mm256_store_si256((__m256i *) (dst->scale + 16*i), s);
#endif
    }
}

// types that are not taken apart: through floats, to bytes with a scale for each 16; returns the largest
static float mobe_bytes_from_floats(enum ggml_type type, const char * src, int n_cols, float * scale, int8_t * q) {
    float values[MOBE_COLS];
    mobe_decode(type, src, values, n_cols);
    float largest = 0.0f;
    for (int c0 = 0; c0 < n_cols; c0 += 16) {
        float most = 0.0f;
        for (int c = c0; c < c0 + 16; c++) {
            most = fabsf(values[c]) > most ? fabsf(values[c]) : most;
        }
        const float to = most > 0.0f ? 127.0f/most : 0.0f;
        scale[c0/16] = most*(1.0f/127.0f);
        largest = scale[c0/16] > largest ? scale[c0/16] : largest;
        for (int c = c0; c < c0 + 16; c++) {
            const float v = values[c]*to;
            q[c] = (int8_t) (v < 0.0f ? v - 0.5f : v + 0.5f);
        }
    }
    return largest;
}

MOBE_INLINE void mobe_quad_split(mobe_quad both, const uint8_t * table, bool flip, uint8_t * low, uint8_t * high) {
    mobe_quad l = mobe_quad_low(both);
    mobe_quad h = mobe_quad_high(both);
    if (table) {
        l = mobe_quad_look_up(table, l);
        h = mobe_quad_look_up(table, h);
    }
    mobe_quad_store(low,  flip ? mobe_quad_flip(l) : l);
    mobe_quad_store(high, flip ? mobe_quad_flip(h) : h);
}

// Nibbles: 16 bytes of each basis hold numbers of 16 columns in either half, `apart` from one another.
MOBE_INLINE void mobe_quad_nibbles(
        const uint8_t * const * src, int n_cols, int64_t stride, int64_t apart, const uint8_t * table,
        uint8_t * dst) {
    const bool flip  = table && MOBE_WIDE_BIAS == 0; // tables have 128 added
    if (stride == 16) { // two pieces at a time
        for (int64_t k = 0; k < n_cols/64; k++) {
            mobe_quad both[2*MOBE_JOINED];
            mobe_quad_join_32(src[0] + 32*k, src[1] + 32*k, src[2] + 32*k, src[3] + 32*k, both);
            for (int i = 0; i < 2*MOBE_JOINED; i++) {
                const int64_t second = i/MOBE_JOINED;
                uint8_t * low = dst + 4*(64*k + (apart == 16 ? 32 : 16)*second + i%MOBE_JOINED*MOBE_VEC);
                mobe_quad_split(both[i], table, flip, low, low + 4*apart);
            }
        }
        return;
    }
    for (int64_t k = 0; k < n_cols/32; k++) {
        mobe_quad both[MOBE_JOINED];
        mobe_quad_join(src[0] + k*stride, src[1] + k*stride, src[2] + k*stride, src[3] + k*stride, both);
        for (int i = 0; i < MOBE_JOINED; i++) {
            uint8_t * low = dst + 4*(32*k + i*MOBE_VEC);
            mobe_quad_split(both[i], table, flip, low, low + 4*apart);
        }
    }
}

// Bytes: a block of n columns every `stride` bytes.
MOBE_INLINE void mobe_quad_bytes(const uint8_t * const * src, int n_cols, int n, int64_t stride, bool flip, uint8_t * dst) {
    for (int c = 0; c < n_cols; c += 32) {
        const int64_t at = c/n*stride + c%n;
        mobe_quad four[2*MOBE_JOINED];
        mobe_quad_join_32(src[0] + at, src[1] + at, src[2] + at, src[3] + at, four);
        for (int i = 0; i < 2*MOBE_JOINED; i++) {
            mobe_quad_store(dst + 4*c + 4*MOBE_VEC*i, flip ? mobe_quad_flip(four[i]) : four[i]);
        }
    }
}

// `mask` bits of each byte, from bit `from` on, as bits `to` and up; all are constants where this is called
MOBE_INLINE mobe_vecu mobe_bits(mobe_quad v, int from, int to, uint32_t mask) {
    const mobe_vecu all = (mobe_vecu) v;
    return (from > to ? all >> (from - to) : all << (to - from)) & (0x01010101u*mask << to);
}

// Blocks of 256 columns, of which 32 bytes hold the lower bits of 32 columns in either nibble or in each of four pairs of bits, and 32
// others the upper bits.

static inline void mobe_quad_join_at(const uint8_t * const * src, int64_t at, mobe_quad * out) {
    mobe_quad_join_32(src[0] + at, src[1] + at, src[2] + at, src[3] + at, out);
}

#define MOBE_LANES(v) for (int v = 0; v < 2*MOBE_JOINED; v++)
#define MOBE_PUT(column, v, number) mobe_quad_store(dst + 4*((column) + v*MOBE_VEC), (mobe_quad) (number))

static void mobe_quad_q2_k(const uint8_t * const * src, uint8_t * dst) {
    for (int half = 0; half < 2; half++) {
        mobe_quad low[2*MOBE_JOINED];
        mobe_quad_join_at(src, offsetof(block_q2_K, qs) + 32*half, low);
        MOBE_UNROLL
        for (int part = 0; part < 4; part++) {
            MOBE_LANES(v) {
                MOBE_PUT(128*half + 32*part, v, mobe_bits(low[v], 2*part, 0, 3));
            }
        }
    }
}

static void mobe_quad_q3_k(const uint8_t * const * src, uint8_t * dst) {
    mobe_quad high[2*MOBE_JOINED];
    mobe_quad_join_at(src, offsetof(block_q3_K, hmask), high);
    MOBE_UNROLL
    for (int half = 0; half < 2; half++) {
        mobe_quad low[2*MOBE_JOINED];
        mobe_quad_join_at(src, offsetof(block_q3_K, qs) + 32*half, low);
        MOBE_UNROLL
        for (int part = 0; part < 4; part++) {
            MOBE_LANES(v) {
                MOBE_PUT(128*half + 32*part, v, mobe_bits(low[v], 2*part, 0, 3) | mobe_bits(high[v], 4*half + part, 2, 1));
            }
        }
    }
}

static void mobe_quad_q5_k(const uint8_t * const * src, uint8_t * dst) {
    mobe_quad high[2*MOBE_JOINED];
    mobe_quad_join_at(src, offsetof(block_q5_K, qh), high);
    MOBE_UNROLL
    for (int pair = 0; pair < 4; pair++) {
        mobe_quad low[2*MOBE_JOINED];
        mobe_quad_join_at(src, offsetof(block_q5_K, qs) + 32*pair, low);
        MOBE_LANES(v) {
            MOBE_PUT(64*pair,      v, mobe_bits(low[v], 0, 0, 15) | mobe_bits(high[v], 2*pair,     4, 1));
            MOBE_PUT(64*pair + 32, v, mobe_bits(low[v], 4, 0, 15) | mobe_bits(high[v], 2*pair + 1, 4, 1));
        }
    }
}

static void mobe_quad_q6_k(const uint8_t * const * src, uint8_t * dst) {
    for (int half = 0; half < 2; half++) {
        mobe_quad high[2*MOBE_JOINED];
        mobe_quad_join_at(src, offsetof(block_q6_K, qh) + 32*half, high);
        MOBE_UNROLL
        for (int part = 0; part < 2; part++) {
            mobe_quad low[2*MOBE_JOINED];
            mobe_quad_join_at(src, offsetof(block_q6_K, ql) + 64*half + 32*part, low);
            MOBE_LANES(v) {
                MOBE_PUT(128*half + 32*part,      v, mobe_bits(low[v], 0, 0, 15) | mobe_bits(high[v], 2*part,     4, 3));
                MOBE_PUT(128*half + 32*part + 64, v, mobe_bits(low[v], 4, 0, 15) | mobe_bits(high[v], 2*part + 4, 4, 3));
            }
        }
    }
}

#undef MOBE_LANES
#undef MOBE_PUT

void mobe_quad_decode(
        enum ggml_type type, const struct mobe_format * format, const char * const * src, int n_cols, const struct mobe_four * dst) {
    const bool flip = mobe_wide(format) && MOBE_WIDE_BIAS != 0;
    const uint8_t * at[4];
    int8_t q[4][MOBE_COLS];

    int have = 0;
    while (!src[have]) {
        have++;
    }
    for (int p = 0; p < 4; p++) {
        at[p] = (const uint8_t *) src[src[p] ? p : have] + (format ? format->offset : 0);
    }

    // scales
    if (type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K) {
        mobe_quad_scales_k4(src, (float) format->zero, dst);
    } else {
        float scale[4][MOBE_RUNS], min[4][MOBE_RUNS];
        for (int p = 0; p < 4; p++) {
            if (format && src[p]) {
                dst->most[p] = format->scales(src[p], n_cols, scale[p], min[p]);
                continue;
            }
            memset(scale[p], 0, sizeof(scale[p]));
            memset(min[p],   0, sizeof(min[p]));
            dst->most[p] = src[p] ? mobe_bytes_from_floats(type, src[p], n_cols, scale[p], q[p]) : 0.0f;
        }
        const float zero = mobe_wide(format) ? 0.0f : (float) format->zero; // what is added to wide ones does not change the numbers
        mobe_quad_scales(scale, min, zero, mobe_run(format) == 16 ? 16 : 8, dst);
    }

    // numbers
    switch (type) {
        case GGML_TYPE_Q4_K: mobe_quad_nibbles(at, MOBE_COLS, 16, 32, NULL, dst->data); return;
        case GGML_TYPE_Q2_K: mobe_quad_q2_k(at, dst->data); return;
        case GGML_TYPE_Q3_K: mobe_quad_q3_k(at, dst->data); return;
        case GGML_TYPE_Q5_K: mobe_quad_q5_k(at, dst->data); return;
        case GGML_TYPE_Q6_K: mobe_quad_q6_k(at, dst->data); return;
        case GGML_TYPE_Q8_0: mobe_quad_bytes(at, n_cols, QK8_0, sizeof(block_q8_0), flip, dst->data); return;
        default: break;
    }
    if (format && !format->bytes) {
        if (format->stride == 16) {
            mobe_quad_nibbles(at, n_cols, 16, 16, format->table, dst->data);
        } else {
            mobe_quad_nibbles(at, n_cols, format->stride, 16, format->table, dst->data);
        }
        return;
    }
    for (int p = 0; p < 4; p++) {
        if (format && src[p]) {
            format->bytes(src[p], n_cols, q[p]);
        }
        at[p] = (const uint8_t *) q[src[p] ? p : have];
    }
    mobe_quad_bytes(at, n_cols, MOBE_COLS, 0, flip, dst->data);
}

#endif
