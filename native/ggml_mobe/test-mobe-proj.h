// Cases of GGML_OP_MOBE_PROJ for llama.cpp's test-backend-ops, included there.

// z = f(sum_j mix[j,e] * basis_j) . x
struct test_mobe_proj : public test_case {
    const ggml_type type_basis;
    const int64_t d;
    const int64_t r;
    const int64_t n_basis;
    const int     n_expert;
    const int     n_used;
    const int64_t n_tokens;
    const int     n_group;
    const bool    row_mix;
    const bool    broadcast; // one x for all experts of a token
    const ggml_mobe_activation activation;

    std::string vars() override {
        return VARS_TO_STR10(type_basis, d, r, n_basis, n_expert, n_used, n_tokens, n_group, row_mix, broadcast) +
            ",activation=" + ggml_mobe_activation_name(activation);
    }

    // float32 sums in another order; the basis itself is dequantized to the same numbers on both sides. The CPU kernel rounds what
    // multiplies quantized bases to 8 bit, in a prompt also the formed rows and x, as ggml's own products do with x: up to
    // 1.4e-4. A few dozen results may by chance be small beside what they are sums of.
    double max_nmse_err() override {
        const bool few = r*n_used*n_tokens < 1000;
        return !ggml_is_quantized(type_basis) ? 1e-9 : few ? 5e-4 : 3e-4;
    }

    // a backend may round the combination or x to 16 bit, or to 8 bit with a scale a block
    double max_nmse_err(ggml_backend_t backend) override {
        return ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU ? max_nmse_err() : 5e-4;
    }

    uint64_t op_flops(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return 2*d*r*n_used*n_tokens*(n_basis/n_group + 1);
    }

    test_mobe_proj(ggml_type type_basis, int64_t d, int64_t r, int64_t n_basis, int n_expert, int n_used, int64_t n_tokens,
            int n_group, bool row_mix, bool broadcast, ggml_mobe_activation activation) :
        type_basis(type_basis), d(d), r(r), n_basis(n_basis), n_expert(n_expert), n_used(n_used), n_tokens(n_tokens),
        n_group(n_group), row_mix(row_mix), broadcast(broadcast), activation(activation) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * basis = ggml_new_tensor_3d(ctx, type_basis, d, r, n_basis);
        ggml_set_name(basis, "basis");

        ggml_tensor * mix = row_mix ?
            ggml_new_tensor_3d(ctx, GGML_TYPE_F32, r, n_basis/n_group, n_expert) :
            ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_basis/n_group, n_expert);
        ggml_set_name(mix, "mix");

        ggml_tensor * x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d, broadcast ? 1 : n_used, n_tokens);
        ggml_set_name(x, "x");

        // the router's choice is a view of a longer argsort
        ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_expert, n_tokens);
        ids = ggml_view_2d(ctx, ids, n_used, n_tokens, ids->nb[1], 0);
        ggml_set_name(ids, "view_of_ids");

        ggml_tensor * out = ggml_mobe_proj(ctx, basis, mix, x, ids, activation);
        ggml_set_name(out, "out");
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        init_mul_mat_id_tensors(ctx, n_expert);

        // zeros where a sparse mixing has them: a basis that nobody mixes, and experts with few terms; a dense one has none
        ggml_tensor * mix = ggml_get_tensor(ctx, "mix");
        std::vector<float> data(ggml_nelements(mix));
        ggml_backend_tensor_get(mix, data.data(), 0, ggml_nbytes(mix));
        const int64_t per_basis = row_mix ? r : 1;
        const int64_t m_group   = n_basis/n_group;
        for (size_t i = 0; i < data.size(); i++) {
            const int64_t j = (i/per_basis)%m_group;
            const int64_t e = i/per_basis/m_group;
            if (m_group > 2 && n_expert % 5 != 0 && (j == 1 || (e % 2 == 0 && j > 2))) {
                data[i] = 0.0f;
            }
        }
        ggml_backend_tensor_set(mix, data.data(), 0, ggml_nbytes(mix));
    }

    void reinit_perf_iter(ggml_context * ctx) override { init_mul_mat_id_ids(ctx, n_expert); }
};

// Three in a row as one graph, each with the one in front, or what another operator makes of it, for x: where kernels may start before
// the one in front is done, they must not read it too early.
struct test_mobe_proj_chain : public test_case {
    const ggml_type type_basis;
    const int64_t n_tokens;

    static constexpr int64_t size     = 512; // of d and r
    static constexpr int64_t n_basis  = 16;
    static constexpr int     n_expert = 16;
    static constexpr int     n_used   = 4;

    test_mobe_proj_chain(ggml_type type_basis, int64_t n_tokens) : type_basis(type_basis), n_tokens(n_tokens) {}

    std::string vars() override { return VARS_TO_STR2(type_basis, n_tokens) + ",chain=3"; }
    bool   run_whole_graph() override { return true; }
    double max_nmse_err()    override { return 3e-3; } // what is read too early gives about 1

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_expert, n_tokens);
        ids = ggml_view_2d(ctx, ids, n_used, n_tokens, ids->nb[1], 0);
        ggml_tensor * x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, size, n_used, n_tokens);
        for (int i = 0; i < 3; i++) {
            ggml_tensor * basis = ggml_new_tensor_3d(ctx, type_basis, size, size, n_basis);
            ggml_tensor * mix   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_basis, n_expert);
            if (i != 1) {
                x = ggml_scale(ctx, x, 0.1f);
            }
            x = ggml_mobe_proj(ctx, basis, mix, x, ids, GGML_MOBE_ACTIVATION_TANH);
        }
        return x;
    }

    void initialize_tensors(ggml_context * ctx) override { init_mul_mat_id_tensors(ctx, n_expert); }
};

static void add_mobe_proj_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type : all_types) {
        for (int64_t n_tokens : { 1, 3, 33 }) {
            cases.emplace_back(new test_mobe_proj(type, 512, 24, 4, 16, 4, n_tokens, 1, false, true, GGML_MOBE_ACTIVATION_TANH));
        }
    }
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K }) {
        for (int activation = 0; activation < GGML_MOBE_ACTIVATION_COUNT; activation++) {
            for (bool row_mix : { false, true }) {
                for (int n_group : { 1, 2 }) {
                    for (int64_t n_tokens : { 1, 2, 64 }) {
                        cases.emplace_back(new test_mobe_proj(type, 256, 33, 8, 12, 3, n_tokens, n_group, row_mix, n_tokens != 2,
                            (ggml_mobe_activation) activation));
                    }
                }
            }
        }
    }
    // down: an x for each use, rows of a basis shorter than there are of them; decoding, a few tokens, a prompt
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q5_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K }) {
        for (bool row_mix : { false, true }) {
            for (int64_t n_tokens : { 1, 5, 64 }) {
                cases.emplace_back(new test_mobe_proj(type, 256, 320, 4, 16, 4, n_tokens, 2, row_mix, false, GGML_MOBE_ACTIVATION_TANH));
            }
        }
    }
    // more bases than a tensor core takes at once, dense and sparse; rows longer than a block's warps take, more than it keeps sums of
    for (int64_t n_tokens : { 1, 4 }) {
        cases.emplace_back(new test_mobe_proj(GGML_TYPE_Q4_K, 2304,  300, 40, 25, 8, n_tokens, 1, false, true, GGML_MOBE_ACTIVATION_TANH));
        cases.emplace_back(new test_mobe_proj(GGML_TYPE_Q4_K,  256, 2400, 40, 16, 8, n_tokens, 1, false, true, GGML_MOBE_ACTIVATION_TANH));
    }
    cases.emplace_back(new test_mobe_proj(GGML_TYPE_Q5_0, 96, 256, 6, 24, 4, 40, 1, false, false, GGML_MOBE_ACTIVATION_SILU));
    cases.emplace_back(new test_mobe_proj(GGML_TYPE_F32,  77, 130, 3, 7, 2, 17, 1, true, false, GGML_MOBE_ACTIVATION_NONE));
    // lengths that are no multiple of a vector, of a block of 256, of the rows a thread takes
    cases.emplace_back(new test_mobe_proj(GGML_TYPE_F32,  77,  5,  3,  7, 2, 17, 1, false, true, GGML_MOBE_ACTIVATION_SILU));
    cases.emplace_back(new test_mobe_proj(GGML_TYPE_Q5_0, 288, 1,  1,  9, 9,  5, 1, false, true, GGML_MOBE_ACTIVATION_SILU));
    cases.emplace_back(new test_mobe_proj(GGML_TYPE_Q4_0, 416, 11, 6, 20, 8, 40, 2, false, true, GGML_MOBE_ACTIVATION_TANH));
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K }) {
        for (int64_t n_tokens : { 1, 3 }) {
            cases.emplace_back(new test_mobe_proj_chain(type, n_tokens));
        }
    }
    cases.emplace_back(new test_mobe_proj_chain(GGML_TYPE_Q4_K, 16)); // as many as a prompt
}

static void add_mobe_proj_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type : { GGML_TYPE_Q4_K, GGML_TYPE_Q8_0 }) {
        for (int64_t n_tokens : { 1, 8, 512 }) {
            cases.emplace_back(new test_mobe_proj(type, 2048, 768, 32, 128, 8, n_tokens, 1, false, true, GGML_MOBE_ACTIVATION_TANH));
        }
    }
}
