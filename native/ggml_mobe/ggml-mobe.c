// The operator's constructor, its checks, and the plain reference. Compiled into ggml-base.

#include "ggml-mobe.h"
#include "ggml-impl.h"

#include <math.h>
#include <string.h>

static const char * const MOBE_ACTIVATION_NAME[GGML_MOBE_ACTIVATION_COUNT] = { "none", "silu", "tanh" };

const char * ggml_mobe_activation_name(enum ggml_mobe_activation activation) {
    if ((int) activation < 0 || activation >= GGML_MOBE_ACTIVATION_COUNT) {
        return NULL;
    }
    return MOBE_ACTIVATION_NAME[activation];
}

int ggml_mobe_activation_from_name(const char * name) {
    for (int i = 0; i < GGML_MOBE_ACTIVATION_COUNT; i++) {
        if (strcmp(name, MOBE_ACTIVATION_NAME[i]) == 0) {
            return i;
        }
    }
    return -1;
}

struct ggml_mobe_shape ggml_mobe_proj_shape(
        const struct ggml_tensor * basis,
        const struct ggml_tensor * mix,
        const struct ggml_tensor * x,
        const struct ggml_tensor * ids) {
    const bool row_mix = mix->ne[2] > 1;
    const struct ggml_mobe_shape shape = {
        /*.d         =*/ basis->ne[0],
        /*.r         =*/ basis->ne[1],
        /*.m         =*/ basis->ne[2],
        /*.m_group   =*/ row_mix ? mix->ne[1] : mix->ne[0],
        /*.n         =*/ row_mix ? mix->ne[2] : mix->ne[1],
        /*.k         =*/ ids->ne[0],
        /*.T         =*/ ids->ne[1],
        /*.x_experts =*/ x->ne[1],
        /*.row_mix   =*/ row_mix,
    };
    return shape;
}

const char * ggml_mobe_proj_check(
        const struct ggml_tensor * basis,
        const struct ggml_tensor * mix,
        const struct ggml_tensor * x,
        const struct ggml_tensor * ids) {
    if (basis->ne[3] != 1 || mix->ne[3] != 1 || x->ne[3] != 1 || ids->ne[2] != 1 || ids->ne[3] != 1) {
        return "an operand has too many dimensions";
    }
    if (mix->type != GGML_TYPE_F32 || x->type != GGML_TYPE_F32 || ids->type != GGML_TYPE_I32) {
        return "mix and x are F32, ids I32";
    }
    if (!ggml_is_contiguous(basis) || !ggml_is_contiguous(mix)) {
        return "basis and mix are contiguous";
    }
    const struct ggml_mobe_shape s = ggml_mobe_proj_shape(basis, mix, x, ids);
    if (s.m_group < 1 || s.m % s.m_group != 0) {
        return "the bases do not divide into groups of mix's size";
    }
    if (s.n % (s.m / s.m_group) != 0) {
        return "the experts do not divide into as many groups as the bases";
    }
    if (s.row_mix && mix->ne[0] != s.r) {
        return "a row-wise mix has one number for each row of the basis";
    }
    if (x->ne[0] != s.d) {
        return "x is as long as a row of the basis";
    }
    if ((s.x_experts != 1 && s.x_experts != s.k) || x->ne[2] != s.T) {
        return "x is [d, 1 or k, T] where ids is [k, T]";
    }
    return NULL;
}

bool ggml_mobe_proj_is_sound(const struct ggml_tensor * dst) {
    for (int i = 0; i < 4; i++) {
        if (dst->src[i] == NULL) {
            return false;
        }
    }
    const struct ggml_tensor * ids = dst->src[3];
    return ggml_mobe_proj_check(dst->src[0], dst->src[1], dst->src[2], ids) == NULL && dst->type == GGML_TYPE_F32 &&
        dst->ne[0] == dst->src[0]->ne[1] && dst->ne[1] == ids->ne[0] && dst->ne[2] == ids->ne[1] && dst->ne[3] == 1 &&
        ggml_mobe_activation_name((enum ggml_mobe_activation) ggml_get_op_params_i32(dst, 0)) != NULL;
}

struct ggml_tensor * ggml_mobe_proj(
        struct ggml_context       * ctx,
        struct ggml_tensor        * basis,
        struct ggml_tensor        * mix,
        struct ggml_tensor        * x,
        struct ggml_tensor        * ids,
        enum ggml_mobe_activation   activation) {
    const char * fault = ggml_mobe_proj_check(basis, mix, x, ids);
    if (fault) {
        GGML_ABORT("ggml_mobe_proj(%s): %s", basis->name, fault);
    }
    GGML_ASSERT(ggml_mobe_activation_name(activation) != NULL);

    struct ggml_tensor * result = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, basis->ne[1], ids->ne[0], ids->ne[1]);

    ggml_set_op_params_i32(result, 0, (int32_t) activation);

    result->op     = GGML_OP_MOBE_PROJ;
    result->src[0] = basis;
    result->src[1] = mix;
    result->src[2] = x;
    result->src[3] = ids;

    return result;
}

static double mobe_activate_ref(double v, enum ggml_mobe_activation activation) {
    switch (activation) {
        case GGML_MOBE_ACTIVATION_SILU: return v / (1.0 + exp(-v));
        case GGML_MOBE_ACTIVATION_TANH: return tanh(v);
        default:                        return v;
    }
}

void ggml_mobe_proj_ref(
        const struct ggml_mobe_shape * shape, enum ggml_mobe_activation activation,
        const float * basis, const float * mix, const float * x, const int32_t * ids, float * z) {
    const struct ggml_mobe_shape s = *shape;

    for (int64_t t = 0; t < s.T; t++) {
        for (int64_t i = 0; i < s.k; i++) {
            const int64_t e = ids[t*s.k + i];
            GGML_ASSERT(e >= 0 && e < s.n);
            const int64_t group = e / (s.n / (s.m / s.m_group));
            const float * x_row = x + (t*s.x_experts + (s.x_experts == 1 ? 0 : i))*s.d;

            for (int64_t rho = 0; rho < s.r; rho++) {
                double sum = 0.0;
                for (int64_t c = 0; c < s.d; c++) {
                    double v = 0.0;
                    for (int64_t j = 0; j < s.m_group; j++) {
                        const float a = s.row_mix ? mix[(e*s.m_group + j)*s.r + rho] : mix[e*s.m_group + j];
                        v += (double) a * basis[((group*s.m_group + j)*s.r + rho)*s.d + c];
                    }
                    sum += mobe_activate_ref(v, activation) * x_row[c];
                }
                z[(t*s.k + i)*s.r + rho] = (float) sum;
            }
        }
    }
}
