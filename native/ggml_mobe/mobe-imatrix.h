// What llama-imatrix collects of a GGML_OP_MOBE_PROJ node beside the input of each expert (which it files under the name of
// the mix): the weights for quantizing the bases.

#pragma once

#include "ggml-mobe.h"

#include <cstdint>
#include <vector>

// An error E_j of basis j moves the combination of expert e by mix[j,e] E_j (f's slope is at most about one), so a column c
// of basis j weighs sum over uses of mix[j,e]^2 x[c]^2. values is [m][d], counts [m]: both grow by one entry a token, as
// those of a matrix that every token uses. mix, x, ids: host copies, laid out as the node's sources are.
inline void mobe_imatrix_collect_basis(
        const ggml_tensor * node, const char * mix, const char * x, const char * ids,
        std::vector<float> & values, std::vector<int64_t> & counts) {
    const ggml_tensor * tx   = node->src[2];
    const ggml_tensor * tids = node->src[3];
    const ggml_mobe_shape s  = ggml_mobe_proj_shape(node->src[0], node->src[1], tx, tids);
    const int64_t per_group  = s.n/(s.m/s.m_group);

    values.resize(s.m*s.d, 0.0f);
    counts.resize(s.m, 0);

    std::vector<float> squares(s.n*s.m_group); // mix^2, the mean over rows when mix is row-wise
    for (int64_t i = 0; i < s.n*s.m_group; i++) {
        const int64_t n_row = s.row_mix ? s.r : 1;
        const float * a     = (const float *) mix + i*n_row;
        for (int64_t rho = 0; rho < n_row; rho++) {
            squares[i] += a[rho]*a[rho]/n_row;
        }
    }

    for (int64_t t = 0; t < s.T; t++) {
        for (int64_t i = 0; i < s.k; i++) {
            const int32_t e = *(const int32_t *) (ids + t*tids->nb[1] + i*tids->nb[0]);
            GGML_ASSERT(e >= 0 && e < s.n);
            const float * row = (const float *) (x + t*tx->nb[2] + (s.x_experts == 1 ? 0 : i*tx->nb[1]));
            for (int64_t j = 0; j < s.m_group; j++) {
                const float square = squares[e*s.m_group + j];
                if (square == 0.0f) {
                    continue;
                }
                float * acc = values.data() + (e/per_group*s.m_group + j)*s.d;
                for (int64_t c = 0; c < s.d; c++) {
                    acc[c] += square*row[c]*row[c];
                }
            }
        }
    }
    for (int64_t & count : counts) {
        count += s.T;
    }
}
