// Mixture-of-Basis-Experts for ggml: the contract of the one operator this project adds.
//
//   z = ggml_mobe_proj(ctx, basis, mix, x, ids, activation)
//
//   basis  [d, r, m]              any type        B of all groups
//   mix    [m/g, n] F32                           alpha: one number per expert and basis of its group
//       or [r, m/g, n] F32                        ... one number per row of the basis as well
//   x      [d, 1 or k, T] F32                     the layer's input (1: the same for all experts of a token)
//   ids    [k, T] I32                             the experts that each token uses, 0 <= id < n
//   z      [r, k, T] F32
//
//   z[:,s,t] = f( sum_j mix[j,e] * basis[:,:,group(e)*(m/g) + j] ) . x[:, s or 0, t]      e = ids[s,t]
//              (row-wise mix: mix[rho,j,e] for row rho)                                  group(e) = e / (n/g)
//
// The number of groups g is m / (m/g): it follows from the shapes. So does the kind of mix: three dimensions are row-wise
// (a layer of one expert has none to share a basis with, so [r, m/g, 1] does not occur). A basis that no expert in use mixes (all its
// coefficients are exactly zero) is neither read nor added. The multiplication by A is ggml_mul_mat_id: after this one for gate and
// up, before it for down, whose bases are on the output side ([r, d, m], each use with an x of its own):
//
//   gate, up   y = ggml_mul_mat_id(A [r, p, n], ggml_mobe_proj(basis [d, r, m], mix, x [d, 1, T], ids), ids)
//   down       y = ggml_mobe_proj(basis [r, d, m], mix, ggml_mul_mat_id(A [p, r, n], h [p, k, T], ids), ids)

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// f, applied element by element to the r x d combination; the numbers are stored in op_params[0]
enum ggml_mobe_activation {
    GGML_MOBE_ACTIVATION_NONE = 0,
    GGML_MOBE_ACTIVATION_SILU = 1,
    GGML_MOBE_ACTIVATION_TANH = 2,
    GGML_MOBE_ACTIVATION_COUNT,
};

// GGUF: "<arch>.mobe.*" keys and tensor suffixes; mobe_gguf/core/names.py holds the same strings
#define GGML_MOBE_VERSION         1 // of files with bases of gate and up
#define GGML_MOBE_VERSION_DOWN    2 // of files with bases of down; the newest that is read
#define GGML_MOBE_KEY_VERSION     "%s.mobe.version"
#define GGML_MOBE_KEY_ACTIVATION  "%s.mobe.activation"
#define GGML_MOBE_KEY_GROUP_COUNT "%s.mobe.group_count"

// "none", "silu", "tanh"; NULL for a number that is none of the enum's
GGML_API const char * ggml_mobe_activation_name(enum ggml_mobe_activation activation);

// the number of that name, or -1
GGML_API int ggml_mobe_activation_from_name(const char * name);

// sizes that follow from the operands' shapes
struct ggml_mobe_shape {
    int64_t d, r, m, m_group, n, k, T;
    int64_t x_experts; // 1 or k
    bool    row_mix;
};

GGML_API struct ggml_mobe_shape ggml_mobe_proj_shape(
        const struct ggml_tensor * basis,
        const struct ggml_tensor * mix,
        const struct ggml_tensor * x,
        const struct ggml_tensor * ids);

// why these operands do not fit together (a static text), or NULL when they do; nothing is read but shapes and types
GGML_API const char * ggml_mobe_proj_check(
        const struct ggml_tensor * basis,
        const struct ggml_tensor * mix,
        const struct ggml_tensor * x,
        const struct ggml_tensor * ids);

// whether dst, which another program describes, is such a node: operands, shape and activation as ggml_mobe_proj() makes them
GGML_API bool ggml_mobe_proj_is_sound(const struct ggml_tensor * dst);

// aborts when ggml_mobe_proj_check() finds a fault
GGML_API struct ggml_tensor * ggml_mobe_proj(
        struct ggml_context       * ctx,
        struct ggml_tensor        * basis,
        struct ggml_tensor        * mix,
        struct ggml_tensor        * x,
        struct ggml_tensor        * ids,
        enum ggml_mobe_activation   activation);

// The plain reference: the formula above, one number after the other, in double precision. Slow, kept for ever:
// every faster kernel is tested against it. All operands contiguous float32 / int32 in the order given above.
GGML_API void ggml_mobe_proj_ref(
        const struct ggml_mobe_shape * shape, enum ggml_mobe_activation activation,
        const float * basis, const float * mix, const float * x, const int32_t * ids, float * z);

#ifdef __cplusplus
}
#endif
