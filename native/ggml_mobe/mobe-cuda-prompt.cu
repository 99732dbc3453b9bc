// ggml_mobe_proj for prompts: each expert in use is formed once, then multiplied by the inputs of all tokens that use it.
//
//   1  the host reads ids, orders the uses by expert (this waits for the device, as ggml's own mul_mat_id fallback does)
//   2  x of the uses, in that order, as f16
//   3  for a batch of experts: mobe_combine writes f(combination) as f16 [experts][r][d], then cuBLAS multiplies (f16 in, f32 sums):
//      all experts at once, each with as many columns as the one with the most uses, or one by one where that would be too many
//   4  the results go to their places
//
// Numbers: formed matrices and x are rounded to f16 (x up to 65504, as in ggml's own f16 products): about 1e-7 more of
// normalized mean square error.

#include "mobe-cuda-prompt.cuh"

#include <vector>

// memory for formed matrices; a batch is at least 32 experts, one pass of mobe_combine
#define MOBE_FORMED_BYTES (512ll*1024*1024)
// columns of a product of all experts at once, for each that is needed: small products take as long as it takes to start them
#define MOBE_PADDED 2

// x16[i][:] = x of use uses[i], zeros where that is -1; grid: uses, columns/512
static __global__ void mobe_gather_x(const mobe_args a, const int32_t * uses, half * x16) {
    const int64_t i = blockIdx.x;
    const int     c = 2*(blockIdx.y*blockDim.x + threadIdx.x);
    const int     u = uses[i];
    if (c < a.d) {
        const float2 v = u < 0 ? make_float2(0.0f, 0.0f) : *(const float2 *) (a.x + (u/a.k)*a.x_token + (u%a.k)*a.x_slot + c);
        *(half2 *) (x16 + i*a.d + c) = __float22half2_rn(v);
    }
}

// z[uses[i]][:] = sorted[i][:]
static __global__ void mobe_scatter_z(const mobe_args a, const int32_t * uses, const float * sorted) {
    const int64_t i = blockIdx.x;
    const int   rho = blockIdx.y*blockDim.x + threadIdx.x;
    if (rho < a.r && uses[i] >= 0) {
        a.z[(int64_t) uses[i]*a.r + rho] = sorted[i*a.r + rho];
    }
}

static void mobe_launch_form(ggml_type type, const mobe_args & a, mobe_device device, cudaStream_t stream) {
    switch (type) {
#define MOBE_TYPE_FORM(TYPE) case TYPE: mobe_combine_launch<TYPE, 4, true>(a, device, stream); break;
        MOBE_FOR_TYPES(MOBE_TYPE_FORM)
        default: GGML_ABORT("ggml_mobe_proj: no kernel for bases in %s", ggml_type_name(type));
    }
}

void mobe_launch_prompt(ggml_backend_cuda_context & ctx, ggml_type type, const mobe_args & a, mobe_device device) {
    cudaStream_t stream = ctx.stream();
    const int n_token = a.n_use/a.k;

    std::vector<int32_t> ids(a.n_use);
    CUDA_CHECK(cudaMemcpy2DAsync(ids.data(), a.k*sizeof(int32_t), a.ids, a.ids_token*sizeof(int32_t), a.k*sizeof(int32_t), n_token,
        cudaMemcpyDeviceToHost, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));

    // a counting sort; first[e]: where the uses of expert e start
    std::vector<int32_t> first(a.n + 1, 0), experts;
    for (int32_t e : ids) {
        GGML_ASSERT(e >= 0 && e < a.n);
        first[e + 1]++;
    }
    for (int e = 0; e < a.n; e++) {
        if (first[e + 1] > 0) {
            experts.push_back(e);
        }
        first[e + 1] += first[e];
    }
    const size_t n_expert = experts.size();

    // the columns of an expert: count of them from begin(i) on
    int32_t most = 0;
    for (int32_t e : experts) {
        most = std::max(most, first[e + 1] - first[e]);
    }
    const bool    together = (int64_t) n_expert*most <= (int64_t) MOBE_PADDED*a.n_use;
    const int64_t n_column = together ? (int64_t) n_expert*most : a.n_use;
    const auto begin = [&](size_t i) { return together ? (int64_t) i*most : (int64_t) first[experts[i]]; };

    std::vector<int32_t> upload(experts); // the experts in use, then the use of each column
    upload.resize(n_expert + n_column, -1);
    std::vector<int64_t> place(a.n);
    for (size_t i = 0; i < n_expert; i++) {
        place[experts[i]] = n_expert + begin(i);
    }
    for (int u = 0; u < a.n_use; u++) {
        upload[place[ids[u]]++] = u;
    }
    ggml_cuda_pool_alloc<int32_t> order(ctx.pool(), upload.size());
    CUDA_CHECK(cudaMemcpyAsync(order.get(), upload.data(), upload.size()*sizeof(int32_t), cudaMemcpyHostToDevice, stream));
    const int32_t * uses = order.get() + n_expert;

    const int64_t matrix = (int64_t) a.r*a.d;
    const int64_t fit    = MOBE_FORMED_BYTES/(matrix*(int64_t) sizeof(half))/32*32;
    const int64_t batch  = std::min<int64_t>(n_expert, std::max<int64_t>(fit, 32));

    ggml_cuda_pool_alloc<half>  x16   (ctx.pool(), n_column*a.d);
    ggml_cuda_pool_alloc<half>  formed(ctx.pool(), batch*matrix);
    ggml_cuda_pool_alloc<float> sorted(ctx.pool(), n_column*a.r);

    mobe_gather_x<<<dim3(n_column, (a.d + 511)/512), 256, 0, stream>>>(a, uses, x16.get());
    CUDA_CHECK(cudaGetLastError());

    CUBLAS_CHECK(cublasSetStream(ctx.cublas_handle(), stream));
    const float one  = 1.0f;
    const float zero = 0.0f;

    for (size_t e0 = 0; e0 < n_expert; e0 += batch) {
        mobe_args form = a;
        form.ids    = order.get() + e0; // "one token that uses all experts of the batch"
        form.n_use  = (int) std::min<int64_t>(batch, n_expert - e0);
        form.k      = form.n_use;
        form.formed = formed.get();
        mobe_launch_form(type, form, device, stream);
        CUDA_CHECK(cudaGetLastError());

        const half * x = x16.get()    + begin(e0)*a.d;
        float      * z = sorted.get() + begin(e0)*a.r;
        if (together) {
            CUBLAS_CHECK(cublasGemmStridedBatchedEx(ctx.cublas_handle(), CUBLAS_OP_T, CUBLAS_OP_N, a.r, most, a.d,
                &one,  formed.get(), CUDA_R_16F, a.d, matrix,
                       x,            CUDA_R_16F, a.d, (int64_t) most*a.d,
                &zero, z,            CUDA_R_32F, a.r, (int64_t) most*a.r,
                form.n_use, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT_TENSOR_OP));
            continue;
        }
        for (int i = 0; i < form.n_use; i++) {
            const int32_t count = first[experts[e0 + i] + 1] - first[experts[e0 + i]];
            CUBLAS_CHECK(cublasGemmEx(ctx.cublas_handle(), CUBLAS_OP_T, CUBLAS_OP_N, a.r, count, a.d,
                &one,  formed.get() + i*matrix, CUDA_R_16F, a.d,
                       x,                       CUDA_R_16F, a.d,
                &zero, z,                       CUDA_R_32F, a.r,
                CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT_TENSOR_OP));
            x += (int64_t) count*a.d;
            z += (int64_t) count*a.r;
        }
    }
    mobe_scatter_z<<<dim3(n_column, (a.r + 255)/256), 256, 0, stream>>>(a, uses, sorted.get());
    CUDA_CHECK(cudaGetLastError());
}
