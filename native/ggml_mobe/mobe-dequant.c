#include "mobe-dequant.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "mobe-vec.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

static void mobe_dequantize_q4_0(const void * src, float * dst, int64_t n) {
    const block_q4_0 * block = src;
    for (int64_t b = 0; b < n/QK4_0; b++, dst += QK4_0) {
        const float d = GGML_FP16_TO_FP32(block[b].d);
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < QK4_0/2; i++) {
                dst[half*QK4_0/2 + i] = d*(float) (((block[b].qs[i] >> 4*half) & 15) - 8);
            }
        }
    }
}

static void mobe_dequantize_q5_0(const void * src, float * dst, int64_t n) {
    const block_q5_0 * block = src;
    for (int64_t b = 0; b < n/QK5_0; b++, dst += QK5_0) {
        const float d = GGML_FP16_TO_FP32(block[b].d);
        uint32_t high;
        memcpy(&high, block[b].qh, sizeof(high));
        uint8_t fifth[QK5_0];
        for (int i = 0; i < QK5_0; i++) {
            fifth[i] = ((high >> i) & 1) << 4;
        }
        for (int i = 0; i < QK5_0; i += MOBE_VEC) {
            const mobe_veci low = (mobe_veci_load_u8(block[b].qs + i%16) >> 4*(i/16)) & 15;
            mobe_vec_store(dst + i, d*mobe_vec_from_int((low | mobe_veci_load_u8(fifth + i)) - 16));
        }
    }
}

static void mobe_dequantize_q8_0(const void * src, float * dst, int64_t n) {
    const block_q8_0 * block = src;
    for (int64_t b = 0; b < n/QK8_0; b++, dst += QK8_0) {
        const float d = GGML_FP16_TO_FP32(block[b].d);
        for (int i = 0; i < QK8_0; i++) {
            dst[i] = d*(float) block[b].qs[i];
        }
    }
}

// the 6-bit scale and min of sub-block j of q4_K and q5_K
static inline void mobe_scale_min_k4(const uint8_t * s, int j, float * scale, float * min) {
    if (j < 4) {
        *scale = s[j]     & 63;
        *min   = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4);
        *min   = (s[j + 4] >> 4) | ((s[j]     >> 6) << 4);
    }
}

static void mobe_dequantize_q4_k(const void * src, float * dst, int64_t n) {
    const block_q4_K * block = src;
    for (int64_t b = 0; b < n/QK_K; b++, dst += QK_K) {
        const float d    = GGML_FP16_TO_FP32(block[b].d);
        const float dmin = GGML_FP16_TO_FP32(block[b].dmin);
        for (int j = 0; j < QK_K/32; j++) {
            float scale, min;
            mobe_scale_min_k4(block[b].scales, j, &scale, &min);
            const uint8_t * q = block[b].qs + 32*(j/2);
            for (int i = 0; i < 32; i += MOBE_VEC) {
                const mobe_veci v = (mobe_veci_load_u8(q + i) >> 4*(j%2)) & 15;
                mobe_vec_store(dst + 32*j + i, d*scale*mobe_vec_from_int(v) - dmin*min);
            }
        }
    }
}

static void mobe_dequantize_q5_k(const void * src, float * dst, int64_t n) {
    const block_q5_K * block = src;
    for (int64_t b = 0; b < n/QK_K; b++, dst += QK_K) {
        const float d    = GGML_FP16_TO_FP32(block[b].d);
        const float dmin = GGML_FP16_TO_FP32(block[b].dmin);
        for (int j = 0; j < QK_K/32; j++) {
            float scale, min;
            mobe_scale_min_k4(block[b].scales, j, &scale, &min);
            const uint8_t * q = block[b].qs + 32*(j/2);
            for (int i = 0; i < 32; i += MOBE_VEC) {
                const mobe_veci low  = (mobe_veci_load_u8(q + i) >> 4*(j%2)) & 15;
                const mobe_veci high = (mobe_veci_load_u8(block[b].qh + i) >> j) & 1;
                mobe_vec_store(dst + 32*j + i, d*scale*mobe_vec_from_int(low | (high << 4)) - dmin*min);
            }
        }
    }
}

static void mobe_dequantize_q6_k(const void * src, float * dst, int64_t n) {
    const block_q6_K * block = src;
    for (int64_t b = 0; b < n/QK_K; b++, dst += QK_K) {
        const float d = GGML_FP16_TO_FP32(block[b].d);
        for (int j = 0; j < QK_K/16; j++) {
            // 128 values share 64 bytes of ql and 32 of qh; of these, 32 take one nibble and one pair of bits
            const int       part = j/2;  // of 32 values
            const uint8_t * low  = block[b].ql + 64*(part/4) + 32*(part%2) + 16*(j%2);
            const uint8_t * high = block[b].qh + 32*(part/4) + 16*(j%2);
            const float     s    = d*(float) block[b].scales[j];
            for (int i = 0; i < 16; i += MOBE_VEC) {
                const mobe_veci lo = (mobe_veci_load_u8(low + i) >> 4*((part%4)/2)) & 15;
                const mobe_veci hi = (mobe_veci_load_u8(high + i) >> 2*(part%4)) & 3;
                mobe_vec_store(dst + 16*j + i, s*mobe_vec_from_int((lo | (hi << 4)) - 32));
            }
        }
    }
}

ggml_to_float_t mobe_dequantizer(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return NULL;
        case GGML_TYPE_F16:  return (ggml_to_float_t) ggml_cpu_fp16_to_fp32;
        case GGML_TYPE_BF16: return (ggml_to_float_t) ggml_cpu_bf16_to_fp32;
        case GGML_TYPE_Q4_0: return mobe_dequantize_q4_0;
        case GGML_TYPE_Q5_0: return mobe_dequantize_q5_0;
        case GGML_TYPE_Q8_0: return mobe_dequantize_q8_0;
        case GGML_TYPE_Q4_K: return mobe_dequantize_q4_k;
        case GGML_TYPE_Q5_K: return mobe_dequantize_q5_k;
        case GGML_TYPE_Q6_K: return mobe_dequantize_q6_k;
        default:             return ggml_get_type_traits(type)->to_float;
    }
}
