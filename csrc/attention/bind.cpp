// Bindings of the attention family: one function for each entry and type.
#include "attention/bind.hpp"

#include <algorithm>

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::AttentionCall;
using bindings::HeadedInput;
using py::literals::operator""_a;

template <class T>
AttentionArgs<T> arguments(const AttentionCall& call) {
    AttentionArgs<T> args;
    args.batch = call.batch;
    args.heads = call.heads;
    args.kv_heads = call.kv_heads;
    args.queries = call.queries;
    args.keys = call.keys;
    args.d = call.d;
    args.dv = call.dv;
    args.scale = static_cast<T>(call.scale);
    args.causal = call.causal;
    args.primal = call.primal;
    args.tangent = call.tangent;
    return args;
}

// The gradients of q, k and v by their addresses; that of the mask with its strides, as an input has them, or None.
template <class T>
void set_grads(Address q_grad, Address k_grad, Address v_grad, const HeadedInput& mask_grad, int dims,
               AttentionResults<T>& to) {
    to.q_grad = bindings::pointer<T>(q_grad);
    to.k_grad = bindings::pointer<T>(k_grad);
    to.v_grad = bindings::pointer<T>(v_grad);
    if (mask_grad.has_value()) {
        const HeadedOperand strides = bindings::headed_input(mask_grad, dims);
        to.mask_grad.data = bindings::pointer<T>(std::get<0>(*mask_grad));
        std::copy_n(strides.batch, kMaxBatchDims, to.mask_grad.batch);
        to.mask_grad.head = strides.head;
        to.mask_grad.row = strides.row;
        to.mask_grad.col = strides.col;
    }
}

// attention_forward and attention_jvp.
template <class T, Status (*Kernel)(const AttentionArgs<T>&)>
void bind_outputs(const AttentionCall& call, Address to_out, Address to_lse) {
    AttentionArgs<T> args = arguments<T>(call);
    args.out = bindings::pointer<T>(to_out);
    args.lse = bindings::pointer<double>(to_lse);
    bindings::run([&] { return Kernel(args); });
}

// attention_forward_and_jvp.
template <class T>
void bind_outputs_and_tangents(const AttentionCall& call, Address to_out, Address to_lse, Address to_out_tangent,
                               Address to_lse_tangent) {
    AttentionArgs<T> args = arguments<T>(call);
    args.out = bindings::pointer<T>(to_out);
    args.lse = bindings::pointer<double>(to_lse);
    args.tangents.out = bindings::pointer<T>(to_out_tangent);
    args.tangents.lse = bindings::pointer<double>(to_lse_tangent);
    bindings::run([&] { return attention_forward_and_jvp(args); });
}

// attention_backward and attention_backward_jvp.
template <class T, Status (*Kernel)(const AttentionArgs<T>&)>
void bind_grads(const AttentionCall& call, Address to_q_grad, Address to_k_grad, Address to_v_grad,
                const HeadedInput& to_mask_grad) {
    AttentionArgs<T> args = arguments<T>(call);
    set_grads<T>(to_q_grad, to_k_grad, to_v_grad, to_mask_grad, call.batch.dims, args);
    bindings::run([&] { return Kernel(args); });
}

// attention_backward_and_jvp.
template <class T>
void bind_grads_and_tangents(const AttentionCall& call, Address to_q_grad, Address to_k_grad, Address to_v_grad,
                             const HeadedInput& to_mask_grad, Address to_q_grad_tangent, Address to_k_grad_tangent,
                             Address to_v_grad_tangent, const HeadedInput& to_mask_grad_tangent) {
    AttentionArgs<T> args = arguments<T>(call);
    set_grads<T>(to_q_grad, to_k_grad, to_v_grad, to_mask_grad, call.batch.dims, args);
    set_grads<T>(to_q_grad_tangent, to_k_grad_tangent, to_v_grad_tangent, to_mask_grad_tangent, call.batch.dims,
                 args.tangents);
    bindings::run([&] { return attention_backward_and_jvp(args); });
}

template <class T>
void register_attention_kernels(py::module_& module, const std::string& suffix) {
    const auto define = [&](const char* name, auto body, const auto&... names) {
        bindings::define_attention(module, name + suffix, body, names...);
    };
    define("attention_forward_", bind_outputs<T, attention_forward<T>>, "to_out"_a, "to_lse"_a);
    define("attention_jvp_", bind_outputs<T, attention_jvp<T>>, "to_out"_a, "to_lse"_a);
    define("attention_forward_and_jvp_", bind_outputs_and_tangents<T>, "to_out"_a, "to_lse"_a, "to_out_tangent"_a,
           "to_lse_tangent"_a);
    define("attention_backward_", bind_grads<T, attention_backward<T>>, "to_q_grad"_a, "to_k_grad"_a, "to_v_grad"_a,
           "to_mask_grad"_a);
    define("attention_backward_jvp_", bind_grads<T, attention_backward_jvp<T>>, "to_q_grad"_a, "to_k_grad"_a,
           "to_v_grad"_a, "to_mask_grad"_a);
    define("attention_backward_and_jvp_", bind_grads_and_tangents<T>, "to_q_grad"_a, "to_k_grad"_a, "to_v_grad"_a,
           "to_mask_grad"_a, "to_q_grad_tangent"_a, "to_k_grad_tangent"_a, "to_v_grad_tangent"_a,
           "to_mask_grad_tangent"_a);
}

}  // namespace

void register_attention(py::module_& module) {
    register_attention_kernels<float>(module, "f32");
    register_attention_kernels<double>(module, "f64");
}

}  // namespace onestep
