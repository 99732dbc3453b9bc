// ggml_mobe_proj on CUDA (contract and formula: ggml-mobe.h): which kernel, and decoding.
//
//   plain    mobe-cuda-plain.cuh: f32, one use at a time. The comparison for the others, and what devices before Ampere run.
//   decode   mobe_combine: 8 or 32 uses a pass, each quantized block read from memory once for all of them
//   prompt   mobe-cuda-prompt.cu: experts with several tokens each are formed once, then multiplied by tensor cores
//
// Cost rule between the last two: decode forms k*T matrices and stores none, prompt forms at most n, stores and reloads them and
// waits for the host; it is taken from MOBE_PROMPT_REUSE uses an expert on. GGML_CUDA_MOBE=plain|decode|prompt overrules it,
// GGML_CUDA_MOBE=auto does not (unset, the operator stays on the CPU: see ggml_cuda_mobe_proj_supports).

#include "mobe-cuda.cuh"
#include "mobe-cuda-combine.cuh"
#include "mobe-cuda-plain.cuh"
#include "mobe-cuda-prompt.cuh"

#include <cstdlib>
#include <cstring>

#define MOBE_PROMPT_REUSE 4

enum mobe_path { MOBE_PATH_PLAIN, MOBE_PATH_DECODE, MOBE_PATH_PROMPT };

static ggml_mobe_shape mobe_node_shape(const ggml_tensor * dst) {
    return ggml_mobe_proj_shape(dst->src[0], dst->src[1], dst->src[2], dst->src[3]);
}

// GGML_CUDA_MOBE, or NULL: then the operator stays on the CPU
static const char * mobe_asked() {
    static const char * const asked = []() -> const char * {
        const char * value = getenv("GGML_CUDA_MOBE");
        for (const char * known : { "auto", "plain", "decode", "prompt" }) {
            if (value != nullptr && strcmp(value, known) == 0) {
                return known;
            }
        }
        if (value != nullptr && value[0] != 0 && strcmp(value, "0") != 0) {
            GGML_LOG_WARN("GGML_CUDA_MOBE is '%s', expected auto, plain, decode or prompt: factorized experts are computed on the CPU\n", value);
        }
        return nullptr;
    }();
    return asked;
}

static mobe_path mobe_choose(int device, const ggml_tensor * dst) {
    const ggml_mobe_shape s = mobe_node_shape(dst);
    const int cc = ggml_cuda_info().devices[device].cc;
    if (!GGML_CUDA_CC_IS_NVIDIA(cc) || ggml_cuda_highest_compiled_arch(cc) < GGML_CUDA_CC_AMPERE) {
        return MOBE_PATH_PLAIN;
    }
    const char * asked = mobe_asked();
    const bool can_form = mobe_combine_shared<4>(s.m) <= MOBE_SHARED_PLAIN;
    if (asked != nullptr && strcmp(asked, "plain") == 0) {
        return MOBE_PATH_PLAIN;
    }
    if (asked != nullptr && strcmp(asked, "decode") == 0) {
        return MOBE_PATH_DECODE;
    }
    if (asked != nullptr && strcmp(asked, "prompt") == 0 && can_form) {
        return MOBE_PATH_PROMPT;
    }
    return can_form && s.k*s.T >= MOBE_PROMPT_REUSE*s.n ? MOBE_PATH_PROMPT : MOBE_PATH_DECODE;
}

bool ggml_cuda_mobe_proj_needs_sync(int device, const ggml_tensor * dst) {
    return mobe_choose(device, dst) == MOBE_PATH_PROMPT;
}

static bool mobe_reads(ggml_type type) {
    switch (type) {
#define MOBE_TYPE_READ(TYPE) case TYPE:
        MOBE_FOR_TYPES(MOBE_TYPE_READ)
            return true;
        default:
            return false;
    }
}

bool ggml_cuda_mobe_proj_supports(int device, const ggml_tensor * dst) {
    GGML_UNUSED(device);
    // off unless asked for, until bench/gpu.sh has passed on a GPU: so far only nvcc and an emulation have seen these kernels
    if (mobe_asked() == nullptr) {
        return false;
    }
    const ggml_tensor * basis = dst->src[0];
    const ggml_tensor * x     = dst->src[2];
    const ggml_tensor * ids   = dst->src[3];
    if (!mobe_reads(basis->type) || ggml_mobe_proj_check(basis, dst->src[1], x, ids) != nullptr) {
        return false;
    }
    const ggml_mobe_shape s = mobe_node_shape(dst);
    return s.d % 32 == 0 && s.d <= 1 << 20 && // whole units of every type; sizes that an int holds
        s.m <= MOBE_MAX_BASES && s.r <= 65535 && s.n <= 65535 && s.k <= 32768 &&
        s.k*s.T <= 65535*8 && // the grid
        ggml_nbytes(basis) < 16ull << 32 && // offsets of bases, in 32 bits, count 16 bytes
        // x is read 16 bytes at a time
        x->nb[0] == sizeof(float) && x->nb[1] % 16 == 0 && x->nb[2] % 16 == 0 && x->view_offs % 16 == 0 &&
        ids->nb[0] == sizeof(int32_t) && ggml_is_contiguous(dst);
}

static void mobe_launch_decode(ggml_type type, const mobe_args & a, mobe_device device, cudaStream_t stream) {
    // A tile of 8 uses for each of a few tokens reads q4_k's blocks again, out of L2, and by instructions still costs less than one of
    // 32 that is not full; other types have no ring and take longer to dequantize.
    const int  few  = type == GGML_TYPE_Q4_K ? 24 : 8;
    const bool many = a.n_use > few && mobe_combine_shared<4>(a.m) <= MOBE_SHARED_PLAIN;
    switch (type) {
#define MOBE_TYPE_DECODE(TYPE)                                        \
        case TYPE:                                                    \
            if (many) {                                               \
                mobe_combine_launch<TYPE, 4, false>(a, device, stream); \
            } else {                                                  \
                mobe_combine_launch<TYPE, 1, false>(a, device, stream); \
            }                                                         \
            break;
        MOBE_FOR_TYPES(MOBE_TYPE_DECODE)
        default: GGML_ABORT("ggml_mobe_proj: no kernel for bases in %s", ggml_type_name(type));
    }
}

void ggml_cuda_op_mobe_proj(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * basis = dst->src[0];
    const ggml_tensor * mix   = dst->src[1];
    const ggml_tensor * x     = dst->src[2];
    const ggml_tensor * ids   = dst->src[3];
    GGML_ASSERT(ggml_cuda_mobe_proj_supports(ctx.device, dst));

    const ggml_mobe_shape s = mobe_node_shape(dst);
    if (s.k*s.T == 0) {
        return;
    }
    mobe_args a = {};
    a.basis      = (const char *) basis->data;
    a.row_bytes  = basis->nb[1];
    a.mix        = (const float *) mix->data;
    a.x          = (const float *) x->data;
    a.x_slot     = s.x_experts == 1 ? 0 : x->nb[1]/sizeof(float);
    a.x_token    = x->nb[2]/sizeof(float);
    a.ids        = (const int32_t *) ids->data;
    a.ids_token  = ids->nb[1]/sizeof(int32_t);
    a.z          = (float *) dst->data;
    a.d          = s.d;
    a.r          = s.r;
    a.m          = s.m;
    a.m_group    = s.m_group;
    a.n          = s.n;
    a.per_group  = s.n/(s.m/s.m_group);
    a.k          = s.k;
    a.n_use      = s.k*s.T;
    a.row_mix    = s.row_mix;
    a.constant   = basis->op == GGML_OP_NONE && basis->view_src == nullptr;
    a.activation = (ggml_mobe_activation) ggml_get_op_params_i32(dst, 0);

    const ggml_cuda_device_info::cuda_device_info & info = ggml_cuda_info().devices[ctx.device];
    const mobe_device device = { info.nsm, info.smpbo };
    switch (mobe_choose(ctx.device, dst)) {
        case MOBE_PATH_PLAIN:  mobe_launch_plain (basis->type, a, ctx.stream());       break;
        case MOBE_PATH_DECODE: mobe_launch_decode(basis->type, a, device, ctx.stream()); break;
        case MOBE_PATH_PROMPT: mobe_launch_prompt(ctx, basis->type, a, device);          break;
    }
    CUDA_CHECK(cudaGetLastError());
}
