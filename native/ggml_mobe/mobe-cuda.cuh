// The CUDA kernels' door, called by ggml-cuda's dispatch. Contract and formula: ggml-mobe.h.

#pragma once

#include "ggml.h"

struct ggml_backend_cuda_context;

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

// ggml-cuda's sources are compiled there as well, these kernels are not: the CPU computes the operator
static inline bool ggml_cuda_mobe_proj_supports(int, const ggml_tensor *)   { return false; }
static inline bool ggml_cuda_mobe_proj_needs_sync(int, const ggml_tensor *) { return false; }
static inline void ggml_cuda_op_mobe_proj(ggml_backend_cuda_context &, ggml_tensor *) {
    GGML_ABORT("ggml_mobe_proj: no kernel for this device");
}

#else

// dst is a GGML_OP_MOBE_PROJ node
void ggml_cuda_op_mobe_proj(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// the kernels take these operand types and shapes on this device
bool ggml_cuda_mobe_proj_supports(int device, const ggml_tensor * dst);

// this node waits for the device (a prompt: the host reads ids), so it cannot be part of a CUDA graph
bool ggml_cuda_mobe_proj_needs_sync(int device, const ggml_tensor * dst);

#endif
