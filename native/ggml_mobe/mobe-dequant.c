#include "mobe-dequant.h"

#include "ggml-cpu.h"
#include "simd-mappings.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

// The loops over bytes below have constant bounds: compilers turn them into vector instructions.

static inline float mobe_half(ggml_half h) { return GGML_CPU_FP16_TO_FP32(h); }

// Eight scales are written as one vector and read as such: pieces would have to reach the memory first.
#if defined(__GNUC__)
typedef float mobe_eight __attribute__((vector_size(32)));
#else
typedef struct { float v[8]; } mobe_eight;
#endif
#define MOBE_STORE_EIGHT(dst, ...) do { const mobe_eight eight = { __VA_ARGS__ }; memcpy(dst, &eight, sizeof(eight)); } while (0)

// eight unsigned bytes, times by
static inline void mobe_store_eight_bytes(float * dst, uint64_t bytes, float by) {
#if defined(__AVX2__)
    _mm256_storeu_ps(dst, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t) bytes))), _mm256_set1_ps(by)));
#else
    for (int i = 0; i < 8; i++) {
        dst[i] = by*(float) ((bytes >> 8*i) & 255);
    }
#endif
}

// ... signed
static inline void mobe_store_eight_signed(float * dst, uint64_t bytes, float by) {
#if defined(__AVX2__)
    _mm256_storeu_ps(dst, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t) bytes))), _mm256_set1_ps(by)));
#else
    for (int i = 0; i < 8; i++) {
        dst[i] = by*(float) (int8_t) (bytes >> 8*i);
    }
#endif
}

// of each byte, which is below 64
static inline uint64_t mobe_less_32(uint64_t bytes) {
    return ((bytes | 0x8080808080808080u) - 0x2020202020202020u) ^ 0x8080808080808080u;
}

static inline float mobe_larger(float a, float b) { return a > b ? a : b; }

// Types with blocks of 32: a scale in half precision; a minimum of its own, or a shift of the numbers
#define MOBE_SCALES_32(name, block_type, scale_of, min_of) \
    static float name(const void * src, int n, float * scale, float * min) { \
        const block_type * block = src; \
        float most = 0.0f, d[8] = { 0 }, m[8] = { 0 }; \
        if (n == MOBE_COLS) { \
            for (int b = 0; b < 8; b++) { \
                d[b] = scale_of; \
                m[b] = min_of; \
                most = mobe_larger(most, fabsf(d[b])); \
            } \
        } else { \
            for (int b = 0; b < n/32; b++) { \
                d[b] = scale_of; \
                m[b] = min_of; \
                most = mobe_larger(most, fabsf(d[b])); \
            } \
        } \
        MOBE_STORE_EIGHT(scale, d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]); \
        MOBE_STORE_EIGHT(min,   m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]); \
        return most; \
    }
MOBE_SCALES_32(mobe_scales_q4_0,   block_q4_0,   mobe_half(block[b].d), 8*d[b])
MOBE_SCALES_32(mobe_scales_q4_1,   block_q4_1,   mobe_half(block[b].d), -mobe_half(block[b].m))
MOBE_SCALES_32(mobe_scales_q5_0,   block_q5_0,   mobe_half(block[b].d), 16*d[b])
MOBE_SCALES_32(mobe_scales_q5_1,   block_q5_1,   mobe_half(block[b].d), -mobe_half(block[b].m))
MOBE_SCALES_32(mobe_scales_q8_0,   block_q8_0,   mobe_half(block[b].d), 0.0f)
MOBE_SCALES_32(mobe_scales_iq4_nl, block_iq4_nl, mobe_half(block[b].d), 0.0f)
MOBE_SCALES_32(mobe_scales_mxfp4,  block_mxfp4,  GGML_E8M0_TO_FP32_HALF(block[b].e), 0.0f)

static float mobe_scales_iq4_xs(const void * src, int n, float * scale, float * min) {
    const block_iq4_xs * block = src;
    const float d = mobe_half(block->d);
    GGML_UNUSED(n);
    uint64_t low = 0, high = 0; // a byte each
    for (int b = 0; b < 8; b++) {
        low  |= (uint64_t) ((block->scales_l[b/2] >> 4*(b%2)) & 15) << 8*b;
        high |= (uint64_t) ((block->scales_h >> 2*b) & 3) << 8*b;
    }
    mobe_store_eight_signed(scale, mobe_less_32(low | high << 4), d);
    mobe_store_eight_bytes(min, 0, 0.0f);
    return fabsf(d)*32;
}

// the 6-bit scales and minima of q4_K and q5_K
static inline float mobe_scales_k4(ggml_half d, ggml_half dmin, const uint8_t * packed, float * scale, float * min) {
    uint32_t in[3];
    memcpy(in, packed, sizeof(in));
    const uint64_t scales = (in[0] & 0x3f3f3f3f) | (uint64_t) ((in[2] & 0x0f0f0f0f)        | ((in[0] >> 2) & 0x30303030)) << 32;
    const uint64_t mins   = (in[1] & 0x3f3f3f3f) | (uint64_t) (((in[2] >> 4) & 0x0f0f0f0f) | ((in[1] >> 2) & 0x30303030)) << 32;
    const float by    = mobe_half(d);
    const float bymin = mobe_half(dmin);
    mobe_store_eight_bytes(scale, scales, by);
    mobe_store_eight_bytes(min, mins, bymin);
    return fabsf(by)*63;
}

static float mobe_scales_q4_k(const void * src, int n, float * scale, float * min) {
    const block_q4_K * block = src;
    GGML_UNUSED(n);
    return mobe_scales_k4(block->d, block->dmin, block->scales, scale, min);
}

static float mobe_scales_q5_k(const void * src, int n, float * scale, float * min) {
    const block_q5_K * block = src;
    GGML_UNUSED(n);
    return mobe_scales_k4(block->d, block->dmin, block->scales, scale, min);
}

static float mobe_scales_q2_k(const void * src, int n, float * scale, float * min) {
    const block_q2_K * block = src;
    const float d    = mobe_half(block->d);
    const float dmin = mobe_half(block->dmin);
    GGML_UNUSED(n);
    for (int i = 0; i < 2; i++) {
        uint64_t both;
        memcpy(&both, block->scales + 8*i, sizeof(both));
        mobe_store_eight_bytes(scale + 8*i, both & 0x0f0f0f0f0f0f0f0fu, d);
        mobe_store_eight_bytes(min + 8*i, (both >> 4) & 0x0f0f0f0f0f0f0f0fu, dmin);
    }
    return fabsf(d)*15;
}

static float mobe_scales_q3_k(const void * src, int n, float * scale, float * min) {
    const block_q3_K * block = src;
    const float d = mobe_half(block->d);
    GGML_UNUSED(n);
    uint64_t low;
    uint32_t high;
    memcpy(&low, block->scales, sizeof(low));
    memcpy(&high, block->scales + 8, sizeof(high));
    for (int i = 0; i < 2; i++) {
        const uint64_t two = ((high >> 4*i) & 0x03030303) | (uint64_t) ((high >> (4*i + 2)) & 0x03030303) << 32;
        const uint64_t six = ((low >> 4*i) & 0x0f0f0f0f0f0f0f0fu) | two << 4;
        mobe_store_eight_signed(scale + 8*i, mobe_less_32(six), d);
        mobe_store_eight_signed(min + 8*i, mobe_less_32(six), 4*d);
    }
    return fabsf(d)*32;
}

static float mobe_scales_q6_k(const void * src, int n, float * scale, float * min) {
    const block_q6_K * block = src;
    const float d = mobe_half(block->d);
    GGML_UNUSED(n);
    for (int i = 0; i < 2; i++) {
        uint64_t bytes;
        memcpy(&bytes, block->scales + 8*i, sizeof(bytes));
        mobe_store_eight_signed(scale + 8*i, bytes, d);
        mobe_store_eight_signed(min + 8*i, bytes, 32*d);
    }
    return fabsf(d)*128;
}

// low nibbles are columns 0 .. 15, high ones 16 .. 31; a fifth bit for each
static inline void mobe_bytes_5(const uint8_t * qs, const uint8_t * qh, int8_t * q) {
    uint32_t bits;
    memcpy(&bits, qh, sizeof(bits));
#if defined(__AVX2__)
    const __m256i each  = _mm256_set1_epi64x((int64_t) 0x8040201008040201); // the bit of a column within its byte
    const __m256i bytes = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i have  = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int32_t) bits), bytes), each);
    const __m256i fifth = _mm256_and_si256(_mm256_cmpeq_epi8(have, each), _mm256_set1_epi8(16));
    const __m128i both  = _mm_loadu_si128((const __m128i *) qs);
    const __m256i low   = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(15));
    _mm256_storeu_si256((__m256i *) q, _mm256_or_si256(low, fifth));
#else
    for (int i = 0; i < 16; i++) {
        q[i]      = (int8_t) ((qs[i] & 15) | ((bits >> i) & 1) << 4);
        q[i + 16] = (int8_t) ((qs[i] >> 4) | ((bits >> (i + 16)) & 1) << 4);
    }
#endif
}

static void mobe_bytes_q5_0(const void * src, int n, int8_t * q) {
    const block_q5_0 * block = src;
    for (int b = 0; b < n/QK5_0; b++) {
        mobe_bytes_5(block[b].qs, block[b].qh, q + 32*b);
    }
}

static void mobe_bytes_q5_1(const void * src, int n, int8_t * q) {
    const block_q5_1 * block = src;
    for (int b = 0; b < n/QK5_1; b++) {
        mobe_bytes_5(block[b].qs, block[b].qh, q + 32*b);
    }
}

static void mobe_bytes_q8_0(const void * src, int n, int8_t * q) {
    const block_q8_0 * block = src;
    for (int b = 0; b < n/QK8_0; b++) {
        memcpy(q + 32*b, block[b].qs, 32);
    }
}

static void mobe_bytes_q2_k(const void * src, int n, int8_t * q) {
    const block_q2_K * block = src;
    GGML_UNUSED(n);
    for (int part = 0; part < 8; part++) {
        for (int i = 0; i < 32; i++) {
            q[32*part + i] = (block->qs[32*(part/4) + i] >> 2*(part%4)) & 3;
        }
    }
}

static void mobe_bytes_q3_k(const void * src, int n, int8_t * q) {
    const block_q3_K * block = src;
    GGML_UNUSED(n);
    for (int part = 0; part < 8; part++) {
        for (int i = 0; i < 32; i++) {
            const int low  = (block->qs[32*(part/4) + i] >> 2*(part%4)) & 3;
            const int high = (block->hmask[i] >> part) & 1;
            q[32*part + i] = (int8_t) (low + 4*high);
        }
    }
}

static void mobe_bytes_q5_k(const void * src, int n, int8_t * q) {
    const block_q5_K * block = src;
    GGML_UNUSED(n);
    for (int pair = 0; pair < 4; pair++) {
        for (int i = 0; i < 32; i++) {
            q[64*pair + i]      = (int8_t) ((block->qs[32*pair + i] & 15) | ((block->qh[i] >> 2*pair) & 1) << 4);
            q[64*pair + i + 32] = (int8_t) ((block->qs[32*pair + i] >> 4) | ((block->qh[i] >> (2*pair + 1)) & 1) << 4);
        }
    }
}

// 128 columns share 64 bytes of ql and 32 of qh: 32 of them take one nibble and one pair of bits
static void mobe_bytes_q6_k(const void * src, int n, int8_t * q) {
    const block_q6_K * block = src;
    GGML_UNUSED(n);
    for (int part = 0; part < 8; part++) {
        const uint8_t * low  = block->ql + 64*(part/4) + 32*(part%2);
        const uint8_t * high = block->qh + 32*(part/4);
        for (int i = 0; i < 32; i++) {
            q[32*part + i] = (int8_t) (((low[i] >> 4*((part%4)/2)) & 15) | (((high[i] >> 2*(part%4)) & 3) << 4));
        }
    }
}

// kvalues_iq4nl and kvalues_mxfp4, plus 128
static const uint8_t mobe_table_iq4[16] = { 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241 };
static const uint8_t mobe_table_fp4[16] = { 128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116 };

const struct mobe_format * mobe_format_of(enum ggml_type type) {
#define MOBE_QS(block_type) offsetof(block_type, qs)
    static const struct mobe_format formats[GGML_TYPE_COUNT] = {
        //                     run zero wide   shifts twice  scales              bytes            apart offset                 stride
        [GGML_TYPE_Q4_0]   = { 32,  8, false, false, false, mobe_scales_q4_0,   NULL,            16, MOBE_QS(block_q4_0),   sizeof(block_q4_0),   NULL },
        [GGML_TYPE_Q4_1]   = { 32,  8, false, true,  false, mobe_scales_q4_1,   NULL,            16, MOBE_QS(block_q4_1),   sizeof(block_q4_1),   NULL },
        [GGML_TYPE_Q4_K]   = { 32,  8, false, true,  false, mobe_scales_q4_k,   NULL,            32, MOBE_QS(block_q4_K),   16,                   NULL },
        [GGML_TYPE_IQ4_NL] = { 32,  0, true,  false, false, mobe_scales_iq4_nl, NULL,            16, MOBE_QS(block_iq4_nl), sizeof(block_iq4_nl), mobe_table_iq4 },
        [GGML_TYPE_IQ4_XS] = { 32,  0, true,  false, false, mobe_scales_iq4_xs, NULL,            16, MOBE_QS(block_iq4_xs), 16,                   mobe_table_iq4 },
        [GGML_TYPE_MXFP4]  = { 32,  0, true,  false, false, mobe_scales_mxfp4,  NULL,            16, MOBE_QS(block_mxfp4),  sizeof(block_mxfp4),  mobe_table_fp4 },
        [GGML_TYPE_Q5_0]   = { 32, 16, false, false, false, mobe_scales_q5_0,   mobe_bytes_q5_0, 0, 0, 0, NULL },
        [GGML_TYPE_Q5_1]   = { 32, 16, false, true,  false, mobe_scales_q5_1,   mobe_bytes_q5_1, 0, 0, 0, NULL },
        [GGML_TYPE_Q8_0]   = { 32,  0, true,  false, true,  mobe_scales_q8_0,   mobe_bytes_q8_0, 0, MOBE_QS(block_q8_0), 0, NULL },
        [GGML_TYPE_Q2_K]   = { 16,  2, false, true,  false, mobe_scales_q2_k,   mobe_bytes_q2_k, 0, 0, 0, NULL },
        [GGML_TYPE_Q3_K]   = { 16,  4, false, false, false, mobe_scales_q3_k,   mobe_bytes_q3_k, 0, 0, 0, NULL },
        [GGML_TYPE_Q5_K]   = { 32, 16, false, true,  false, mobe_scales_q5_k,   mobe_bytes_q5_k, 0, 0, 0, NULL },
        [GGML_TYPE_Q6_K]   = { 16, 32, false, false, false, mobe_scales_q6_k,   mobe_bytes_q6_k, 0, 0, 0, NULL },
    };
#undef MOBE_QS
    return (int) type >= 0 && type < GGML_TYPE_COUNT && formats[type].scales ? &formats[type] : NULL;
}

// q of the columns of a stretch
static void mobe_format_bytes(const struct mobe_format * format, const char * src, int n, int8_t * q) {
    if (format->bytes) {
        format->bytes(src, n, q);
        return;
    }
    for (int k = 0; k < n/32; k++) {
        const uint8_t * both = (const uint8_t *) src + format->offset + k*format->stride;
        int8_t * dst = q + mobe_format_column(format, k);
        for (int i = 0; i < 16; i++) {
            const uint8_t low = both[i] & 15, high = both[i] >> 4;
            dst[i]                 = (int8_t) (format->table ? format->table[low]  - 128 : low);
            dst[i + format->apart] = (int8_t) (format->table ? format->table[high] - 128 : high);
        }
    }
}

bool mobe_decodes(enum ggml_type type) {
    return type == GGML_TYPE_F32 || mobe_format_of(type) != NULL || ggml_get_type_traits(type)->to_float != NULL;
}

void mobe_decode(enum ggml_type type, const void * src, float * dst, int n) {
    const struct mobe_format * format = mobe_format_of(type);
    if (format) {
        float  scale[MOBE_RUNS], min[MOBE_RUNS];
        int8_t q[MOBE_COLS];
        format->scales(src, n, scale, min);
        mobe_format_bytes(format, src, n, q);
        for (int c = 0; c < n; c += 16) {
            const int run = c/format->run;
            for (int i = c; i < c + 16; i++) {
                dst[i] = scale[run]*(float) q[i] - min[run];
            }
        }
        return;
    }
    switch (type) {
        case GGML_TYPE_F32:  memcpy(dst, src, n*sizeof(float)); break;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32(src, dst, n); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32(src, dst, n); break;
        default:             ggml_get_type_traits(type)->to_float(src, dst, n); break;
    }
}
