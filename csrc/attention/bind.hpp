// What the attention family's bindings for the CPU and for CUDA share: the arguments that all entries have in common.
#pragma once

#include "attention/attention.hpp"
#include "bindings/arguments.hpp"

namespace onestep::bindings {

// (address, strides, element type; the tensor, which keeps the memory), or None.
using HeadedInput = std::optional<std::tuple<Address, Sizes, int, pybind11::object>>;

inline HeadedOperand headed_input(const HeadedInput& given, int dims) {
    if (!given.has_value()) {
        return {};
    }
    const auto& [address, strides, element, tensor] = *given;
    return headed(address, strides, element, dims);
}

struct AttentionCall {
    BatchShape batch;
    int64_t heads, kv_heads, queries, keys, d, dv;
    double scale;
    bool causal;
    AttentionInputs primal, tangent;
};

// Defines an entry with the arguments of AttentionCall, and after them those of `body`, of which `names` are the names.
template <class... Own, class... Names>
void define_attention(pybind11::module_& module, const std::string& name, void (*body)(const AttentionCall&, Own...),
                      const Names&... names) {
    using pybind11::literals::operator""_a;
    static_assert(sizeof...(Own) == sizeof...(Names));
    using In = const HeadedInput&;
    module.def(
        name.c_str(),
        [body](In q, In k, In v, In mask, In out, In lse, In grad, In grad_lse, In q_tangent, In k_tangent,
               In v_tangent, In mask_tangent, In out_tangent, In lse_tangent, In grad_tangent, In grad_lse_tangent,
               const Sizes& batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t d,
               int64_t dv, double scale, bool causal, Own... own) {
            AttentionCall call{batch_shape(batch), heads, kv_heads, queries, keys, d, dv, scale, causal, {}, {}};
            const auto input = [&](In given) { return headed_input(given, call.batch.dims); };
            call.primal = {input(q),   input(k),   input(v),    input(mask),
                           input(out), input(lse), input(grad), input(grad_lse)};
            call.tangent = {input(q_tangent),   input(k_tangent),   input(v_tangent),    input(mask_tangent),
                            input(out_tangent), input(lse_tangent), input(grad_tangent), input(grad_lse_tangent)};
            body(call, own...);
        },
        "q"_a, "k"_a, "v"_a, "mask"_a, "out"_a, "lse"_a, "grad"_a, "grad_lse"_a, "q_tangent"_a, "k_tangent"_a,
        "v_tangent"_a, "mask_tangent"_a, "out_tangent"_a, "lse_tangent"_a, "grad_tangent"_a, "grad_lse_tangent"_a,
        "batch"_a, "heads"_a, "kv_heads"_a, "queries"_a, "keys"_a, "d"_a, "dv"_a, "scale"_a, "causal"_a, names...);
}

}  // namespace onestep::bindings
