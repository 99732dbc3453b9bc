#include "llama-mobe.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-mobe-linear.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>
#include <vector>

static std::string shape_str(const ggml_tensor * t) { return llama_format_tensor_shape(t); }

// the index of "<arch>.mobe.*", which must be there with this type
static int64_t find_key(const llama_model_loader & ml, const char * pattern, gguf_type type, const std::string & basis_name) {
    const std::string key = format(pattern, ml.get_arch_name().c_str());
    const int64_t id = gguf_find_key(ml.metadata, key.c_str());
    if (id < 0) {
        throw std::runtime_error(format("tensor '%s' needs the key '%s', which the file does not hold", basis_name.c_str(), key.c_str()));
    }
    if (gguf_get_kv_type(ml.metadata, id) != type) {
        throw std::runtime_error(format("key '%s' has type %s, expected %s", key.c_str(),
            gguf_type_name(gguf_get_kv_type(ml.metadata, id)), gguf_type_name(type)));
    }
    return id;
}

void llama_mobe::read_keys(const llama_model_loader & ml, const std::string & basis_name) {
    const uint32_t version = gguf_get_val_u32(ml.metadata, find_key(ml, GGML_MOBE_KEY_VERSION, GGUF_TYPE_UINT32, basis_name));
    if (version < GGML_MOBE_VERSION || version > GGML_MOBE_VERSION_DOWN) {
        throw std::runtime_error(format("tensor '%s': the file has MoBE version %u, this build reads versions %d to %d",
            basis_name.c_str(), version, GGML_MOBE_VERSION, GGML_MOBE_VERSION_DOWN));
    }

    const char * name = gguf_get_val_str(ml.metadata, find_key(ml, GGML_MOBE_KEY_ACTIVATION, GGUF_TYPE_STRING, basis_name));
    const int number = ggml_mobe_activation_from_name(name);
    if (number < 0) {
        throw std::runtime_error(format("tensor '%s': unknown MoBE activation '%s'", basis_name.c_str(), name));
    }

    const uint32_t groups = gguf_get_val_u32(ml.metadata, find_key(ml, GGML_MOBE_KEY_GROUP_COUNT, GGUF_TYPE_UINT32, basis_name));
    if (groups == 0) {
        throw std::runtime_error(format("tensor '%s': the MoBE group count is 0", basis_name.c_str()));
    }

    activation   = (ggml_mobe_activation) number;
    group_count  = groups;
    file_version = version;
}

// whether each expert has a basis of its own, which an SVD of each gives. Read from the file itself: tensors get their data later, in memory
// of any device, or (--fit) never.
static bool is_identity(const llama_model_loader & ml, const ggml_tensor * mix) {
    const int64_t n = mix->ne[1];
    if (mix->ne[0] != n || n == 1 || ml.files.empty()) { // a single basis may be repacked; without files data comes from the caller
        return false;
    }
    const auto & weight = ml.require_weight(mix->name);
    const auto & file   = ml.files.at(weight.idx);
    std::vector<float> values(n*n);
    file->seek(weight.offs, SEEK_SET);
    file->read_raw(values.data(), values.size()*sizeof(float));
    for (int64_t i = 0; i < n*n; i++) {
        if (values[i] != (i % (n + 1) == 0 ? 1.0f : 0.0f)) {
            return false;
        }
    }
    return true;
}

ggml_tensor * llama_mobe::create_tensor(
        llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne,
        int flags, bool & handled) {
    handled = false;

    const bool is_gate = tn.tensor == LLM_TENSOR_FFN_GATE_EXPS;
    const bool is_up   = tn.tensor == LLM_TENSOR_FFN_UP_EXPS;
    const bool is_down = tn.tensor == LLM_TENSOR_FFN_DOWN_EXPS;
    if ((!is_gate && !is_up && !is_down) || tn.suffix == nullptr || std::string(tn.suffix) != "weight" || ne.size() != 3) {
        return nullptr;
    }

    const LLM_TN name(tn.arch);
    llm_tensor        kind       =
        is_gate ? LLM_TENSOR_FFN_GATE_BASIS : is_up ? LLM_TENSOR_FFN_UP_BASIS : LLM_TENSOR_FFN_DOWN_BASIS;
    const std::string basis_name = name(kind, "weight", tn.bid).str();
    const std::string mix_name   = name(kind, "mix",    tn.bid).str();

    const ggml_tensor * basis = ml.get_tensor_meta(basis_name.c_str());
    const ggml_tensor * mix   = ml.get_tensor_meta(mix_name.c_str());
    if (basis == nullptr && mix == nullptr) {
        return nullptr;
    }
    if (basis == nullptr || mix == nullptr) {
        throw std::runtime_error(format("missing tensor '%s' (the file holds '%s', which is of no use without it)",
            basis ? mix_name.c_str() : basis_name.c_str(), basis ? basis_name.c_str() : mix_name.c_str()));
    }

    const ggml_tensor * transform = ml.get_tensor_meta(tn.str().c_str());
    if (transform == nullptr) {
        throw std::runtime_error(format("missing tensor '%s' (the file holds its bases '%s')", tn.str().c_str(), basis_name.c_str()));
    }

    if (group_count == 0) {
        read_keys(ml, basis_name);
    }
    if (is_down && file_version < GGML_MOBE_VERSION_DOWN) {
        throw std::runtime_error(format("tensor '%s': bases of down need MoBE version %d, the file has version %u",
            basis_name.c_str(), GGML_MOBE_VERSION_DOWN, file_version));
    }

    // everything is checked here, before any data is read
    for (const ggml_tensor * t : { transform, basis, mix }) {
        if (ggml_is_empty(t)) {
            throw std::runtime_error(format("tensor '%s' is empty: its shape is %s", t->name, shape_str(t).c_str()));
        }
    }
    // llama.cpp would run into such a type only when it multiplies (the basis: when it looks for a backend)
    if (transform->type != GGML_TYPE_F32 && ggml_get_type_traits(transform->type)->to_float == nullptr) {
        throw std::runtime_error(format("tensor '%s' has type %s, which nothing can be multiplied by",
            transform->name, ggml_type_name(transform->type)));
    }

    const std::vector<int64_t> asked(ne); // gate and up: d, p, n; down: p, d, n
    const int64_t n_in  = asked[0];
    const int64_t n_out = asked[1];
    const int64_t n = asked[2];
    const int64_t r = transform->ne[is_down ? 1 : 0];
    const int64_t m = basis->ne[2];
    const int64_t g = group_count;

    const int64_t columns = is_down ? r : n_in; // of a basis
    const int64_t rows    = is_down ? n_out : r;

    if (m % g != 0 || n % g != 0) {
        throw std::runtime_error(format("tensor '%s': %" PRId64 " bases and %" PRId64 " experts do not divide into %" PRId64 " groups",
            basis_name.c_str(), m, n, g));
    }
    if (basis->ne[0] != columns || basis->ne[1] != rows || basis->ne[3] != 1) {
        throw std::runtime_error(format("tensor '%s' has wrong shape; expected [%" PRId64 ", %" PRId64 ", n_basis], got %s",
            basis_name.c_str(), columns, rows, shape_str(basis).c_str()));
    }
    const bool row_mix = mix->ne[2] > 1;
    const bool mix_fits = row_mix ?
        mix->ne[0] == rows && mix->ne[1] == m/g && mix->ne[2] == n && mix->ne[3] == 1 :
        mix->ne[0] == m/g && mix->ne[1] == n && mix->ne[3] == 1;
    if (!mix_fits) {
        throw std::runtime_error(format(
            "tensor '%s' has wrong shape; expected [%" PRId64 ", %" PRId64 "] or [%" PRId64 ", %" PRId64 ", %" PRId64 "], got %s",
            mix_name.c_str(), m/g, n, rows, m/g, n, shape_str(mix).c_str()));
    }
    if (mix->type != GGML_TYPE_F32) {
        throw std::runtime_error(format("tensor '%s' has type %s, expected f32", mix_name.c_str(), ggml_type_name(mix->type)));
    }

    // the mix of a group has too few entries, and a row-wise one needs r*m*k numbers a token
    const bool linear = activation == GGML_MOBE_ACTIVATION_NONE && !row_mix && g == 1;
    if (linear) { // goes where its products can be computed, which is more places than have the operator
        kind = is_gate ? LLM_TENSOR_FFN_GATE_BASIS_LINEAR : is_up ? LLM_TENSOR_FFN_UP_BASIS_LINEAR : LLM_TENSOR_FFN_DOWN_BASIS_LINEAR;
    }

    handled = true;
    ggml_tensor * a = is_down ?
        model.create_tensor_in_file(ml, tn, {n_in, r, n},  flags) :
        model.create_tensor_in_file(ml, tn, {r, n_out, n}, flags);
    const bool own  = linear && !is_down && is_identity(ml, mix);
    const bool flat = linear && !is_down && !own;
    const factors f = {
        /*.basis =*/ flat ?
            model.create_tensor_in_file(ml, name(kind, "weight", tn.bid), {columns, rows*m}, flags | llama_model_loader::TENSOR_ALLOW_RESHAPE) :
            model.create_tensor_in_file(ml, name(kind, "weight", tn.bid), {columns, rows, m}, flags),
        /*.mix   =*/ row_mix ?
            model.create_tensor_in_file(ml, name(kind, "mix", tn.bid), {rows, m/g, n}, flags) :
            model.create_tensor_in_file(ml, name(kind, "mix", tn.bid), {m/g, n},       flags),
        /*.after =*/ is_down,
        /*.linear =*/ linear,
        /*.own    =*/ own,
        /*.flat   =*/ flat,
    };
    if (a != nullptr) { // a skipped layer has no tensors
        by_transform.emplace(a, f);
    }
    return a;
}

ggml_tensor * llama_mobe::example_op(ggml_context * ctx, ggml_tensor * w, int64_t n_expert, int64_t n_expert_used) {
    const std::string name    = w->name;
    const bool        is_mix  = name.size() > 4 && name.compare(name.size() - 4, 4, ".mix") == 0;
    const bool        is_down = name.find("ffn_down_basis") != std::string::npos;

    // a mix goes where bases can go; of what type these are is not known here, so the plainest is asked for
    ggml_tensor * basis = !is_mix ? w :
        w->ne[2] > 1 ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 256, w->ne[0], w->ne[1]) :
                       ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 256, 256,      w->ne[0]);
    ggml_tensor * mix = is_mix ? w : ggml_new_tensor_2d(ctx, GGML_TYPE_F32, w->ne[2], n_expert);
    ggml_tensor * x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, basis->ne[0], is_down ? n_expert_used : 1, 512);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_expert_used, 512);
    return ggml_mobe_proj(ctx, basis, mix, x, ids, GGML_MOBE_ACTIVATION_TANH);
}

static ggml_tensor * flattened(ggml_context * ctx, ggml_tensor * basis) {
    return ggml_reshape_2d(ctx, basis, basis->ne[0], basis->ne[1]*basis->ne[2]);
}

// z[:,s,t] = B_e x[:,t], e = ids[s,t]: of experts with a basis each. The loader has asked for a place where bases can be
// multiplied by mul_mat: nullptr where they cannot be by mul_mat_id.
static ggml_tensor * project_own(ggml_context * ctx, ggml_tensor * basis, ggml_tensor * x, ggml_tensor * ids) {
    ggml_tensor * z = ggml_mul_mat_id(ctx, basis, x, ids); // [r, k, T]
    if (basis->buffer == nullptr || ggml_backend_buffer_is_host(basis->buffer)) {
        return z;
    }
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(basis->buffer));
    return dev != nullptr && ggml_backend_dev_supports_op(dev, z) ? z : nullptr;
}

const llama_mobe::factors * llama_mobe::find(const ggml_tensor * w, bool after) const {
    const auto it = by_transform.find(w);
    return it == by_transform.end() || it->second.after != after ? nullptr : &it->second;
}

ggml_tensor * llama_mobe::factors::bases(ggml_context * ctx) const {
    if (!flat) {
        return basis;
    }
    const int64_t m = mix->ne[0];
    ggml_tensor * all = ggml_reshape_3d(ctx, basis, basis->ne[0], basis->ne[1]/m, m);
    ggml_set_name(all, basis->name); // what llama-imatrix files it under
    return all;
}

ggml_tensor llama_mobe::factors::basis_in_file() const {
    ggml_tensor t = *basis;
    if (flat) {
        t.ne[2] = mix->ne[0];
        t.ne[1] = basis->ne[1]/t.ne[2];
        t.nb[2] = t.nb[1]*t.ne[1];
        t.nb[3] = t.nb[2]*t.ne[2];
    }
    return t;
}

ggml_tensor * llama_mobe::project(ggml_context * ctx, const factors & f, ggml_tensor * x, ggml_tensor * ids) const {
    return ggml_mobe_proj(ctx, f.bases(ctx), f.mix, x, ids, activation);
}

// whether llama.cpp has put the blocks in another order for its own mul_mat, as it does with matrices on a CPU
static bool is_repacked(const ggml_tensor * basis) {
    if (basis->buffer == nullptr || ggml_backend_buffer_is_host(basis->buffer)) {
        return false;
    }
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(basis->buffer));
    return dev != nullptr && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

// The bases of `linear` factors may lie where the operator cannot be computed, and where nothing can without tokens: mul_mat
// divides by their number. So a last layer of which no output is asked for gets an empty tensor.
ggml_tensor * llama_mobe::project_input(
        ggml_context * ctx, const ggml_tensor * w, ggml_tensor * x, ggml_tensor * ids, bool watched) const {
    const factors * f = find(w, false);
    if (f == nullptr) {
        return x;
    }
    if (f->linear && x->ne[1] == 1) {
        if (ids->ne[1] == 0) {
            return ggml_view_3d(ctx, x, w->ne[0], ids->ne[0], 0, x->nb[1], x->nb[2], 0);
        }
        if (!watched || is_repacked(f->basis)) {
            ggml_tensor * own = f->own ? project_own(ctx, f->basis, x, ids) : nullptr;
            return own ? own : mobe_project_linear(ctx, f->flat ? f->basis : flattened(ctx, f->basis), f->mix, x, ids);
        }
    }
    return project(ctx, *f, x, ids);
}

ggml_tensor * llama_mobe::sum_output(
        ggml_context * ctx, const ggml_tensor * w, ggml_tensor * y, ggml_tensor * ids, ggml_tensor * weights, bool watched) const {
    const factors * f = find(w, true);
    if (f == nullptr || !f->linear) {
        return nullptr;
    }
    if (ids->ne[1] == 0) {
        return ggml_view_2d(ctx, y, f->basis->ne[1], 0, y->nb[2], 0);
    }
    if (watched && !is_repacked(f->basis)) {
        return nullptr;
    }
    return mobe_sum_linear(ctx, f->basis, f->mix, y, ids, weights);
}

ggml_tensor * llama_mobe::project_output(ggml_context * ctx, const ggml_tensor * w, ggml_tensor * y, ggml_tensor * ids) const {
    const factors * f = find(w, true);
    return f == nullptr ? y : project(ctx, *f, y, ids);
}

uint32_t llama_mobe::max_nodes() const {
    uint32_t n = 0;
    for (const auto & it : by_transform) {
        if (it.second.linear && it.second.after) {
            n += mobe_sum_linear_nodes();
        }
    }
    return n;
}

int llama_mobe::version() const {
    for (const auto & it : by_transform) {
        if (it.second.after) {
            return GGML_MOBE_VERSION_DOWN;
        }
    }
    return GGML_MOBE_VERSION;
}
