// Bindings of the attention family: one function for each entry and type.
#include <algorithm>
#include <array>

#include "attention/attention.hpp"
#include "bindings/arguments.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Sizes;

// (address, strides, element type; the tensor, which keeps the memory).
using Input = std::optional<std::tuple<Address, Sizes, int, py::object>>;
// Those of AttentionInputs, in its order.
using Inputs = std::array<Input, 8>;

HeadedOperand input(const Input& given, int dims) {
    if (!given.has_value()) {
        return {};
    }
    const auto& [address, strides, element, tensor] = *given;
    return bindings::headed(address, strides, element, dims);
}

AttentionInputs inputs(const Inputs& given, int dims) {
    return {input(given[0], dims), input(given[1], dims), input(given[2], dims), input(given[3], dims),
            input(given[4], dims), input(given[5], dims), input(given[6], dims), input(given[7], dims)};
}

// `sizes` are (heads, kv_heads, queries, keys, d, dv).
template <class T>
AttentionArgs<T> arguments(const Inputs& primal, const Inputs& tangent, const Sizes& batch,
                           const std::array<int64_t, 6>& sizes, double scale, bool causal) {
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
    args.primal = inputs(primal, args.batch.dims);
    args.tangent = inputs(tangent, args.batch.dims);
    return args;
}

// attention_forward and attention_jvp.
template <class T, Status (*Kernel)(const AttentionArgs<T>&)>
void bind_outputs(const Inputs& primal, const Inputs& tangent, const Sizes& batch, const std::array<int64_t, 6>& sizes,
                  double scale, bool causal, Address out, Address lse) {
    AttentionArgs<T> args = arguments<T>(primal, tangent, batch, sizes, scale, causal);
    args.out = bindings::pointer<T>(out);
    args.lse = bindings::pointer<double>(lse);
    bindings::run([&] { return Kernel(args); });
}

// attention_forward_and_jvp.
template <class T>
void bind_outputs_and_tangents(const Inputs& primal, const Inputs& tangent, const Sizes& batch,
                               const std::array<int64_t, 6>& sizes, double scale, bool causal, Address out, Address lse,
                               Address out_tangent, Address lse_tangent) {
    AttentionArgs<T> args = arguments<T>(primal, tangent, batch, sizes, scale, causal);
    args.out = bindings::pointer<T>(out);
    args.lse = bindings::pointer<double>(lse);
    args.tangents.out = bindings::pointer<T>(out_tangent);
    args.tangents.lse = bindings::pointer<double>(lse_tangent);
    bindings::run([&] { return attention_forward_and_jvp(args); });
}

// The gradients of q, k and v by their addresses; that of the mask with its strides, as an input has them, or None.
using Grads = std::tuple<Address, Address, Address, Input>;

template <class T>
void take_grads(const Grads& grads, int dims, AttentionResults<T>& to) {
    to.q_grad = bindings::pointer<T>(std::get<0>(grads));
    to.k_grad = bindings::pointer<T>(std::get<1>(grads));
    to.v_grad = bindings::pointer<T>(std::get<2>(grads));
    const Input& mask_grad = std::get<3>(grads);
    if (mask_grad.has_value()) {
        const HeadedOperand strides = input(mask_grad, dims);
        to.mask_grad.data = bindings::pointer<T>(std::get<0>(*mask_grad));
        std::copy_n(strides.batch, kMaxBatchDims, to.mask_grad.batch);
        to.mask_grad.head = strides.head;
        to.mask_grad.row = strides.row;
        to.mask_grad.col = strides.col;
    }
}

// attention_backward and attention_backward_jvp.
template <class T, Status (*Kernel)(const AttentionArgs<T>&)>
void bind_grads(const Inputs& primal, const Inputs& tangent, const Sizes& batch, const std::array<int64_t, 6>& sizes,
                double scale, bool causal, const Grads& grads) {
    AttentionArgs<T> args = arguments<T>(primal, tangent, batch, sizes, scale, causal);
    take_grads<T>(grads, args.batch.dims, args);
    bindings::run([&] { return Kernel(args); });
}

// attention_backward_and_jvp.
template <class T>
void bind_grads_and_tangents(const Inputs& primal, const Inputs& tangent, const Sizes& batch,
                             const std::array<int64_t, 6>& sizes, double scale, bool causal, const Grads& grads,
                             const Grads& tangents) {
    AttentionArgs<T> args = arguments<T>(primal, tangent, batch, sizes, scale, causal);
    take_grads<T>(grads, args.batch.dims, args);
    take_grads<T>(tangents, args.batch.dims, args.tangents);
    bindings::run([&] { return attention_backward_and_jvp(args); });
}

// One entry, with the arguments that all entries have in common and then `own`.
template <class Function, class... Own>
void define(py::module_& module, const std::string& name, Function function, const Own&... own) {
    module.def(name.c_str(), function, py::arg("primal"), py::arg("tangent"), py::arg("batch"), py::arg("sizes"),
               py::arg("scale"), py::arg("causal"), own...);
}

template <class T>
void register_attention_kernels(py::module_& module, const std::string& suffix) {
    const py::arg out("out"), lse("lse"), grads("grads");
    define(module, "attention_forward_" + suffix, bind_outputs<T, attention_forward<T>>, out, lse);
    define(module, "attention_jvp_" + suffix, bind_outputs<T, attention_jvp<T>>, out, lse);
    define(module, "attention_forward_and_jvp_" + suffix, bind_outputs_and_tangents<T>, out, lse,
           py::arg("out_tangent"), py::arg("lse_tangent"));
    define(module, "attention_backward_" + suffix, bind_grads<T, attention_backward<T>>, grads);
    define(module, "attention_backward_jvp_" + suffix, bind_grads<T, attention_backward_jvp<T>>, grads);
    define(module, "attention_backward_and_jvp_" + suffix, bind_grads_and_tangents<T>, grads, py::arg("tangents"));
}

}  // namespace

void register_attention(py::module_& module) {
    register_attention_kernels<float>(module, "f32");
    register_attention_kernels<double>(module, "f64");
}

}  // namespace onestep
