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

// attention_backward and attention_backward_jvp. mask_grad: as an input, or None.
template <class T, Status (*Kernel)(const AttentionArgs<T>&)>
py::object bind_grads(const Inputs& primal, const Inputs& tangent, const Sizes& batch,
                      const std::array<int64_t, 6>& sizes, double scale, bool causal, bool boolean_mask, Address q_grad,
                      Address k_grad, Address v_grad, const Input& mask_grad) {
    AttentionArgs<T> args = arguments<T>(primal, tangent, batch, sizes, scale, causal, boolean_mask);
    args.q_grad = bindings::pointer<T>(q_grad);
    args.k_grad = bindings::pointer<T>(k_grad);
    args.v_grad = bindings::pointer<T>(v_grad);
    if (mask_grad.has_value()) {
        const AttentionInput strides = input(mask_grad, args.batch.dims);
        args.mask_grad.data = bindings::pointer<T>(std::get<0>(*mask_grad));
        std::copy_n(strides.batch, kMaxBatchDims, args.mask_grad.batch);
        args.mask_grad.head = strides.head;
        args.mask_grad.row = strides.row;
        args.mask_grad.col = strides.col;
    }
    return bindings::run([&] { return Kernel(args); });
}

}  // namespace

void register_attention(py::module_& module) {
    module.def("attention_forward_f32", bind_outputs<float, attention_forward<float>>);
    module.def("attention_forward_f64", bind_outputs<double, attention_forward<double>>);
    module.def("attention_jvp_f32", bind_outputs<float, attention_jvp<float>>);
    module.def("attention_jvp_f64", bind_outputs<double, attention_jvp<double>>);
    module.def("attention_backward_f32", bind_grads<float, attention_backward<float>>);
    module.def("attention_backward_f64", bind_grads<double, attention_backward<double>>);
    module.def("attention_backward_jvp_f32", bind_grads<float, attention_backward_jvp<float>>);
    module.def("attention_backward_jvp_f64", bind_grads<double, attention_backward_jvp<double>>);
}

}  // namespace onestep
