// Sums of products of bytes: a 32-bit lane holds the numbers of four bases at one column, another lane four coefficients, and one
// instruction (VNNI, NEON's dot product) multiplies them and adds them up in 32 bits: four times the products of a float
// multiply-add. AVX2 and AVX-512BW without VNNI take three instructions. MOBE_QUAD is not defined where there is none of
// these; the kernel then sums floats.
//
// Coefficients are signed and at least -127. Numbers are "narrow", 0 .. 127, or "wide", eight bits and a sign; wide ones lie in
// memory with MOBE_WIDE_BIAS added, as the instruction takes them.

#pragma once

#include "mobe-vec.h"

#if defined(__GNUC__) && defined(__AVX512F__) && defined(__AVX512BW__)

#define MOBE_QUAD 1
typedef __m512i mobe_quad; // MOBE_VEC lanes
typedef __m128i mobe_piece;

static inline mobe_quad mobe_quad_zero(void) { return _mm512_setzero_si512(); }
static inline mobe_quad mobe_quad_set(uint32_t four) { return _mm512_set1_epi32((int32_t) four); }
static inline mobe_quad mobe_quad_load(const void * p) { return _mm512_load_si512(p); }
static inline void      mobe_quad_store(void * p, mobe_quad v) { _mm512_store_si512(p, v); }
static inline mobe_vec  mobe_quad_to_float(mobe_quad v) { return (mobe_vec) _mm512_cvtepi32_ps(v); }

#if defined(__AVX512VNNI__)
#define MOBE_WIDE_BIAS 128
static inline mobe_quad mobe_quad_dot(mobe_quad sum, mobe_quad numbers, mobe_quad coefs, bool wide) {
    (void) wide;
    return _mm512_dpbusd_epi32(sum, numbers, coefs);
}
#else
#define MOBE_WIDE_BIAS 0
static inline mobe_quad mobe_quad_dot(mobe_quad sum, mobe_quad numbers, mobe_quad coefs, bool wide) {
    if (wide) { // the sign goes over to the coefficients; two products are at most 2*128*127
        coefs   = _mm512_mask_sub_epi8(coefs, _mm512_movepi8_mask(numbers), _mm512_setzero_si512(), coefs);
        numbers = _mm512_abs_epi8(numbers);
    }
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(numbers, coefs), _mm512_set1_epi16(1)));
}
#endif

#elif defined(__GNUC__) && defined(__AVX2__)

#define MOBE_QUAD 1
typedef __m256i mobe_quad;
typedef __m128i mobe_piece;

static inline mobe_quad mobe_quad_zero(void) { return _mm256_setzero_si256(); }
static inline mobe_quad mobe_quad_set(uint32_t four) { return _mm256_set1_epi32((int32_t) four); }
static inline mobe_quad mobe_quad_load(const void * p) { return _mm256_load_si256((const __m256i *) p); }
static inline void      mobe_quad_store(void * p, mobe_quad v) { _mm256_store_si256((__m256i *) p, v); }
static inline mobe_vec  mobe_quad_to_float(mobe_quad v) { return (mobe_vec) _mm256_cvtepi32_ps(v); }

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define MOBE_WIDE_BIAS 128
static inline mobe_quad mobe_quad_dot(mobe_quad sum, mobe_quad numbers, mobe_quad coefs, bool wide) {
    (void) wide;
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, numbers, coefs);
#else
    return _mm256_dpbusd_epi32(sum, numbers, coefs);
#endif
}
#else
#define MOBE_WIDE_BIAS 0
static inline mobe_quad mobe_quad_dot(mobe_quad sum, mobe_quad numbers, mobe_quad coefs, bool wide) {
    if (wide) {
        coefs   = _mm256_sign_epi8(coefs, numbers);
        numbers = _mm256_abs_epi8(numbers);
    }
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(numbers, coefs), _mm256_set1_epi16(1)));
}
#endif

#elif defined(__GNUC__) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>

#define MOBE_QUAD 1
#define MOBE_WIDE_BIAS 0
typedef int32x4_t  mobe_quad;
typedef uint8x16_t mobe_piece;

static inline mobe_quad mobe_quad_zero(void) { return vdupq_n_s32(0); }
static inline mobe_quad mobe_quad_set(uint32_t four) { return vdupq_n_s32((int32_t) four); }
static inline mobe_quad mobe_quad_load(const void * p) { return vld1q_s32((const int32_t *) p); }
static inline void      mobe_quad_store(void * p, mobe_quad v) { vst1q_s32((int32_t *) p, v); }
static inline mobe_vec  mobe_quad_to_float(mobe_quad v) { return (mobe_vec) vcvtq_f32_s32(v); }
static inline mobe_quad mobe_quad_dot(mobe_quad sum, mobe_quad numbers, mobe_quad coefs, bool wide) {
    (void) wide;
    return vdotq_s32(sum, vreinterpretq_s8_s32(numbers), vreinterpretq_s8_s32(coefs));
}

#endif

#if defined(MOBE_QUAD)

// ---- bytes of four bases side by side

#if defined(__aarch64__)
static inline mobe_piece mobe_piece_load(const void * p) { return vld1q_u8((const uint8_t *) p); }
static inline void       mobe_piece_store(void * p, mobe_piece v) { vst1q_u8((uint8_t *) p, v); }
#define MOBE_ZIP(bits) \
    static inline mobe_piece mobe_zip_low_##bits(mobe_piece a, mobe_piece b) { \
        return vreinterpretq_u8_u##bits(vzip1q_u##bits(vreinterpretq_u##bits##_u8(a), vreinterpretq_u##bits##_u8(b))); \
    } \
    static inline mobe_piece mobe_zip_high_##bits(mobe_piece a, mobe_piece b) { \
        return vreinterpretq_u8_u##bits(vzip2q_u##bits(vreinterpretq_u##bits##_u8(a), vreinterpretq_u##bits##_u8(b))); \
    }
#define vreinterpretq_u8_u8(v) (v)
#else
static inline mobe_piece mobe_piece_load(const void * p) { return _mm_loadu_si128((const __m128i *) p); }
static inline void       mobe_piece_store(void * p, mobe_piece v) { _mm_storeu_si128((__m128i *) p, v); }
#define MOBE_ZIP(bits) \
    static inline mobe_piece mobe_zip_low_##bits(mobe_piece a, mobe_piece b) { return _mm_unpacklo_epi##bits(a, b); } \
    static inline mobe_piece mobe_zip_high_##bits(mobe_piece a, mobe_piece b) { return _mm_unpackhi_epi##bits(a, b); }
#endif
MOBE_ZIP(8)
MOBE_ZIP(16)
MOBE_ZIP(32)
#undef MOBE_ZIP

// 16 bytes of each of four bases as 16 lanes
enum { MOBE_JOINED = 16/MOBE_VEC };
static inline void mobe_quad_join(const uint8_t * a, const uint8_t * b, const uint8_t * c, const uint8_t * d, mobe_quad * out) {
#if defined(__AVX512F__) && defined(__AVX512VBMI__)
    const __m512i order = _mm512_set_epi32(0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a, 0x39291909, 0x38281808,
        0x37271707, 0x36261606, 0x35251505, 0x34241404, 0x33231303, 0x32221202, 0x31211101, 0x30201000);
    __m512i all = _mm512_castsi128_si512(mobe_piece_load(a));
    all = _mm512_inserti32x4(all, mobe_piece_load(b), 1);
    all = _mm512_inserti32x4(all, mobe_piece_load(c), 2);
    all = _mm512_inserti32x4(all, mobe_piece_load(d), 3);
    out[0] = _mm512_permutexvar_epi8(order, all);
#else
    const mobe_piece pa = mobe_piece_load(a), pb = mobe_piece_load(b), pc = mobe_piece_load(c), pd = mobe_piece_load(d);
    const mobe_piece ab_low = mobe_zip_low_8(pa, pb), ab_high = mobe_zip_high_8(pa, pb);
    const mobe_piece cd_low = mobe_zip_low_8(pc, pd), cd_high = mobe_zip_high_8(pc, pd);
    const mobe_piece four[4] = {
        mobe_zip_low_16(ab_low, cd_low), mobe_zip_high_16(ab_low, cd_low), mobe_zip_low_16(ab_high, cd_high), mobe_zip_high_16(ab_high, cd_high),
    };
#if defined(__AVX512F__)
    const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(four[0]), four[1], 1);
    out[0] = _mm512_inserti32x4(_mm512_inserti32x4(low, four[2], 2), four[3], 3);
#elif defined(__AVX2__)
    out[0] = _mm256_set_m128i(four[1], four[0]); // not through memory: a load of two stores waits for both
    out[1] = _mm256_set_m128i(four[3], four[2]);
#else
    memcpy(out, four, sizeof(four));
#endif
#endif
}

// 32 bytes of each as 32 lanes
static inline void mobe_quad_join_32(const uint8_t * a, const uint8_t * b, const uint8_t * c, const uint8_t * d, mobe_quad * out) {
#if defined(__AVX512F__) && defined(__AVX512VBMI__)
    const __m512i order = _mm512_set_epi32(0x6f4f2f0f, 0x6e4e2e0e, 0x6d4d2d0d, 0x6c4c2c0c, 0x6b4b2b0b, 0x6a4a2a0a, 0x69492909, 0x68482808,
        0x67472707, 0x66462606, 0x65452505, 0x64442404, 0x63432303, 0x62422202, 0x61412101, 0x60402000);
    __m512i ab = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) a));
    __m512i cd = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) c));
    ab = _mm512_inserti64x4(ab, _mm256_loadu_si256((const __m256i *) b), 1);
    cd = _mm512_inserti64x4(cd, _mm256_loadu_si256((const __m256i *) d), 1);
    out[0] = _mm512_permutex2var_epi8(ab, order, cd);
    out[1] = _mm512_permutex2var_epi8(ab, _mm512_or_si512(order, _mm512_set1_epi8(0x10)), cd);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i va = _mm256_loadu_si256((const __m256i *) a), vb = _mm256_loadu_si256((const __m256i *) b);
    const __m256i vc = _mm256_loadu_si256((const __m256i *) c), vd = _mm256_loadu_si256((const __m256i *) d);
    const __m256i ab_low = _mm256_unpacklo_epi8(va, vb), ab_high = _mm256_unpackhi_epi8(va, vb); // 0 .. 7 and 16 .. 23, 8 .. 15 and 24 .. 31
    const __m256i cd_low = _mm256_unpacklo_epi8(vc, vd), cd_high = _mm256_unpackhi_epi8(vc, vd);
    const __m256i first  = _mm256_unpacklo_epi16(ab_low, cd_low),   second = _mm256_unpackhi_epi16(ab_low, cd_low);
    const __m256i third  = _mm256_unpacklo_epi16(ab_high, cd_high), fourth = _mm256_unpackhi_epi16(ab_high, cd_high);
    out[0] = _mm256_permute2x128_si256(first, second, 0x20);
    out[1] = _mm256_permute2x128_si256(third, fourth, 0x20);
    out[2] = _mm256_permute2x128_si256(first, second, 0x31);
    out[3] = _mm256_permute2x128_si256(third, fourth, 0x31);
#else
    mobe_quad_join(a, b, c, d, out);
    mobe_quad_join(a + 16, b + 16, c + 16, d + 16, out + MOBE_JOINED);
#endif
}

static inline mobe_quad mobe_quad_low(mobe_quad v) { return (mobe_quad) ((mobe_vecu) v & 0x0f0f0f0fu); }
static inline mobe_quad mobe_quad_high(mobe_quad v) { return (mobe_quad) (((mobe_vecu) v >> 4) & 0x0f0f0f0fu); }
static inline mobe_quad mobe_quad_flip(mobe_quad v) { return (mobe_quad) ((mobe_vecu) v ^ 0x80808080u); }

// entries of a table of 16 bytes
static inline mobe_quad mobe_quad_look_up(const uint8_t * table, mobe_quad index) {
#if defined(__AVX512F__)
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(mobe_piece_load(table)), index);
#elif defined(__AVX2__)
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(mobe_piece_load(table)), index);
#else
    return vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(table), vreinterpretq_u8_s32(index)));
#endif
}

// ---- coefficients

// the four of a basis each, repeated, times as many of each run
static inline mobe_quad mobe_quad_repeat(const int16_t * four) {
    int64_t v;
    memcpy(&v, four, sizeof(v));
#if defined(__AVX512F__)
    return _mm512_set1_epi64(v);
#elif defined(__AVX2__)
    return _mm256_set1_epi64x(v);
#else
    return vreinterpretq_s32_s64(vdupq_n_s64(v));
#endif
}

// products of 16-bit numbers; a lane has the sum of two
static inline mobe_quad mobe_quad_dot_16(mobe_quad sum, mobe_quad a, mobe_quad b) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#elif defined(__AVX512F__)
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#elif defined(__AVX2__)
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#else
    const int16x8_t va = vreinterpretq_s16_s32(a), vb = vreinterpretq_s16_s32(b);
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(va), vget_low_s16(vb)), vmull_high_s16(va, vb)));
#endif
}

// of two neighbours each, those of b behind those of a
static inline mobe_quad mobe_quad_add_pairs(mobe_quad a, mobe_quad b) {
#if defined(__AVX512F__)
    const __m512i first = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_add_epi32(_mm512_permutex2var_epi32(a, first, b),
        _mm512_permutex2var_epi32(a, _mm512_or_si512(first, _mm512_set1_epi32(1)), b));
#elif defined(__AVX2__)
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
#else
    return vpaddq_s32(a, b);
#endif
}

// The products of two fractions, [runs][4] scales and the 4 coefficients that repeat, in bytes. A vector holds MOBE_VEC runs;
// of 16 runs the second eight have their own.
static inline mobe_quad mobe_quad_coefs(
        const int16_t * scale, const int16_t * share, const int16_t * scale_2, const int16_t * share_2) {
#if defined(__AVX512F__)
    const __m512i a = _mm512_mulhrs_epi16(_mm512_load_si512(scale), mobe_quad_repeat(share));
    const __m512i b = _mm512_mulhrs_epi16(_mm512_load_si512(scale_2), mobe_quad_repeat(share_2));
#if defined(__AVX512VBMI__)
    const __m512i lower = _mm512_set_epi8(126, 124, 122, 120, 118, 116, 114, 112, 110, 108, 106, 104, 102, 100, 98, 96, 94, 92, 90, 88, 86, 84,
        82, 80, 78, 76, 74, 72, 70, 68, 66, 64, 62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16,
        14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_epi8(a, lower, b);
#else
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
#endif
#elif defined(__AVX2__)
    (void) scale_2;
    (void) share_2;
    const __m256i four = mobe_quad_repeat(share);
    const __m256i a = _mm256_mulhrs_epi16(_mm256_load_si256((const __m256i *) scale), four);
    const __m256i b = _mm256_mulhrs_epi16(_mm256_load_si256((const __m256i *) (scale + 16)), four);
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
#else
    (void) scale_2;
    (void) share_2;
    const int16x8_t four = vreinterpretq_s16_s32(mobe_quad_repeat(share));
    return vreinterpretq_s32_s8(vcombine_s8(
        vmovn_s16(vqrdmulhq_s16(vld1q_s16(scale), four)), vmovn_s16(vqrdmulhq_s16(vld1q_s16(scale + 8), four))));
#endif
}

// The same of finer fractions in two bytes: their upper ones, rounded, and the lower ones for that.
static inline mobe_quad mobe_quad_coefs_twice(
        const int16_t * scale, const int16_t * share, const int16_t * scale_2, const int16_t * share_2, mobe_quad * low) {
#if defined(__AVX512F__)
    const __m512i half = _mm512_set1_epi16(128);
    const __m512i a = _mm512_mulhrs_epi16(_mm512_load_si512(scale), mobe_quad_repeat(share));
    const __m512i b = _mm512_mulhrs_epi16(_mm512_load_si512(scale_2), mobe_quad_repeat(share_2));
    const __m512i l = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
    *low = MOBE_WIDE_BIAS ? l : _mm512_max_epi8(l, _mm512_set1_epi8(-127));
    const __m512i ha = _mm512_srli_epi16(_mm512_add_epi16(a, half), 8);
    const __m512i hb = _mm512_srli_epi16(_mm512_add_epi16(b, half), 8);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(ha)), _mm512_cvtepi16_epi8(hb), 1);
#elif defined(__AVX2__)
    (void) scale_2;
    (void) share_2;
    const __m256i four = mobe_quad_repeat(share);
    __m256i c[2], h[2];
    for (int k = 0; k < 2; k++) {
        c[k] = _mm256_mulhrs_epi16(_mm256_load_si256((const __m256i *) (scale + 16*k)), four);
        h[k] = _mm256_srai_epi16(_mm256_add_epi16(c[k], _mm256_set1_epi16(128)), 8);
        c[k] = _mm256_srai_epi16(_mm256_slli_epi16(c[k], 8), 8);
    }
    const __m256i l = _mm256_permute4x64_epi64(_mm256_packs_epi16(c[0], c[1]), 0xd8);
    *low = MOBE_WIDE_BIAS ? l : _mm256_max_epi8(l, _mm256_set1_epi8(-127));
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(h[0], h[1]), 0xd8);
#else
    (void) scale_2;
    (void) share_2;
    const int16x8_t four = vreinterpretq_s16_s32(mobe_quad_repeat(share));
    int8x8_t h[2], l[2];
    for (int k = 0; k < 2; k++) {
        const int16x8_t c = vqrdmulhq_s16(vld1q_s16(scale + 8*k), four);
        h[k] = vrshrn_n_s16(c, 8);
        l[k] = vmax_s8(vmovn_s16(c), vdup_n_s8(-127));
    }
    *low = vreinterpretq_s32_s8(vcombine_s8(l[0], l[1]));
    return vreinterpretq_s32_s8(vcombine_s8(h[0], h[1]));
#endif
}

#endif
