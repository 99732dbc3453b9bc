// The CPU kernel's door, called by ggml-cpu's dispatch. What forms rows of a matrix, for whoever keeps them, is in mobe-form.h.

#pragma once

#include "ggml-mobe.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// dst is a GGML_OP_MOBE_PROJ node; every thread of the pool calls it with its own params->ith
void ggml_compute_forward_mobe_proj(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of params->wdata that n_tasks threads need for this node
size_t ggml_mobe_proj_cpu_work_size(const struct ggml_tensor * dst, int n_tasks);

// the kernel takes these operand types and shapes
bool ggml_mobe_proj_cpu_supports(const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
