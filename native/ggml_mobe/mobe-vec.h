// One float vector of the width the compiler's target has, from GCC's and Clang's vector extension: the same source gives
// AVX-512, AVX2, SSE and NEON. Elsewhere a vector is one float.

#pragma once

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#define MOBE_INLINE static inline __attribute__((always_inline))
#define MOBE_ALIGNED __attribute__((aligned(64)))
#else
#define MOBE_INLINE static inline
#define MOBE_ALIGNED
#endif

// For the loops over a fixed number of sums: GCC is kept from making an address register of each load (KEEP), and from copying sums
// to other registers and back in every round (PIN).
#if defined(__GNUC__)
#define MOBE_KEEP(pointer) __asm__("" : "+r"(pointer))
#define MOBE_UNROLL _Pragma("GCC unroll 16")
#if defined(__x86_64__)
#define MOBE_PIN(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define MOBE_PIN(v) __asm__("" : "+w"(v))
#else
#define MOBE_PIN(v)
#endif
#else
#define MOBE_KEEP(pointer)
#define MOBE_PIN(v)
#define MOBE_UNROLL
#endif

#if defined(__GNUC__)

#if defined(__AVX512F__)
#define MOBE_VEC 16
#elif defined(__AVX__)
#define MOBE_VEC 8
#else
#define MOBE_VEC 4
#endif

typedef float   mobe_vec  __attribute__((vector_size(4*MOBE_VEC)));
typedef int32_t mobe_veci __attribute__((vector_size(4*MOBE_VEC)));
typedef uint32_t mobe_vecu __attribute__((vector_size(4*MOBE_VEC))); // where sums and shifts may run over

static inline mobe_vec mobe_vec_set(float v) { return v - (mobe_vec) {0}; }
static inline mobe_vec mobe_vec_load(const float * p) { mobe_vec v; memcpy(&v, p, sizeof(v)); return v; }
static inline void     mobe_vec_store(float * p, mobe_vec v) { memcpy(p, &v, sizeof(v)); }

static inline float mobe_vec_sum(mobe_vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512) v);
#else
    float sum[MOBE_VEC];
    memcpy(sum, &v, sizeof(v));
    for (int n = MOBE_VEC/2; n > 0; n /= 2) {
        for (int i = 0; i < n; i++) {
            sum[i] += sum[i + n];
        }
    }
    return sum[0];
#endif
}

// a*b + c, in one rounding where the processor has that. Compilers may or may not make one of a product and a sum, here so and there so:
// where the same numbers have to come out of several instances of a function, the sums of products are written with this.
static inline mobe_vec mobe_vec_fma(mobe_vec a, mobe_vec b, mobe_vec c) {
#if defined(__AVX512F__)
    return (mobe_vec) _mm512_fmadd_ps((__m512) a, (__m512) b, (__m512) c);
#elif defined(__FMA__)
    return (mobe_vec) _mm256_fmadd_ps((__m256) a, (__m256) b, (__m256) c);
#elif defined(__aarch64__)
    return (mobe_vec) vfmaq_f32((float32x4_t) c, (float32x4_t) a, (float32x4_t) b);
#else
    return a*b + c;
#endif
}

// the same for a polynomial: p*u + c
static inline mobe_vec mobe_vec_horner(mobe_vec p, mobe_vec u, float c) { return mobe_vec_fma(p, u, mobe_vec_set(c)); }

static inline mobe_vec mobe_vec_abs(mobe_vec v) { return (mobe_vec) ((mobe_veci) v & 0x7fffffff); }

static inline mobe_vec mobe_vec_max(mobe_vec a, mobe_vec b) {
#if defined(__AVX512F__)
    return (mobe_vec) _mm512_max_ps((__m512) a, (__m512) b);
#elif defined(__AVX__)
    return (mobe_vec) _mm256_max_ps((__m256) a, (__m256) b);
#else
    const mobe_veci first = a > b;
    return (mobe_vec) (((mobe_veci) a & first) | ((mobe_veci) b & ~first));
#endif
}

// the largest lane
static inline float mobe_vec_most(mobe_vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512) v);
#else
    float most[MOBE_VEC];
    memcpy(most, &v, sizeof(v));
    for (int n = MOBE_VEC/2; n > 0; n /= 2) {
        for (int i = 0; i < n; i++) {
            most[i] = most[i] > most[i + n] ? most[i] : most[i + n];
        }
    }
    return most[0];
#endif
}

typedef float mobe_eight __attribute__((vector_size(32)));

// the largest lane of each of n <= 8 vectors, a constant; 0 for those that are not there
MOBE_INLINE mobe_eight mobe_vec_most_of(const mobe_vec * v, int n) {
    mobe_eight most = { 0 };
#if defined(__AVX512F__)
    if (n == 8) { // all at once: halves that are compared hold more and more of them
        __m512 two[4], four[2];
        MOBE_UNROLL
        for (int i = 0; i < 4; i++) {
            const __m512 a = (__m512) v[i], b = (__m512) v[i + 4];
            two[i] = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        MOBE_UNROLL
        for (int i = 0; i < 2; i++) { // 128 bits of v[i], v[i + 4], v[i + 2], v[i + 6]
            four[i] = _mm512_max_ps(_mm512_shuffle_ps(two[i], two[i + 2], 0x44), _mm512_shuffle_ps(two[i], two[i + 2], 0xee));
        }
        const __m512 all  = _mm512_max_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[0], four[1], 0xee));
        const __m512 last = _mm512_max_ps(all, _mm512_shuffle_f32x4(all, all, 0xb1)); // of four[0] in the first 128 bits, four[1] in the third
        const __m512i order = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 11, 3, 9, 1, 10, 2, 8, 0);
        return (mobe_eight) _mm512_castps512_ps256(_mm512_permutexvar_ps(order, last));
    }
#endif
    for (int i = 0; i < n; i++) {
        most[i] = mobe_vec_most(v[i]);
    }
    return most;
}

// NaN stays NaN
static inline mobe_vec mobe_vec_clamp(mobe_vec v, float lo, float hi) {
    const mobe_vec l = mobe_vec_set(lo);
    const mobe_vec h = mobe_vec_set(hi);
#if defined(__AVX512F__)
    return (mobe_vec) _mm512_max_ps((__m512) l, _mm512_min_ps((__m512) h, (__m512) v)); // a NaN in the second place is kept
#elif defined(__AVX__)
    return (mobe_vec) _mm256_max_ps((__m256) l, _mm256_min_ps((__m256) h, (__m256) v));
#else
    v = (mobe_vec) (((mobe_veci) v & ~(v < l)) | ((mobe_veci) l & (v < l)));
    return (mobe_vec) (((mobe_veci) v & ~(v > h)) | ((mobe_veci) h & (v > h)));
#endif
}

// exp(v) to 1.5 units in the last place for |v| <= 87: 2^n * exp(u), u in [-ln2/2, ln2/2], a Taylor series to the 7th power
static inline mobe_vec mobe_vec_exp(mobe_vec v) {
    v = mobe_vec_clamp(v, -87.0f, 87.0f);
    const mobe_vec magic = mobe_vec_set(12582912.0f); // 1.5*2^23: adding it rounds to an integer
    const mobe_vec shift = mobe_vec_fma(v, mobe_vec_set(1.44269504f), magic);
    const mobe_vec n     = shift - magic;
    const mobe_vec first = mobe_vec_fma(n, mobe_vec_set(-0.693145752f), v); // ln 2 in two parts, so that n*ln2 is exact
    const mobe_vec u     = mobe_vec_fma(n, mobe_vec_set(-1.42860677e-6f), first);
    mobe_vec p = mobe_vec_set(1.0f/5040);
    p = mobe_vec_horner(p, u, 1.0f/720);
    p = mobe_vec_horner(p, u, 1.0f/120);
    p = mobe_vec_horner(p, u, 1.0f/24);
    p = mobe_vec_horner(p, u, 1.0f/6);
    p = mobe_vec_horner(p, u, 0.5f);
    p = mobe_vec_horner(p, u, 1.0f);
    p = mobe_vec_horner(p, u, 1.0f);
    return (mobe_vec) ((mobe_vecu) p + ((mobe_vecu) shift << 23)); // the low bits of shift are n
}

#else

#define MOBE_VEC 1

typedef float   mobe_vec;
typedef int32_t mobe_veci;

static inline mobe_vec mobe_vec_set(float v) { return v; }
static inline mobe_vec mobe_vec_load(const float * p) { return *p; }
static inline void     mobe_vec_store(float * p, mobe_vec v) { *p = v; }
static inline float    mobe_vec_sum(mobe_vec v) { return v; }
static inline mobe_vec mobe_vec_exp(mobe_vec v) { return expf(v); }

static inline mobe_vec mobe_vec_fma(mobe_vec a, mobe_vec b, mobe_vec c) { return fmaf(a, b, c); }
static inline mobe_vec mobe_vec_horner(mobe_vec p, mobe_vec u, float c) { return fmaf(p, u, c); }
static inline mobe_vec mobe_vec_clamp(mobe_vec v, float lo, float hi) { return v < lo ? lo : v > hi ? hi : v; }

#endif

// f comes in two precisions (tests/native/test_operator.py goes through the range of floats): the full one for sums of floats,
// with an error of the same size as those sums', and a quick one for sums of quantized bases, 5e-4 of the value at most,
// which is far below the rounding of the bases themselves.

static inline mobe_vec mobe_vec_silu(mobe_vec v) {
    return mobe_vec_clamp(v, -87.0f, INFINITY)/(1.0f + mobe_vec_exp(-v)); // exp stops growing there
}

// tanh(v) = v P(v^2)/Q(v^2) within 4e-7 of the value: coefficients from a weighted least-squares fit of the relative error up to
// 8.6, where tanh is 1 - 7e-8
static inline mobe_vec mobe_vec_tanh(mobe_vec v) {
    v = mobe_vec_clamp(v, -8.6f, 8.6f);
    const mobe_vec u = v*v;
    mobe_vec p = mobe_vec_horner(mobe_vec_set(1.08187114e-5f), u, 0.00289371843f);
    p = mobe_vec_horner(p, u, 0.128720254f);
    p = mobe_vec_horner(p, u, 0.999999762f);
    mobe_vec q = mobe_vec_horner(mobe_vec_set(2.26667922e-7f), u, 0.000230620688f);
    q = mobe_vec_horner(q, u, 0.0235802326f);
    q = mobe_vec_horner(q, u, 0.462051541f);
    q = mobe_vec_horner(q, u, 1.0f);
    return v*p/q;
}

#if defined(__GNUC__) && defined(__AVX512F__) && defined(__AVX512DQ__)

static inline mobe_vec mobe_vec_reciprocal(mobe_vec v) { return (mobe_vec) _mm512_rcp14_ps((__m512) v); } // to 2^-14

// v/(1 + 2^y), y = -v/ln 2: 2^(y - floor(y)) by a polynomial of degree 4 (2.6e-6), the power of two by one instruction that
// saturates, so that nothing needs a bound
static inline mobe_vec mobe_vec_silu_quick(mobe_vec v) {
    const __m512 y = _mm512_mul_ps((__m512) v, _mm512_set1_ps(-1.44269504f));
    const mobe_vec u = (mobe_vec) _mm512_reduce_ps(y, 0x09); // y - floor(y)
    mobe_vec p = mobe_vec_horner(mobe_vec_set(0.01353413f), u, 0.05201149f);
    p = mobe_vec_horner(p, u, 0.24144278f);
    p = mobe_vec_horner(p, u, 0.69300382f);
    p = mobe_vec_horner(p, u, 1.0000026f);
    return v*mobe_vec_reciprocal(1.0f + (mobe_vec) _mm512_scalef_ps((__m512) p, y));
}

#else

// estimates, within 3.7e-4
static inline mobe_vec mobe_vec_reciprocal(mobe_vec v) {
#if defined(__AVX__) && MOBE_VEC == 8
    return (mobe_vec) _mm256_rcp_ps((__m256) v);
#elif defined(__aarch64__) && MOBE_VEC == 4
    const float32x4_t e = vrecpeq_f32((float32x4_t) v);
    return (mobe_vec) vmulq_f32(e, vrecpsq_f32((float32x4_t) v, e));
#else
    return 1.0f/v;
#endif
}

#if MOBE_VEC == 1
static inline mobe_vec mobe_vec_silu_quick(mobe_vec v) { return mobe_vec_silu(v); }
#else
// v/(1 + 2^y), y = -v/ln 2: a Taylor series of 2^(y - n) to the 4th power (4.2e-5), n the nearest integer
static inline mobe_vec mobe_vec_silu_quick(mobe_vec v) {
    v = mobe_vec_clamp(v, -87.0f, INFINITY);
    const mobe_vec magic = mobe_vec_set(12582912.0f); // 1.5*2^23: adding it rounds to an integer, in the low bits
    const mobe_vec y     = mobe_vec_clamp(v, -87.0f, 87.0f)*mobe_vec_set(-1.44269504f);
    const mobe_vec n     = y + magic;
    const mobe_vec u     = y - (n - magic);
    mobe_vec p = mobe_vec_horner(mobe_vec_set(0.00961812911f), u, 0.0555041087f);
    p = mobe_vec_horner(p, u, 0.240226507f);
    p = mobe_vec_horner(p, u, 0.693147181f);
    p = mobe_vec_horner(p, u, 1.0f);
    return v*mobe_vec_reciprocal(1.0f + (mobe_vec) ((mobe_vecu) p + ((mobe_vecu) n << 23)));
}
#endif

#endif

#if defined(__GNUC__) && defined(__AVX512F__)

// parabolas [power][segment]: a segment is a quarter of an octave from 2^-5 to 8, numbered by the five bits of a float that tell them
// apart; the first goes on down to 0 and has no constant. Each is a fit of the smallest relative error.
static const float mobe_tanh_segments[3][32] MOBE_ALIGNED = {
    {
        0.65705776f, 0.8211987f, 0.91212559f, 0.95849228f, 0.98617762f, 0.99731278f, 0.99950588f, 0.99991274f,
        0.0f, -2.6055863e-05f, -4.30609e-05f, -6.6136548e-05f, -0.00011273564f, -0.00020568783f, -0.00033813214f, -0.00051612803f,
        -0.00087017618f, -0.0015596504f, -0.0025094589f, -0.003735052f, -0.0060194703f, -0.010016044f, -0.014699423f, -0.019560929f,
        -0.025470695f, -0.028005563f, -0.019242914f, 0.0040607029f, 0.065905213f, 0.19067888f, 0.337603f, 0.48179007f,
    },
    {
        0.24057323f, 0.10740784f, 0.046046995f, 0.019268805f, 0.0054770904f, 0.00088964624f, 0.00014044353f, 2.171857e-05f,
        1.0000635f, 1.0018306f, 1.0025566f, 1.0034009f, 1.0048597f, 1.0072417f, 1.0100693f, 1.0133258f,
        1.018869f, 1.0277072f, 1.0378506f, 1.0490679f, 1.0669702f, 1.09264f, 1.1177074f, 1.1400166f,
        1.1633735f, 1.1719952f, 1.1489874f, 1.0959405f, 0.97526979f, 0.77533054f, 0.57876366f, 0.4133352f,
    },
    {
        -0.043517619f, -0.016489955f, -0.0061328951f, -0.0022652543f, -0.00054659898f, -7.4013384e-05f, -1.0017342e-05f, -1.3557129e-06f,
        -0.013013719f, -0.042803742f, -0.050557043f, -0.058283184f, -0.069704965f, -0.084977567f, -0.10007764f, -0.11498003f,
        -0.13668582f, -0.16503295f, -0.1921303f, -0.21780744f, -0.2528972f, -0.29415059f, -0.3277123f, -0.35331714f,
        -0.37640783f, -0.38372055f, -0.36861333f, -0.338413f, -0.27952993f, -0.19936736f, -0.13358411f, -0.086114645f,
    },
};

// A parabola looked up for each lane: a division takes longer. 1.1e-4 of the value at most.
static inline mobe_vec mobe_vec_tanh_quick(mobe_vec v) {
    const __m512  a = _mm512_min_ps(_mm512_set1_ps(7.99f), _mm512_abs_ps((__m512) v)); // a NaN in the second place is kept
    const __m512i i = _mm512_srli_epi32(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(0x3d000000)), 21); // 2^-5
    __m512 p[3];
    for (int k = 0; k < 3; k++) {
        p[k] = _mm512_permutex2var_ps(_mm512_load_ps(mobe_tanh_segments[k]), i, _mm512_load_ps(mobe_tanh_segments[k] + 16));
    }
    const __m512i t = _mm512_castps_si512(_mm512_fmadd_ps(_mm512_fmadd_ps(p[2], a, p[1]), a, p[0]));
    return (mobe_vec) _mm512_ternarylogic_epi32(t, (__m512i) v, _mm512_set1_epi32((int32_t) 0x80000000), 0xd8); // the sign of v
}

#else

// as mobe_vec_tanh, with fewer terms, up to 5.1, where tanh is 1 - 7e-5
static inline mobe_vec mobe_vec_tanh_quick(mobe_vec v) {
    v = mobe_vec_clamp(v, -5.1f, 5.1f);
    const mobe_vec u = v*v;
    const mobe_vec p = mobe_vec_horner(mobe_vec_horner(mobe_vec_set(0.000661027967f), u, 0.10210792f), u, 0.999941945f);
    const mobe_vec q = mobe_vec_horner(mobe_vec_horner(mobe_vec_set(0.0127250608f), u, 0.435090989f), u, 1.0f);
    return v*p*mobe_vec_reciprocal(q);
}

#endif

// n bytes for the first-level cache, or (far) the second: that many fetched into the first would wait for one another
static inline void mobe_prefetch(const void * p, size_t n, bool far) {
#if defined(__GNUC__)
    for (size_t i = 0; i < n; i += 64) {
        if (far) {
            __builtin_prefetch((const char *) p + i, 0, 2);
        } else {
            __builtin_prefetch((const char *) p + i);
        }
    }
#else
    (void) p;
    (void) n;
    (void) far;
#endif
}
