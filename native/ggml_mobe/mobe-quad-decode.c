#include "mobe-quad-decode.h"
#include "mobe-quad.h"

#if defined(MOBE_QUAD)

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

typedef uint32_t mobe_eightu __attribute__((vector_size(32)));
typedef int16_t  mobe_eights __attribute__((vector_size(16)));

float mobe_zero(const struct mobe_format * format) {
    return mobe_wide(format) ? (float) MOBE_WIDE_BIAS : (float) format->zero;
}

// numbers of four bases, [4][8] as 16 bits, those of a run side by side
MOBE_INLINE void mobe_quad_by_run(const mobe_piece * s, int16_t * dst) {
    const mobe_piece ab_low = mobe_zip_low_16(s[0], s[1]), ab_high = mobe_zip_high_16(s[0], s[1]);
    const mobe_piece cd_low = mobe_zip_low_16(s[2], s[3]), cd_high = mobe_zip_high_16(s[2], s[3]);
    mobe_piece_store(dst,      mobe_zip_low_32(ab_low, cd_low));
    mobe_piece_store(dst + 8,  mobe_zip_high_32(ab_low, cd_low));
    mobe_piece_store(dst + 16, mobe_zip_low_32(ab_high, cd_high));
    mobe_piece_store(dst + 24, mobe_zip_high_32(ab_high, cd_high));
}

static inline mobe_piece mobe_rounded(mobe_eight v) {
    const mobe_eightu rounded = (mobe_eightu) (v + 12582912.0f); // 1.5*2^23: adding it rounds to an integer, in the low bits
    const mobe_eights half    = __builtin_convertvector(rounded, mobe_eights);
    return mobe_piece_load(&half);
}

// From floats: scales and minima [4][MOBE_RUNS], most a bound of the scales, which may be raised for the shifts.
MOBE_INLINE void mobe_quad_scales(
        const float (*scale)[MOBE_RUNS], const float (*min)[MOBE_RUNS], float zero, int n_run, bool shifts, float one,
        const struct mobe_four * dst) {
    for (int p = 0; shifts && p < 4; p++) {
        for (int i = 0; i < n_run; i++) {
            const float reach = fabsf(scale[p][i]*zero - min[p][i])*(1.0f/15.9f);
            dst->most[p] = reach > fabsf(dst->most[p]) ? reach : dst->most[p];
        }
    }
    for (int i = 0; i < n_run; i += 8) {
        mobe_piece s[4], m[4];
        for (int p = 0; p < 4; p++) {
            mobe_eight v, of;
            memcpy(&v, scale[p] + i, sizeof(v));
            memcpy(&of, min[p] + i, sizeof(of));
            const float by = dst->most[p] != 0.0f ? 1.0f/dst->most[p] : 0.0f;
            s[p] = mobe_rounded(v*(one*by));
            m[p] = mobe_rounded((v*zero - of)*((float) MOBE_SHIFT*by));
        }
        mobe_quad_by_run(s, dst->scale + 4*i);
        if (shifts) {
            mobe_quad_by_run(m, dst->shift + 4*i);
        }
    }
}

// The same for q4_K and q5_K, in integers. A block begins with d and dmin in half precision, two bytes each, and 12 bytes of scales and
// minima of six bits. False: d is too small beside dmin for that.
static inline bool mobe_quad_scales_k4(const char * const * src, int zero, const struct mobe_four * dst) {
    // With most = d*MOBE_SCALE/32, scales are 32 times themselves, and shifts, zero*scale - min*dmin/d, come times 128*32/2047, nearly 2.
    enum { SCALE = 32 };
    const float two = (float) MOBE_SHIFT*SCALE/MOBE_SCALE;
    static const uint16_t none[8] = { 0x3c00 }; // d = 1 and nothing else
    mobe_piece six[4]; // scales, then minima, of the eight runs
#if defined(__aarch64__)
    float32x4_t halves[4];
#else
    __m128 halves[4]; // d and dmin come first
#endif
    for (int p = 0; p < 4; p++) {
        const char * from = src[p] ? src[p] : (const char *) none;
#if defined(__aarch64__)
        uint32_t in[4];
        memcpy(in, from, sizeof(in));
        const uint32_t out[4] = {
            in[1] & 0x3f3f3f3f, (in[3] & 0x0f0f0f0f)        | ((in[1] >> 2) & 0x30303030),
            in[2] & 0x3f3f3f3f, ((in[3] >> 4) & 0x0f0f0f0f) | ((in[2] >> 2) & 0x30303030),
        };
        six[p]    = mobe_piece_load(out);
        halves[p] = vcvt_f32_f16(vreinterpret_f16_u32(vdup_n_u32(in[0])));
#else
        const __m128i in   = mobe_piece_load(from);
        const __m128i low  = _mm_srlv_epi32(_mm_shuffle_epi32(in, 0xed), _mm_set_epi32(4, 0, 0, 0)); // of words 1 3 2 3
        const __m128i high = _mm_srli_epi32(_mm_shuffle_epi32(in, 0xa5), 2);                         // of words 1 1 2 2
        six[p] = _mm_or_si128(_mm_and_si128(low, _mm_set_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f)),
            _mm_and_si128(high, _mm_set_epi32(0x30303030, 0, 0x30303030, 0)));
        halves[p] = _mm_cvtph_ps(in);
#endif
    }

    // dmin/d of the four, in units that leave a fraction
#if defined(__aarch64__)
    const float32x4_t d_01 = vzip1q_f32(halves[0], halves[1]), d_23 = vzip1q_f32(halves[2], halves[3]);
    const float32x4_t d    = vcombine_f32(vget_low_f32(d_01), vget_low_f32(d_23));
    const float32x4_t by   = vmulq_n_f32(vdivq_f32(vcombine_f32(vget_high_f32(d_01), vget_high_f32(d_23)), d), two);
    if (vminvq_u32(vcaleq_f32(by, vdupq_n_f32(30.0f))) == 0) {
        return false;
    }
    const int16x4_t four = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(by, 1024.0f)));
    const int16x8_t g    = vcombine_s16(four, four);
    vst1q_f32(dst->most, vmulq_n_f32(d, (float) MOBE_SCALE/SCALE));
#else
    const __m128 d_01 = _mm_unpacklo_ps(halves[0], halves[1]), d_23 = _mm_unpacklo_ps(halves[2], halves[3]);
    const __m128 d    = _mm_movelh_ps(d_01, d_23);
    const __m128 by   = _mm_mul_ps(_mm_div_ps(_mm_movehl_ps(d_23, d_01), d), _mm_set1_ps(two));
    const __m128 size = _mm_andnot_ps(_mm_set1_ps(-0.0f), by);
    if (_mm_movemask_ps(_mm_cmple_ps(size, _mm_set1_ps(30.0f))) != 15) {
        return false;
    }
    const __m128i four = _mm_cvtps_epi32(_mm_mul_ps(by, _mm_set1_ps(1024.0f)));
    const __m256i g    = _mm256_broadcastq_epi64(_mm_packs_epi32(four, four));
    _mm_storeu_ps(dst->most, _mm_mul_ps(d, _mm_set1_ps((float) MOBE_SCALE/SCALE)));
#endif

    const int16_t middle = (int16_t) ((float) zero*two*512.0f + 0.5f); // times 64*scale, of which the upper half
    const mobe_piece ab = mobe_zip_low_8(six[0], six[1]),  cd = mobe_zip_low_8(six[2], six[3]);
    const mobe_piece mn = mobe_zip_high_8(six[0], six[1]), op = mobe_zip_high_8(six[2], six[3]);
    const mobe_piece scales[2] = { mobe_zip_low_16(ab, cd), mobe_zip_high_16(ab, cd) };
    const mobe_piece mins[2]   = { mobe_zip_low_16(mn, op), mobe_zip_high_16(mn, op) };
    for (int i = 0; i < 2; i++) {
#if defined(__aarch64__)
        for (int half = 0; half < 2; half++) {
            const int16x8_t s = vreinterpretq_s16_u16(vmovl_u8(half ? vget_high_u8(scales[i]) : vget_low_u8(scales[i])));
            const int16x8_t m = vreinterpretq_s16_u16(vmovl_u8(half ? vget_high_u8(mins[i]) : vget_low_u8(mins[i])));
            vst1q_s16(dst->scale + 16*i + 8*half, vshlq_n_s16(s, 5));
            vst1q_s16(dst->shift + 16*i + 8*half, vsubq_s16(
                vqrdmulhq_n_s16(vshlq_n_s16(s, 6), middle), vqrdmulhq_s16(vshlq_n_s16(m, 5), g)));
        }
#else
        const __m256i s = _mm256_cvtepu8_epi16(scales[i]);
        const __m256i m = _mm256_cvtepu8_epi16(mins[i]);
        const __m256i shift = _mm256_sub_epi16(
            _mm256_mulhrs_epi16(_mm256_slli_epi16(s, 6), _mm256_set1_epi16(middle)),
            _mm256_mulhrs_epi16(_mm256_slli_epi16(m, 5), g));
        _mm256_store_si256((__m256i *) (dst->scale + 16*i), _mm256_slli_epi16(s, 5));
        _mm256_store_si256((__m256i *) (dst->shift + 16*i), shift);
#endif
    }
    return true;
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
        enum ggml_type type, const struct mobe_format * format, bool twice, const char * const * src, int n_cols, const struct mobe_four * dst) {
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
    const bool k4 = type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K;
    if (!k4 || !mobe_quad_scales_k4(src, format->zero, dst)) {
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
        const float one  = twice ? MOBE_SCALE_TWICE : MOBE_SCALE;
        mobe_quad_scales(scale, min, zero, mobe_run(format) == 16 ? 16 : 8, mobe_shifts(format), one, dst);
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
