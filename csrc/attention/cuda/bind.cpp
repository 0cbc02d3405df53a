#include "base/cuda/bind.hpp"

#include <array>

#include "attention/cuda/attention.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Sizes;

// (address, strides, element type), or None.
using Input = std::optional<std::tuple<Address, Sizes, int>>;
// q, k, v, mask, out, lse, grad, grad_lse; L and its cotangent by their addresses, 0: absent.
using Tensors = std::tuple<Input, Input, Input, Input, Input, Address, Input, Address>;

HeadedOperand operand(const Input& given, int dims) {
    if (!given.has_value()) {
        return {};
    }
    const auto& [address, strides, element] = *given;
    return bindings::headed(address, strides, element, dims);
}

attention::cuda::AttentionTensors tensors(const Tensors& given, int dims) {
    attention::cuda::AttentionTensors result;
    result.q = operand(std::get<0>(given), dims);
    result.k = operand(std::get<1>(given), dims);
    result.v = operand(std::get<2>(given), dims);
    result.mask = operand(std::get<3>(given), dims);
    result.out = operand(std::get<4>(given), dims);
    result.lse = bindings::pointer<const double>(std::get<5>(given));
    result.grad = operand(std::get<6>(given), dims);
    result.grad_lse = bindings::pointer<const double>(std::get<7>(given));
    return result;
}

// sizes: heads, kv_heads, queries, keys, d, dv
attention::cuda::AttentionProblem problem(int element, const Sizes& batch, const std::array<int64_t, 6>& sizes,
                                          double scale, bool causal, bool warp_groups, const Tensors& primal,
                                          const Tensors& tangent) {
    attention::cuda::AttentionProblem result;
    result.element = static_cast<Element>(element);
    result.batch = bindings::batch_shape(batch);
    result.heads = sizes[0];
    result.kv_heads = sizes[1];
    result.queries = sizes[2];
    result.keys = sizes[3];
    result.d = static_cast<int>(sizes[4]);
    result.dv = static_cast<int>(sizes[5]);
    result.scale = scale;
    result.causal = causal;
    result.warp_groups = warp_groups;
    result.primal = tensors(primal, result.batch.dims);
    result.tangent = tensors(tangent, result.batch.dims);
    return result;
}

template <Status (*Kernel)(const attention::cuda::AttentionProblem&, const attention::cuda::AttentionOutputs&,
                           cudaStream_t)>
void run_outputs(int element, const Sizes& batch, const std::array<int64_t, 6>& sizes, double scale, bool causal,
                 bool warp_groups, const Tensors& primal, const Tensors& tangent, Address out, Address lse, int device,
                 Address stream) {
    const attention::cuda::AttentionProblem given =
        problem(element, batch, sizes, scale, causal, warp_groups, primal, tangent);
    attention::cuda::AttentionOutputs outputs;
    outputs.out = bindings::pointer<void>(out);
    outputs.lse = bindings::pointer<double>(lse);
    bindings::run_on_device(device, [&] { return Kernel(given, outputs, bindings::stream_of(stream)); });
}

void run_gradients(int element, const Sizes& batch, const std::array<int64_t, 6>& sizes, double scale, bool causal,
                   bool warp_groups, const Tensors& primal, const Tensors& tangent, bool tangents,
                   const std::array<Address, 4>& results, Address workspace, int device, Address stream) {
    const attention::cuda::AttentionProblem given =
        problem(element, batch, sizes, scale, causal, warp_groups, primal, tangent);
    attention::cuda::AttentionOutputs outputs;
    outputs.q_grad = bindings::pointer<void>(results[0]);
    outputs.k_grad = bindings::pointer<void>(results[1]);
    outputs.v_grad = bindings::pointer<void>(results[2]);
    outputs.score_grad = bindings::pointer<void>(results[3]);
    bindings::run_on_device(device, [&] {
        return attention::cuda::attention_gradients(given, tangents, outputs, bindings::pointer<void>(workspace),
                                                    bindings::stream_of(stream));
    });
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
    using namespace py::literals;
    module.def("attention_supported", supported, "element"_a, "d"_a, "dv"_a, "device"_a);
    module.def("attention_forward", run_outputs<attention::cuda::attention_forward>, "element"_a, "batch"_a, "sizes"_a,
               "scale"_a, "causal"_a, "warp_groups"_a, "primal"_a, "tangent"_a, "out"_a, "lse"_a, "device"_a,
               "stream"_a);
    module.def("attention_jvp", run_outputs<attention::cuda::attention_jvp>, "element"_a, "batch"_a, "sizes"_a,
               "scale"_a, "causal"_a, "warp_groups"_a, "primal"_a, "tangent"_a, "out"_a, "lse"_a, "device"_a,
               "stream"_a);
    // results: the gradients of q, k, v and of the scores, 0: not wanted. workspace: 16 bytes (32 for double) for each
    // row of queries.
    module.def("attention_gradients", run_gradients, "element"_a, "batch"_a, "sizes"_a, "scale"_a, "causal"_a,
               "warp_groups"_a, "primal"_a, "tangent"_a, "tangents"_a, "results"_a, "workspace"_a, "device"_a,
               "stream"_a);
}

}  // namespace onestep
