// One float vector of the width the compiler's target has, from GCC's and Clang's vector extension: the same source gives
// AVX-512, AVX2, SSE and NEON. Elsewhere a vector is one float.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
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

static inline mobe_vec mobe_vec_set(float v) { return v - (mobe_vec) {0}; }
static inline mobe_vec mobe_vec_load(const float * p) { mobe_vec v; memcpy(&v, p, sizeof(v)); return v; }
static inline void     mobe_vec_store(float * p, mobe_vec v) { memcpy(p, &v, sizeof(v)); }

// MOBE_VEC bytes, widened (GCC 12 takes __builtin_convertvector of bytes apart, so x86 gets the intrinsic)
static inline mobe_veci mobe_veci_load_u8(const uint8_t * p) {
#if defined(__AVX512F__)
    return (mobe_veci) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));
#elif defined(__AVX2__)
    return (mobe_veci) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p));
#else
    mobe_veci v;
    for (int i = 0; i < MOBE_VEC; i++) {
        v[i] = p[i];
    }
    return v;
#endif
}

static inline mobe_vec mobe_vec_from_int(mobe_veci v) { return __builtin_convertvector(v, mobe_vec); }

static inline float mobe_vec_sum(mobe_vec v) {
    float sum[MOBE_VEC];
    memcpy(sum, &v, sizeof(v));
    for (int n = MOBE_VEC/2; n > 0; n /= 2) {
        for (int i = 0; i < n; i++) {
            sum[i] += sum[i + n];
        }
    }
    return sum[0];
}

static inline mobe_vec mobe_vec_clamp(mobe_vec v, float lo, float hi) {
    const mobe_vec l = mobe_vec_set(lo);
    const mobe_vec h = mobe_vec_set(hi);
    v = (mobe_vec) (((mobe_veci) v & (v > l)) | ((mobe_veci) l & ~(v > l)));
    return (mobe_vec) (((mobe_veci) v & (v < h)) | ((mobe_veci) h & ~(v < h)));
}

// exp(v) to 1.5 units in the last place for |v| <= 87: 2^n * exp(u), u in [-ln2/2, ln2/2], a Taylor series to the 7th power
static inline mobe_vec mobe_vec_exp(mobe_vec v) {
    v = mobe_vec_clamp(v, -87.0f, 87.0f);
    const mobe_vec magic = mobe_vec_set(12582912.0f); // 1.5*2^23: adding it rounds to an integer
    const mobe_vec shift = v*1.44269504f + magic;
    const mobe_vec n     = shift - magic;
    const mobe_vec u     = v - n*0.693145752f - n*1.42860677e-6f; // ln 2 in two parts, so that n*ln2 is exact
    mobe_vec p = mobe_vec_set(1.0f/5040);
    p = p*u + 1.0f/720;
    p = p*u + 1.0f/120;
    p = p*u + 1.0f/24;
    p = p*u + 1.0f/6;
    p = p*u + 0.5f;
    p = p*u + 1.0f;
    p = p*u + 1.0f;
    return (mobe_vec) ((mobe_veci) p + ((mobe_veci) shift << 23)); // the low bits of shift are n
}

#else

#define MOBE_VEC 1

typedef float   mobe_vec;
typedef int32_t mobe_veci;

static inline mobe_vec mobe_vec_set(float v) { return v; }
static inline mobe_vec mobe_vec_load(const float * p) { return *p; }
static inline void     mobe_vec_store(float * p, mobe_vec v) { *p = v; }
static inline mobe_veci mobe_veci_load_u8(const uint8_t * p) { return *p; }
static inline mobe_vec mobe_vec_from_int(mobe_veci v) { return (float) v; }
static inline float    mobe_vec_sum(mobe_vec v) { return v; }
static inline mobe_vec mobe_vec_exp(mobe_vec v) { return expf(v); }

#endif

static inline mobe_vec mobe_vec_silu(mobe_vec v) { return v/(1.0f + mobe_vec_exp(-v)); }

// absolute error below 2e-7: near zero the difference loses relative precision, which a sum over d does not feel
static inline mobe_vec mobe_vec_tanh(mobe_vec v) { return 1.0f - 2.0f/(1.0f + mobe_vec_exp(2.0f*v)); }
