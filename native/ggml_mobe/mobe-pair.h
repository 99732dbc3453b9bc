// Sums of products of 16-bit integers: a 32-bit lane holds the numbers of two bases at one column (or two coefficients), one
// instruction multiplies both and adds them to a 32-bit sum: twice the products of a float multiply-add.
// VNNI has it as one instruction (AVX-512 and AVX), AVX2 and AVX-512BW as multiplication and addition. MOBE_PAIR is not
// defined where there is none of these; the kernel then sums floats.

#pragma once

#include "mobe-vec.h"

#if defined(__GNUC__) && defined(__AVX512F__) && defined(__AVX512BW__)

#define MOBE_PAIR 1

typedef __m512i mobe_pair; // MOBE_VEC pairs

static inline mobe_pair mobe_pair_zero(void) { return _mm512_setzero_si512(); }
static inline mobe_pair mobe_pair_set(int32_t two) { return _mm512_set1_epi32(two); }
static inline mobe_pair mobe_pair_load(const int32_t * p) { return _mm512_load_si512(p); }
static inline void      mobe_pair_store(int32_t * p, mobe_pair v) { _mm512_store_si512(p, v); }

// q*scale - min, 16 bits each
static inline mobe_pair mobe_pair_affine(mobe_pair q, mobe_pair scale, mobe_pair min) {
    return _mm512_sub_epi16(_mm512_mullo_epi16(q, scale), min);
}

// MOBE_VEC bytes of either basis side by side, zero-extended
static inline mobe_pair mobe_pair_join_unsigned(const uint8_t * even, const uint8_t * odd) {
    const __m512i lo = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) even));
    const __m512i hi = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) odd));
    return _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
}

static inline mobe_pair mobe_pair_low_nibbles(mobe_pair v) { return _mm512_and_si512(v, _mm512_set1_epi32(0x000f000f)); }
static inline mobe_pair mobe_pair_high_nibbles(mobe_pair v) {
    return _mm512_and_si512(_mm512_srli_epi32(v, 4), _mm512_set1_epi32(0x000f000f));
}

// the 16 entries of a table of bytes, zero-extended
static inline mobe_pair mobe_pair_look_up(const uint8_t * table, mobe_pair index) {
    const __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table));
    return _mm512_shuffle_epi8(t, _mm512_or_si512(index, _mm512_set1_epi32((int32_t) 0x80008000))); // a set sign bit gives 0
}

// ... sign-extended
static inline mobe_pair mobe_pair_join(const int8_t * even, const int8_t * odd) {
    const __m512i lo = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) even));
    const __m512i hi = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) odd));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, lo, _mm512_slli_epi32(hi, 16));
}

static inline mobe_pair mobe_pair_dot(mobe_pair sum, mobe_pair a, mobe_pair b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

static inline mobe_vec mobe_pair_to_float(mobe_pair v) { return _mm512_cvtepi32_ps(v); }

#elif defined(__GNUC__) && defined(__AVX2__)

#define MOBE_PAIR 1

typedef __m256i mobe_pair;

static inline mobe_pair mobe_pair_zero(void) { return _mm256_setzero_si256(); }
static inline mobe_pair mobe_pair_set(int32_t two) { return _mm256_set1_epi32(two); }
static inline mobe_pair mobe_pair_load(const int32_t * p) { return _mm256_load_si256((const __m256i *) p); }
static inline void      mobe_pair_store(int32_t * p, mobe_pair v) { _mm256_store_si256((__m256i *) p, v); }

static inline mobe_pair mobe_pair_affine(mobe_pair q, mobe_pair scale, mobe_pair min) {
    return _mm256_sub_epi16(_mm256_mullo_epi16(q, scale), min);
}

static inline mobe_pair mobe_pair_join_unsigned(const uint8_t * even, const uint8_t * odd) {
    const __m128i both = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i *) even), _mm_loadl_epi64((const __m128i *) odd));
    return _mm256_cvtepu8_epi16(both);
}

static inline mobe_pair mobe_pair_low_nibbles(mobe_pair v) { return _mm256_and_si256(v, _mm256_set1_epi32(0x000f000f)); }
static inline mobe_pair mobe_pair_high_nibbles(mobe_pair v) {
    return _mm256_and_si256(_mm256_srli_epi32(v, 4), _mm256_set1_epi32(0x000f000f));
}

static inline mobe_pair mobe_pair_look_up(const uint8_t * table, mobe_pair index) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table));
    return _mm256_shuffle_epi8(t, _mm256_or_si256(index, _mm256_set1_epi32((int32_t) 0x80008000)));
}

static inline mobe_pair mobe_pair_join(const int8_t * even, const int8_t * odd) {
    const __m128i both = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i *) even), _mm_loadl_epi64((const __m128i *) odd));
    return _mm256_cvtepi8_epi16(both);
}

static inline mobe_pair mobe_pair_dot(mobe_pair sum, mobe_pair a, mobe_pair b) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

static inline mobe_vec mobe_pair_to_float(mobe_pair v) { return (mobe_vec) _mm256_cvtepi32_ps(v); }

#endif
