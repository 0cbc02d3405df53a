#include "bindings/arguments.hpp"
#include "lmhead/lmhead.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Operand;

template <class T, class Input>
void bind_linear_cross_entropy(const Operand& input, const Operand& weight, const Operand& bias, const Operand& target,
                               const Operand& row_weight, const bindings::Sizes& rows, int64_t d, int64_t v,
                               int64_t ignore_index, double label_smoothing, bool tangent, bool gauss_newton,
                               const Operand& input_tangent, const Operand& weight_tangent, const Operand& bias_tangent,
                               const Operand& row_weight_tangent, Address value, Address loss, Address grad_input,
                               Address grad_weight, Address grad_bias) {
    const BatchShape single;
    LinearCrossEntropyArgs<T, Input> args;
    args.rows = bindings::batch_shape(rows);
    args.d = d;
    args.v = v;
    args.input = bindings::batched<const Input>(input, 1);
    args.weight = bindings::batched<const Input>(weight, 2).at(single, 0);
    args.bias = bindings::batched<const Input>(bias, 1).at(single, 0);
    args.target = bindings::batched<const int64_t>(target, 0);
    args.row_weight = bindings::batched<const T>(row_weight, 0);
    args.ignore_index = ignore_index;
    args.label_smoothing = label_smoothing;
    args.tangent = tangent;
    args.gauss_newton = gauss_newton;
    args.input_tangent = bindings::batched<const Input>(input_tangent, 1);
    args.weight_tangent = bindings::batched<const Input>(weight_tangent, 2).at(single, 0);
    args.bias_tangent = bindings::batched<const Input>(bias_tangent, 1).at(single, 0);
    args.row_weight_tangent = bindings::batched<const T>(row_weight_tangent, 0);
    args.value = bindings::pointer<T>(value);
    args.loss = bindings::pointer<T>(loss);
    args.grad_input = bindings::pointer<T>(grad_input);
    args.grad_weight = bindings::pointer<T>(grad_weight);
    args.grad_bias = bindings::pointer<T>(grad_bias);
    bindings::run([&] { return linear_cross_entropy(args); });
}

template <class T, class Input>
void register_lmhead_kernel(py::module_& module, const char* name) {
    module.def(name, bind_linear_cross_entropy<T, Input>, py::arg("input"), py::arg("weight"), py::arg("bias"),
               py::arg("target"), py::arg("row_weight"), py::arg("rows"), py::arg("d"), py::arg("v"),
               py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("tangent"), py::arg("gauss_newton"),
               py::arg("input_tangent"), py::arg("weight_tangent"), py::arg("bias_tangent"),
               py::arg("row_weight_tangent"), py::arg("value"), py::arg("loss"), py::arg("grad_input"),
               py::arg("grad_weight"), py::arg("grad_bias"));
}

}  // namespace

void register_lmhead(py::module_& module) {
    register_lmhead_kernel<float, float>(module, "linear_cross_entropy_f32");
    register_lmhead_kernel<double, double>(module, "linear_cross_entropy_f64");
    register_lmhead_kernel<float, BFloat16>(module, "linear_cross_entropy_bf16");
}

}  // namespace onestep
