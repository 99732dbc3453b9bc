// What llama.cpp knows of factorized experts: which weight is an A, and what stands between it and the layer's input.
// Compiled into libllama; the patches call it in three places: where a model asks for an expert tensor, where a graph
// multiplies by one, and where a model is saved.

#pragma once

#include "ggml-mobe.h"

#include <cstdint>
#include <initializer_list>
#include <string>
#include <unordered_map>

struct LLM_TN_IMPL;
struct llama_model_base;
struct llama_model_loader;

struct llama_mobe {
    struct factors {
        ggml_tensor * basis; // [d, r, m], or [d, r*m] if flat; down: [r, d, m]
        ggml_tensor * mix;   // [m/g, n] or [r, m/g, n]; down: [d, m/g, n]
        bool          after; // down: A's product is projected; the others: A's input is
        bool          linear; // without activation a token's experts share the products with B_j: ggml's own operators do it, on any backend
        bool          own;    // gate and up, linear, with an identity for a mix: an expert needs its own basis alone
        bool          flat;   // gate and up, linear: one matrix, which is kept and multiplied as ordinary ones are

        ggml_tensor * bases(ggml_context * ctx) const; // the operator's operand: [d, r, m]; down: [r, d, m]
        ggml_tensor   basis_in_file() const;           // basis as the file has it
    };

    // the key is A, blk.L.ffn_{gate,up,down}_exps.weight
    std::unordered_map<const ggml_tensor *, factors> by_transform;

    ggml_mobe_activation activation  = GGML_MOBE_ACTIVATION_NONE;
    uint32_t             group_count = 0; // 0: the file's keys have not been read

    // Takes A, basis and mix of the expert tensor tn (asked for with dimensions ne = {d, p, n}, down {p, d, n}) from the file
    // and returns A.
    // handled is set to false, and nothing done, when the file holds no bases for that tensor.
    // Throws std::runtime_error naming the tensor when the factors or the keys do not fit together.
    ggml_tensor * create_tensor(
            llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne,
            int flags, bool & handled);

    // an example of the operation that uses the weight w (a basis or a mix), for asking a backend whether it supports it
    static ggml_tensor * example_op(ggml_context * ctx, ggml_tensor * w, int64_t n_expert, int64_t n_expert_used);

    // what A of these experts is to be multiplied by: x itself when w is an ordinary expert stack, or down's
    // watched: someone looks at the nodes (llama-imatrix), who is shown the operator whatever stands for it otherwise
    ggml_tensor * project_input(ggml_context * ctx, const ggml_tensor * w, ggml_tensor * x, ggml_tensor * ids, bool watched) const;

    // the layer's output [d, T], of w's product y and the experts' weights [1, k, T] (nullptr: y is weighted already), where
    // the experts can be summed before they are projected; else nullptr
    ggml_tensor * sum_output(
            ggml_context * ctx, const ggml_tensor * w, ggml_tensor * y, ggml_tensor * ids, ggml_tensor * weights, bool watched) const;

    // what the experts make of w's product y: y itself unless w is an A of down
    ggml_tensor * project_output(ggml_context * ctx, const ggml_tensor * w, ggml_tensor * y, ggml_tensor * ids) const;

    // what sum_output's nodes are, at most, in all layers together: llama.cpp reckons with a few for each tensor
    uint32_t max_nodes() const;

    // the layout version of a file with these factors
    int version() const;

private:
    uint32_t file_version = 0;

    const factors * find(const ggml_tensor * w, bool after) const;

    ggml_tensor * project(ggml_context * ctx, const factors & f, ggml_tensor * x, ggml_tensor * ids) const;

    void read_keys(const llama_model_loader & ml, const std::string & basis_name);
};
