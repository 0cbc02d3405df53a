#include <array>

#include "attention/attention.hpp"
#include "bindings/arguments.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Sizes;

// (data_ptr, strides: batch dimensions, head, row, col; whether it is bfloat16; the tensor, which keeps the memory).
using Input = std::optional<std::tuple<Address, Sizes, bool, py::object>>;
// Those of AttentionInputs, in its order.
using Inputs = std::array<Input, 8>;

AttentionInput input(const Input& given, int dims) {
    AttentionInput result;
    if (!given.has_value()) {
        return result;
    }
    const Sizes& strides = std::get<1>(*given);
    const auto batch = static_cast<size_t>(dims);
    if (strides.size() != batch + 3) {
        throw std::invalid_argument("wrong number of strides");
    }
    result.data = bindings::pointer<const void>(std::get<0>(*given));
    result.bfloat16 = std::get<2>(*given);
    std::copy_n(strides.begin(), batch, result.batch);
    result.head = strides[batch];
    result.row = strides[batch + 1];
    result.col = strides[batch + 2];
    return result;
}

AttentionInputs inputs(const Inputs& given, int dims) {
    return {input(given[0], dims), input(given[1], dims), input(given[2], dims), input(given[3], dims),
            input(given[4], dims), input(given[5], dims), input(given[6], dims), input(given[7], dims)};
}

// (heads, kv_heads, queries, keys, d, dv)
template <class T>
AttentionArgs<T> arguments(const Inputs& primal, const Inputs& tangent, const Sizes& batch,
                           const std::array<int64_t, 6>& sizes, double scale, bool causal, bool boolean_mask) {
    AttentionArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.heads = sizes[0];
    args.kv_heads = sizes[1];
    args.queries = sizes[2];
    args.keys = sizes[3];
    args.d = sizes[4];
    args.dv = sizes[5];
    args.scale = static_cast<T>(scale);
    args.causal = causal;
    args.boolean_mask = boolean_mask;
    args.primal = inputs(primal, args.batch.dims);
    args.tangent = inputs(tangent, args.batch.dims);
    return args;
}

// attention_forward and attention_jvp.
template <class T, Status (*Kernel)(const AttentionArgs<T>&)>
py::object bind_outputs(const Inputs& primal, const Inputs& tangent, const Sizes& batch,
                        const std::array<int64_t, 6>& sizes, double scale, bool causal, bool boolean_mask, Address out,
                        Address lse) {
    AttentionArgs<T> args = arguments<T>(primal, tangent, batch, sizes, scale, causal, boolean_mask);
    args.out = bindings::pointer<T>(out);
    args.lse = bindings::pointer<double>(lse);
    return bindings::run([&] { return Kernel(args); });
}

// attention_forward_and_jvp.
template <class T>
py::object bind_outputs_and_tangents(const Inputs& primal, const Inputs& tangent, const Sizes& batch,
                                     const std::array<int64_t, 6>& sizes, double scale, bool causal, bool boolean_mask,
                                     Address out, Address lse, Address out_tangent, Address lse_tangent) {
    AttentionArgs<T> args = arguments<T>(primal, tangent, batch, sizes, scale, causal, boolean_mask);
    args.out = bindings::pointer<T>(out);
    args.lse = bindings::pointer<double>(lse);
    args.tangents.out = bindings::pointer<T>(out_tangent);
    args.tangents.lse = bindings::pointer<double>(lse_tangent);
    return bindings::run([&] { return attention_forward_and_jvp(args); });
}

// q, k and v gradients, and the mask's as an input, or None.
using Grads = std::tuple<Address, Address, Address, Input>;

template <class T>
void take_grads(const Grads& grads, int dims, AttentionResults<T>& to) {
    to.q_grad = bindings::pointer<T>(std::get<0>(grads));
    to.k_grad = bindings::pointer<T>(std::get<1>(grads));
    to.v_grad = bindings::pointer<T>(std::get<2>(grads));
    const Input& mask_grad = std::get<3>(grads);
    if (mask_grad.has_value()) {
        const AttentionInput strides = input(mask_grad, dims);
        to.mask_grad.data = bindings::pointer<T>(std::get<0>(*mask_grad));
        std::copy_n(strides.batch, kMaxBatchDims, to.mask_grad.batch);
        to.mask_grad.head = strides.head;
        to.mask_grad.row = strides.row;
        to.mask_grad.col = strides.col;
    }
}

// attention_backward and attention_backward_jvp.
template <class T, Status (*Kernel)(const AttentionArgs<T>&)>
py::object bind_grads(const Inputs& primal, const Inputs& tangent, const Sizes& batch,
                      const std::array<int64_t, 6>& sizes, double scale, bool causal, bool boolean_mask,
                      const Grads& grads) {
    AttentionArgs<T> args = arguments<T>(primal, tangent, batch, sizes, scale, causal, boolean_mask);
    take_grads<T>(grads, args.batch.dims, args);
    return bindings::run([&] { return Kernel(args); });
}

// attention_backward_and_jvp.
template <class T>
py::object bind_grads_and_tangents(const Inputs& primal, const Inputs& tangent, const Sizes& batch,
                                   const std::array<int64_t, 6>& sizes, double scale, bool causal, bool boolean_mask,
                                   const Grads& grads, const Grads& tangents) {
    AttentionArgs<T> args = arguments<T>(primal, tangent, batch, sizes, scale, causal, boolean_mask);
    take_grads<T>(grads, args.batch.dims, args);
    take_grads<T>(tangents, args.batch.dims, args.tangents);
    return bindings::run([&] { return attention_backward_and_jvp(args); });
}

}  // namespace

void register_attention(py::module_& module) {
    module.def("attention_forward_f32", bind_outputs<float, attention_forward<float>>);
    module.def("attention_forward_f64", bind_outputs<double, attention_forward<double>>);
    module.def("attention_jvp_f32", bind_outputs<float, attention_jvp<float>>);
    module.def("attention_jvp_f64", bind_outputs<double, attention_jvp<double>>);
    module.def("attention_forward_and_jvp_f32", bind_outputs_and_tangents<float>);
    module.def("attention_forward_and_jvp_f64", bind_outputs_and_tangents<double>);
    module.def("attention_backward_f32", bind_grads<float, attention_backward<float>>);
    module.def("attention_backward_f64", bind_grads<double, attention_backward<double>>);
    module.def("attention_backward_jvp_f32", bind_grads<float, attention_backward_jvp<float>>);
    module.def("attention_backward_jvp_f64", bind_grads<double, attention_backward_jvp<double>>);
    module.def("attention_backward_and_jvp_f32", bind_grads_and_tangents<float>);
    module.def("attention_backward_and_jvp_f64", bind_grads_and_tangents<double>);
}

}  // namespace onestep
