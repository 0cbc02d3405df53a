#include "base/cuda/bind.hpp"

#include "attention/bind.hpp"
#include "attention/cuda/attention.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using attention::cuda::AttentionOutputs;
using attention::cuda::AttentionProblem;
using attention::cuda::AttentionTensors;
using bindings::Address;
using bindings::AttentionCall;
using bindings::Sizes;
using py::literals::operator""_a;

// L and its cotangent are contiguous: their addresses say all.
AttentionTensors tensors(const AttentionInputs& given) {
    return {given.q,
            given.k,
            given.v,
            given.mask,
            given.out,
            given.grad,
            static_cast<const double*>(given.lse.data),
            static_cast<const double*>(given.grad_lse.data)};
}

AttentionProblem problem(const AttentionCall& call, int element, bool warp_groups) {
    AttentionProblem result;
    result.element = static_cast<Element>(element);
    result.batch = call.batch;
    result.heads = call.heads;
    result.kv_heads = call.kv_heads;
    result.queries = call.queries;
    result.keys = call.keys;
    result.d = static_cast<int>(call.d);
    result.dv = static_cast<int>(call.dv);
    result.scale = call.scale;
    result.causal = call.causal;
    result.warp_groups = warp_groups;
    result.primal = tensors(call.primal);
    result.tangent = tensors(call.tangent);
    return result;
}

template <Status (*Kernel)(const AttentionProblem&, const AttentionOutputs&, cudaStream_t)>
void run_outputs(const AttentionCall& call, int element, bool warp_groups, Address to_out, Address to_lse, int device,
                 Address stream) {
    AttentionOutputs outputs;
    outputs.out = bindings::pointer<void>(to_out);
    outputs.lse = bindings::pointer<double>(to_lse);
    bindings::run_on_device(
        device, [&] { return Kernel(problem(call, element, warp_groups), outputs, bindings::stream_of(stream)); });
}

// Gradients that are not wanted have the address 0.
void run_gradients(const AttentionCall& call, int element, bool warp_groups, bool tangents, Address to_q_grad,
                   Address to_k_grad, Address to_v_grad, Address to_score_grad, Address workspace, int device,
                   Address stream) {
    AttentionOutputs outputs;
    outputs.q_grad = bindings::pointer<void>(to_q_grad);
    outputs.k_grad = bindings::pointer<void>(to_k_grad);
    outputs.v_grad = bindings::pointer<void>(to_v_grad);
    outputs.score_grad = bindings::pointer<void>(to_score_grad);
    bindings::run_on_device(device, [&] {
        return attention::cuda::attention_gradients(problem(call, element, warp_groups), tangents, outputs,
                                                    bindings::pointer<void>(workspace), bindings::stream_of(stream));
    });
}

int64_t gradients_workspace(int element, const Sizes& batch, int64_t heads, int64_t queries) {
    AttentionProblem sizes;
    sizes.element = static_cast<Element>(element);
    sizes.batch = bindings::batch_shape(batch);
    sizes.heads = heads;
    sizes.queries = queries;
    return attention::cuda::attention_gradients_workspace(sizes);
}

bool supported(int element, int d, int dv, int device) {
    bool result = false;
    bindings::run_on_device(device, [&] {
        result = attention::cuda::attention_supported(static_cast<Element>(element), d, dv);
        return Status::ok;
    });
    return result;
}

}  // namespace

void register_attention_cuda(py::module_& module) {
    module.def("attention_supported", supported, "element"_a, "d"_a, "dv"_a, "device"_a);
    module.def("attention_gradients_workspace", gradients_workspace, "element"_a, "batch"_a, "heads"_a, "queries"_a);
    const auto define = [&](const char* name, auto body, const auto&... names) {
        bindings::define_attention(module, name, body, "element"_a, "warp_groups"_a, names..., "device"_a, "stream"_a);
    };
    define("attention_forward", run_outputs<attention::cuda::attention_forward>, "to_out"_a, "to_lse"_a);
    define("attention_jvp", run_outputs<attention::cuda::attention_jvp>, "to_out"_a, "to_lse"_a);
    define("attention_gradients", run_gradients, "tangents"_a, "to_q_grad"_a, "to_k_grad"_a, "to_v_grad"_a,
           "to_score_grad"_a, "workspace"_a);
}

}  // namespace onestep
