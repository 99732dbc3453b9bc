// The plain CUDA kernel of ggml_mobe_proj: a block forms one row for one use, number by number in f32, straight from the formula.
// What the faster kernels are compared with (GGML_CUDA_MOBE=plain).

#pragma once

#include "mobe-cuda-combine.cuh"

#define MOBE_PLAIN_THREADS 128

// grid: r rows, n_use uses
template <ggml_type type> static __global__ void mobe_proj_plain(const mobe_args a) {
    using source = mobe_read<type>;
    const int rho = blockIdx.x;
    const int u   = blockIdx.y;
    const int t   = u/a.k;
    const mobe_mix_row mix = mobe_mix_of(a, a.ids[t*a.ids_token + u%a.k]);
    const float * x = a.x + t*a.x_token + (u%a.k)*a.x_slot;

    float sum = 0.0f;
    const int n_unit = (a.d + MOBE_STRETCH - 1)/MOBE_STRETCH*source::UNITS;
    for (int i = threadIdx.x; i < n_unit; i += blockDim.x) {
        const int stretch = i/source::UNITS;
        const int unit    = i%source::UNITS;
        const int c       = stretch*MOBE_STRETCH + source::first(unit);
        if (c >= a.d) {
            continue;
        }
        float acc[source::VALUES] = {};
        for (int j = 0; j < a.m; j++) {
            const float coef = mobe_coefficient(a, mix, j, rho);
            if (coef == 0.0f) {
                continue;
            }
            float b[source::VALUES];
            source::read(a.basis + ((int64_t) j*a.r + rho)*a.row_bytes, stretch, unit, b);
#pragma unroll
            for (int v = 0; v < source::VALUES; v++) {
                acc[v] += coef*b[v];
            }
        }
#pragma unroll
        for (int v = 0; v < source::VALUES; v++) {
            float f = acc[v];
            switch (a.activation) {
                case GGML_MOBE_ACTIVATION_SILU: f = f/(1.0f + expf(-f)); break;
                case GGML_MOBE_ACTIVATION_TANH: f = tanhf(f);            break;
                default: break;
            }
            sum += f*x[c + source::at(v)];
        }
    }
    __shared__ float shared[MOBE_PLAIN_THREADS/32];
    sum = warp_reduce_sum(sum);
    if (threadIdx.x%32 == 0) {
        shared[threadIdx.x/32] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        a.z[(int64_t) u*a.r + rho] = shared[0] + shared[1] + shared[2] + shared[3];
    }
}

static void mobe_launch_plain(ggml_type type, mobe_args a, cudaStream_t stream) {
    // the grid's second dimension ends at 65535
    for (int u0 = 0, n_use = a.n_use; u0 < n_use; u0 += 32768/a.k*a.k) {
        a.n_use = std::min(n_use - u0, 32768/a.k*a.k);
        const dim3 grid(a.r, a.n_use);
        switch (type) {
#define MOBE_TYPE_PLAIN(TYPE) case TYPE: mobe_proj_plain<TYPE><<<grid, MOBE_PLAIN_THREADS, 0, stream>>>(a); break;
            MOBE_FOR_TYPES(MOBE_TYPE_PLAIN)
            default: GGML_ABORT("ggml_mobe_proj: no kernel for bases in %s", ggml_type_name(type));
        }
        a.ids += a.n_use/a.k*a.ids_token;
        a.x   += a.n_use/a.k*a.x_token;
        a.z   += (int64_t) a.n_use*a.r;
    }
}
