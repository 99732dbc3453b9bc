#include "mobe-rows16-layout.h"

#include "mobe-vec.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define ROWS16_512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ROWS16_256
#endif

// inputs that are multiplied together: two fours
#define TOGETHER 8

// columns whose inputs' scales and sums are kept at a time
#define CHUNK 4096

bool mobe_rows16_takes(enum ggml_type type, int64_t rows) {
#if defined(ROWS16_512) && defined(__AVX512VBMI__)
    return rows % ROWS == 0 && kind_of(type) >= 0;
#elif defined(ROWS16_512) || defined(ROWS16_256)
    return rows % ROWS == 0 && kind_of(type) >= 0 && type != GGML_TYPE_TQ1_0; // which looks its numbers up in 128 bytes
#else
    GGML_UNUSED(type);
    GGML_UNUSED(rows);
    return false;
#endif
}

#if defined(ROWS16_512) || defined(ROWS16_256)

// ---- the inputs

typedef struct { ggml_half d[4]; int8_t qs[4*QK8_0]; } four_q8_0;
typedef struct { float d[4]; int8_t qs[4*QK_K]; int16_t bsums[QK_K/4]; } four_q8_K;
static_assert(sizeof(four_q8_0) == 4*sizeof(block_q8_0), "four rows take the place of four rows");
static_assert(sizeof(four_q8_K) == 4*sizeof(block_q8_K), "four rows take the place of four rows");

// What the offset of one takes from each row, and the scales, of one input or of several that are multiplied together.
typedef struct {
    float d[CHUNK/QK8_0*TOGETHER];    // [unit][input]
    float less[CHUNK/QK2_0*TOGETHER]; // [block][input]: sums of the inputs with the sign changed
} scales;

// sums of eight bytes each, plus 128 for each byte
MOBE_INLINE __m256i sums8(const int8_t * q) {
    const __m256i v = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) q), _mm256_set1_epi8(-128));
    return _mm256_sad_epu8(v, _mm256_setzero_si256());
}

static void scales_of_one(enum kind kind, const char * y, int blocks, scales * out) {
    const int units = LAYOUTS[kind].block/LAYOUTS[kind].unit;
    for (int b = 0; b < blocks; b++) {
        float less = 0.0f;
        for (int u = b*units; u < (b + 1)*units; u++) {
            int sum;
            if (LAYOUTS[kind].unit == QK8_0) {
                const block_q8_0 * x = (const block_q8_0 *) y + u;
                const __m256i s = sums8(x->qs);
                const __m128i t = _mm_add_epi64(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
                sum = _mm_cvtsi128_si32(_mm_add_epi64(t, _mm_unpackhi_epi64(t, t))) - 128*QK8_0;
                out->d[u] = GGML_FP16_TO_FP32(x->d);
            } else {
                const block_q8_K * x = (const block_q8_K *) y + u;
                sum = 0;
                for (int j = 0; j < QK_K/16; j++) { sum += x->bsums[j]; }
                out->d[u] = x->d;
            }
            less = fmaf(-out->d[u], sum, less);
        }
        out->less[b] = less;
    }
}

// of four inputs, which are those from the first on of n in each unit
static void scales_of_four(enum kind kind, const char * y, int blocks, int n, int first, scales * out) {
    const int units = LAYOUTS[kind].block/LAYOUTS[kind].unit;
    for (int b = 0; b < blocks; b++) {
        float * less = out->less + b*n + first;
        for (int i = 0; i < 4; i++) { less[i] = 0.0f; }
        for (int u = b*units; u < (b + 1)*units; u++) {
            float * d = out->d + u*n + first;
            int32_t sum[4];
            if (LAYOUTS[kind].unit == QK8_0) {
                const four_q8_0 * x = (const four_q8_0 *) y + u;
                __m256i s = sums8(x->qs);
                for (int j = 1; j < 4; j++) { s = _mm256_add_epi64(s, sums8(x->qs + 32*j)); }
                s = _mm256_permutevar8x32_epi32(s, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
                _mm_storeu_si128((__m128i *) sum, _mm_sub_epi32(_mm256_castsi256_si128(s), _mm_set1_epi32(128*QK8_0)));
                _mm_storeu_ps(d, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *) x->d)));
            } else {
                const four_q8_K * x = (const four_q8_K *) y + u;
                for (int i = 0; i < 4; i++) {
                    sum[i] = 0;
                    for (int j = 0; j < QK_K/16; j++) { sum[i] += x->bsums[j/4*16 + 4*i + j%4]; }
                    d[i] = x->d[i];
                }
            }
            for (int i = 0; i < 4; i++) { less[i] = fmaf(-d[i], sum[i], less[i]); }
        }
    }
}

// where the numbers of one unit begin, and the bytes between those of two units
#define FIRST_OF_ONE(kind)  (LAYOUTS[kind].unit == QK8_0 ? offsetof(block_q8_0, qs) : offsetof(block_q8_K, qs))
#define FIRST_OF_FOUR(kind) (LAYOUTS[kind].unit == QK8_0 ? offsetof(four_q8_0, qs) : offsetof(four_q8_K, qs))
#define SIZE_OF_ONE(kind)   (LAYOUTS[kind].unit == QK8_0 ? sizeof(block_q8_0) : sizeof(block_q8_K))

// four neighbouring columns of input i; four: bytes between fours
MOBE_INLINE int32_t columns4(const char * y, int inputs, int64_t four, int i, int column) {
    int32_t v;
    memcpy(&v, inputs == 1 ? y + column : y + i/4*four + column/8*32 + i%4*8 + column%8, sizeof(v));
    return v;
}

#if defined(ROWS16_512)

// ---- 64 bytes at a time

// Sums of products with one input lie in two registers, the second of them 16 times as large: so half of the planes need no shift.
typedef struct { __m512i low, high; } pair;

MOBE_INLINE __m512i columns4_of_one(const char * y) {
    int32_t v;
    memcpy(&v, y, sizeof(v));
    return _mm512_set1_epi32(v);
}

MOBE_INLINE void add_to_one(enum kind kind, __m512i v, const char * y, pair * acc) {
    const bool bits = kind == BITS1;
    const int planes = bits ? 4 : 2; // of each register
    const __m512i low = _mm512_set1_epi8(bits ? 2 : 3), high = _mm512_set1_epi8(bits ? 32 : 48);
    MOBE_UNROLL
    for (int plane = 0; plane < planes; plane++) {
        const __m512i w = bits && plane == 0 ? _mm512_add_epi8(v, v) :
                          bits ? _mm512_srli_epi16(v, plane - 1) : _mm512_srli_epi16(v, 2*plane);
        acc->low  = _mm512_dpbusd_epi32(acc->low,  _mm512_and_si512(w, low),  columns4_of_one(y + 4*plane));
        acc->high = _mm512_dpbusd_epi32(acc->high, _mm512_and_si512(w, high), columns4_of_one(y + 4*(planes + plane)));
    }
}

// the sum of products with four neighbouring columns of input i
MOBE_INLINE __m512i dot_of_all(__m512i acc, __m512i codes, const char * y, int64_t four, int i, int column) {
    return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(columns4(y, 4, four, i, column)));
}

// several inputs share the masks and shifts
MOBE_INLINE void add_to_all(enum kind kind, __m512i v, const char * y, int inputs, int64_t four, int column, __m512i * acc) {
    const int planes = kind == BITS1 ? 8 : 4;
    MOBE_UNROLL
    for (int plane = 0; plane < planes; plane++) {
        const __m512i codes =
            kind != BITS1 ? _mm512_and_si512(_mm512_srli_epi16(v, 2*plane), _mm512_set1_epi8(3)) :
            plane == 0    ? _mm512_and_si512(_mm512_add_epi8(v, v), _mm512_set1_epi8(2)) :
                            _mm512_and_si512(_mm512_srli_epi16(v, plane - 1), _mm512_set1_epi8(2));
        MOBE_UNROLL
        for (int i = 0; i < inputs; i++) { acc[i] = dot_of_all(acc[i], codes, y, four, i, column + 4*plane); }
    }
}

#if defined(__AVX512VBMI__)
// the four numbers of three values that a byte below 81 stands for, two bits each
#define T1(i) ((i)%3 | (i)/3%3 << 2 | (i)/9%3 << 4 | (i)/27%3 << 6)
#define T4(i) T1(i), T1(i + 1), T1(i + 2), T1(i + 3)
#define T16(i) T4(i), T4(i + 4), T4(i + 8), T4(i + 12)
static const uint8_t TRITS4[128] MOBE_ALIGNED = { T16(0), T16(16), T16(32), T16(48), T16(64), T1(80) };
#undef T1
#undef T4
#undef T16

// v: 81 times the fifth number and the other four; becomes these, two bits each
MOBE_INLINE __m512i fifth(__m512i * v) {
    const __m512i nothing = _mm512_setzero_si512(), one = _mm512_set1_epi8(1), full = _mm512_set1_epi8(81);
    const __mmask64 some = _mm512_cmpge_epu8_mask(*v, full);
    const __mmask64 two  = _mm512_cmpge_epu8_mask(*v, _mm512_set1_epi8((char) 162));
    __m512i rest = _mm512_mask_sub_epi8(*v, some, *v, full);
    rest = _mm512_mask_sub_epi8(rest, two, rest, full);
    *v = _mm512_permutex2var_epi8(_mm512_load_si512(TRITS4), rest, _mm512_load_si512(TRITS4 + 64));
    return _mm512_mask_add_epi8(_mm512_mask_add_epi8(nothing, some, nothing, one), two, one, one);
}
#endif

// the vectors of one unit
MOBE_INLINE void unit_of_one(enum kind kind, const uint8_t * q, int vectors, const char * y, pair * acc) {
    const int width = kind == TRITS ? 20 : kind == BITS1 ? 32 : 16;
    for (int v = 0; v < vectors; v++, q += VECTOR, y += width) {
        __m512i x = _mm512_loadu_si512(q);
#if defined(__AVX512VBMI__)
        if (kind == TRITS && v < vectors - 1) { acc->low = _mm512_dpbusd_epi32(acc->low, fifth(&x), columns4_of_one(y + 16)); }
#endif
        add_to_one(kind, x, y, acc);
    }
}

MOBE_INLINE void unit_of_all(enum kind kind, const uint8_t * q, int vectors, const char * y, int inputs, int64_t four, __m512i * acc) {
    if (kind == TRITS) {
#if defined(__AVX512VBMI__)
        for (int v = 0; v < 12; v += 2) { // two vectors are 40 columns, five times eight bytes of each input
            const char * all = y;
            y += v*20*4;
            MOBE_UNROLL
            for (int odd = 0; odd < 2; odd++) {
                __m512i x = _mm512_loadu_si512(q + (v + odd)*VECTOR);
                const __m512i last = fifth(&x);
                add_to_all(kind, x, y, inputs, four, 20*odd, acc);
                MOBE_UNROLL
                for (int i = 0; i < inputs; i++) { acc[i] = dot_of_all(acc[i], last, y, four, i, 20*odd + 16); }
            }
            y = all;
        }
        add_to_all(kind, _mm512_loadu_si512(q + 12*VECTOR), y, inputs, four, 240, acc);
#endif
        return;
    }
    const int width = kind == BITS1 ? 32 : 16;
    for (int v = 0; v < vectors; v++) {
        add_to_all(kind, _mm512_loadu_si512(q + v*VECTOR), y + v*width*4, inputs, four, 0, acc);
    }
}

// 16 sums of each input over some blocks, added to those at s[i*stride] if there are any
MOBE_INLINE void strip_512(enum kind kind, int inputs, const uint8_t * p, int blocks, const char * y, int64_t four, const scales * in,
                           bool more, float * s, int64_t stride) {
    const int units = LAYOUTS[kind].block/LAYOUTS[kind].unit, vectors = LAYOUTS[kind].vectors/units;
    const int size = SIZE_OF_ONE(kind)*(inputs == 1 ? 1 : 4);
    __m512 sums[TOGETHER];
    MOBE_UNROLL
    for (int i = 0; i < inputs; i++) { sums[i] = more ? _mm512_loadu_ps(s + i*stride) : _mm512_setzero_ps(); }
    for (int b = 0; b < blocks;) {
        const int pair_end = b + 2 < blocks ? b + 2 : blocks;
        const uint8_t * d = p;
        for (p += (pair_end - b)*SCALES; b < pair_end; b++, d += SCALES) {
            __m512 part[TOGETHER];
            MOBE_UNROLL
            for (int i = 0; i < inputs; i++) { part[i] = _mm512_set1_ps(in->less[b*inputs + i]); }
            MOBE_UNROLL
            for (int u = 0; u < units; u++, p += vectors*VECTOR, y += size) {
                __m512i acc[TOGETHER];
                MOBE_UNROLL
                for (int i = 0; i < inputs; i++) { acc[i] = _mm512_setzero_si512(); }
                if (inputs == 1) {
                    pair both = { acc[0], acc[0] };
                    unit_of_one(kind, p, vectors, y, &both);
                    acc[0] = _mm512_add_epi32(both.low, _mm512_srai_epi32(both.high, 4));
                } else {
                    unit_of_all(kind, p, vectors, y, inputs, four, acc);
                }
                MOBE_UNROLL
                for (int i = 0; i < inputs; i++) {
                    const __m512 dy = _mm512_set1_ps(in->d[(b*units + u)*inputs + i]);
                    part[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i]), dy, part[i]);
                }
            }
            const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) d));
            MOBE_UNROLL
            for (int i = 0; i < inputs; i++) { sums[i] = _mm512_fmadd_ps(scale, part[i], sums[i]); }
        }
    }
    MOBE_UNROLL
    for (int i = 0; i < inputs; i++) { _mm512_storeu_ps(s + i*stride, sums[i]); }
}

#define STRIP strip_512
#define AT_ONCE 8

#else

// ---- 32 bytes at a time: half a strip

MOBE_INLINE __m256i codes_of_plane(enum kind kind, __m256i v, int plane) {
    return kind != BITS1 ? _mm256_and_si256(_mm256_srli_epi16(v, 2*plane), _mm256_set1_epi8(3)) :
           plane == 0    ? _mm256_and_si256(_mm256_add_epi8(v, v), _mm256_set1_epi8(2)) :
                           _mm256_and_si256(_mm256_srli_epi16(v, plane - 1), _mm256_set1_epi8(2));
}

// 8 sums of each input over some blocks: those of the half that begins at row first
MOBE_INLINE void half_strip(enum kind kind, int inputs, int first, const uint8_t * p, int blocks, const char * y, const scales * in,
                            bool more, float * s, int64_t stride) {
    const int units = LAYOUTS[kind].block/LAYOUTS[kind].unit, vectors = LAYOUTS[kind].vectors/units;
    const int size = SIZE_OF_ONE(kind)*inputs;
    const int planes = kind == BITS1 ? 8 : 4, width = 4*planes;
    __m256 sums[4];
    MOBE_UNROLL
    for (int i = 0; i < inputs; i++) { sums[i] = more ? _mm256_loadu_ps(s + i*stride) : _mm256_setzero_ps(); }
    for (int b = 0; b < blocks;) {
        const int pair_end = b + 2 < blocks ? b + 2 : blocks;
        const uint8_t * d = p + first*sizeof(ggml_half);
        for (p += (pair_end - b)*SCALES; b < pair_end; b++, d += SCALES) {
            __m256 part[4];
            MOBE_UNROLL
            for (int i = 0; i < inputs; i++) { part[i] = _mm256_set1_ps(in->less[b*inputs + i]); }
            for (int u = b*units; u < (b + 1)*units; u++, p += vectors*VECTOR, y += size) {
                __m256i acc[4];
                MOBE_UNROLL
                for (int i = 0; i < inputs; i++) { acc[i] = _mm256_setzero_si256(); }
                for (int v = 0; v < vectors; v++) {
                    const __m256i x = _mm256_loadu_si256((const __m256i *) (p + v*VECTOR + 4*first));
                    __m256i sums16[4]; // of 32 columns at most: 8*2*3*128 is far from what overflows
                    MOBE_UNROLL
                    for (int i = 0; i < inputs; i++) { sums16[i] = _mm256_setzero_si256(); }
                    MOBE_UNROLL
                    for (int plane = 0; plane < planes; plane++) {
                        const __m256i codes = codes_of_plane(kind, x, plane);
                        MOBE_UNROLL
                        for (int i = 0; i < inputs; i++) {
                            const __m256i four = _mm256_set1_epi32(columns4(y + v*width*inputs, inputs, 0, i, 4*plane));
                            sums16[i] = _mm256_add_epi16(sums16[i], _mm256_maddubs_epi16(codes, four));
                        }
                    }
                    MOBE_UNROLL
                    for (int i = 0; i < inputs; i++) {
                        acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(sums16[i], _mm256_set1_epi16(1)));
                    }
                }
                MOBE_UNROLL
                for (int i = 0; i < inputs; i++) {
                    part[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i]), _mm256_set1_ps(in->d[u*inputs + i]), part[i]);
                }
            }
            const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d));
            MOBE_UNROLL
            for (int i = 0; i < inputs; i++) { sums[i] = _mm256_fmadd_ps(scale, part[i], sums[i]); }
        }
    }
    MOBE_UNROLL
    for (int i = 0; i < inputs; i++) { _mm256_storeu_ps(s + i*stride, sums[i]); }
}

MOBE_INLINE void strip_256(enum kind kind, int inputs, const uint8_t * p, int blocks, const char * y, int64_t four, const scales * in,
                           bool more, float * s, int64_t stride) {
    (void) four;
    half_strip(kind, inputs, 0, p, blocks, y, in, more, s, stride);
    half_strip(kind, inputs, ROWS/2, p, blocks, y, in, more, s + ROWS/2, stride);
}

#define STRIP strip_256
#define AT_ONCE 4

#endif

// ---- all strips

// inputs is 1, 4 or 8
MOBE_INLINE void strips(enum kind kind, int inputs, enum ggml_type type, int64_t columns, float * s, int64_t stride, const char * x,
                        const char * y, int64_t rows) {
    const layout l = LAYOUTS[kind];
    const int64_t row_size = ggml_row_size(type, columns);
    const int64_t four = 4*columns/l.unit*SIZE_OF_ONE(kind);
    scales in;
    for (int64_t begin = 0; begin < columns; begin += CHUNK) {
        const int64_t n = columns - begin < CHUNK ? columns - begin : CHUNK;
        const char * part = y + begin/l.unit*SIZE_OF_ONE(kind)*(inputs == 1 ? 1 : 4);
        if (inputs == 1) {
            scales_of_one(kind, part, n/l.block, &in);
        } else {
            for (int i = 0; i < inputs; i += 4) { scales_of_four(kind, part + i/4*four, n/l.block, inputs, i, &in); }
        }
        part += inputs == 1 ? FIRST_OF_ONE(kind) : FIRST_OF_FOUR(kind);
        for (int64_t j = 0; j < rows; j += ROWS) {
            const uint8_t * p = (const uint8_t *) x + j*row_size + begin/l.block*(SCALES + l.vectors*VECTOR);
            STRIP(kind, inputs, p, n/l.block, part, four, &in, begin > 0, s + j, stride);
        }
    }
}

// each kind is compiled with its own constants
#define FOR_KIND(inputs, s, y) \
    switch (type) { \
        case GGML_TYPE_Q1_0:  strips(BITS1,   inputs, type, columns, s, stride, x, y, rows); break; \
        case GGML_TYPE_Q2_0:  strips(BITS2,   inputs, type, columns, s, stride, x, y, rows); break; \
        case GGML_TYPE_TQ2_0: strips(TERNARY, inputs, type, columns, s, stride, x, y, rows); break; \
        case GGML_TYPE_TQ1_0: strips(TRITS,   inputs, type, columns, s, stride, x, y, rows); break; \
        default: GGML_ABORT("not a type of mobe_rows16_takes"); \
    }

void mobe_rows16_gemv(enum ggml_type type, int64_t columns, float * s, const void * x, const void * y, int64_t rows) {
    const int64_t stride = 0;
    FOR_KIND(1, s, y)
}

void mobe_rows16_gemm(enum ggml_type type, int64_t columns, float * s, int64_t stride, const void * x, const void * y,
                      int64_t n_inputs, int64_t rows) {
    const int64_t row = type == GGML_TYPE_Q1_0 || type == GGML_TYPE_Q2_0 ? columns/QK8_0*sizeof(block_q8_0) : columns/QK_K*sizeof(block_q8_K);
    for (int64_t i = 0; i < n_inputs;) {
        float *      to   = s + i*stride;
        const char * from = (const char *) y + i*row;
#if AT_ONCE == 8
        if (n_inputs - i >= 8) {
            FOR_KIND(8, to, from)
            i += 8;
            continue;
        }
#endif
        FOR_KIND(4, to, from)
        i += 4;
    }
}

#else

void mobe_rows16_gemv(enum ggml_type type, int64_t columns, float * s, const void * x, const void * y, int64_t rows) {
    GGML_ABORT("mobe_rows16_takes() is false");
}

void mobe_rows16_gemm(enum ggml_type type, int64_t columns, float * s, int64_t stride, const void * x, const void * y,
                      int64_t n_inputs, int64_t rows) {
    GGML_ABORT("mobe_rows16_takes() is false");
}

#endif
