// Without an activation a token's experts share the products with B_j, and what is left of the mix is a sum of a few vectors.
// These are the graphs of that form, of ggml's own operators (any backend), with one light step of ours where the CPU computes.

#pragma once

#include "ggml.h"

// Bases of gate and up, [d, r*m] in memory: an ordinary matrix, which the CPU may keep in another order and multiplies at once.
// z[:,s,t] = sum_j mix[j,e] B_j x[:,t], e = ids[s,t]: the products of all bases once a token, then m numbers for each expert.
// mix [m, n], x [d, 1, T], ids [k, T]; returns [r, k, T]
ggml_tensor * mobe_project_linear(ggml_context * ctx, ggml_tensor * bases, ggml_tensor * mix, ggml_tensor * x, ggml_tensor * ids);

// Bases of down, [r, d, m].
// out[:,t] = sum_j B_j (sum_s weights[s,t] mix[j,e] y[:,s,t]), e = ids[s,t]: experts are summed first, so that a token
// multiplies each basis once. y [r, k, T]; weights [1, k, T], or nullptr where y is weighted already; returns [d, T]
ggml_tensor * mobe_sum_linear(
    ggml_context * ctx, ggml_tensor * bases, ggml_tensor * mix, ggml_tensor * y, ggml_tensor * ids, ggml_tensor * weights);

// how many nodes mobe_sum_linear makes, at most
int mobe_sum_linear_nodes();
