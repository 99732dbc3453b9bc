// A prompt's kernels (mobe-cuda-prompt.cu): a.z is what is written, a.ids and a.x what is read.

#pragma once

#include "mobe-cuda-combine.cuh"

void mobe_launch_prompt(ggml_backend_cuda_context & ctx, ggml_type type, const mobe_args & a, mobe_device device);
