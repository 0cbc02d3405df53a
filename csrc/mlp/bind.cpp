#include "bindings/arguments.hpp"
#include "mlp/mlp.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Operand;
using bindings::Sizes;

// widths: inputs, then the outputs of each layer; activations and biased: one a layer.
std::vector<MlpLayer> layers_of(const Sizes& widths, const Sizes& activations, const Sizes& biased) {
    const size_t count = activations.size();
    if (count < 1 || count > static_cast<size_t>(kMostMlpLayers) || widths.size() != count + 1 ||
        biased.size() != count) {
        throw std::invalid_argument("expected 1 to " + std::to_string(kMostMlpLayers) + " layers");
    }
    std::vector<MlpLayer> layers(count);
    int64_t at = 0;
    for (size_t l = 0; l < count; ++l) {
        layers[l] = {widths[l], widths[l + 1], static_cast<MlpActivation>(activations[l]), biased[l] != 0, at};
        at = layers[l].end();
    }
    return layers;
}

template <class T>
MlpArgs<T> network_of(const std::vector<MlpLayer>& layers, int64_t n, const Operand& x, Address parameters) {
    MlpArgs<T> args;
    args.layers = layers.data();
    args.count = static_cast<int64_t>(layers.size());
    args.n = n;
    args.x = bindings::batched<const T>(x, 2).at(BatchShape{}, 0);
    args.parameters = bindings::pointer<const T>(parameters);
    return args;
}

template <class T>
void bind_gradient(const Sizes& widths, const Sizes& activations, const Sizes& biased, int64_t n, const Operand& x,
                   const Operand& y, Address parameters, Address loss, Address gradient) {
    const std::vector<MlpLayer> layers = layers_of(widths, activations, biased);
    MlpGradientArgs<T> args;
    args.network = network_of<T>(layers, n, x, parameters);
    args.y = bindings::batched<const T>(y, 2).at(BatchShape{}, 0);
    args.loss = bindings::pointer<double>(loss);
    args.gradient = bindings::pointer<T>(gradient);
    bindings::run([&] { return mlp_gradient(args); });
}

template <class T>
void bind_product(const Sizes& widths, const Sizes& activations, const Sizes& biased, int64_t n, const Operand& x,
                  Address parameters, Address v, Address product) {
    const std::vector<MlpLayer> layers = layers_of(widths, activations, biased);
    MlpProductArgs<T> args;
    args.network = network_of<T>(layers, n, x, parameters);
    args.v = bindings::pointer<const T>(v);
    args.product = bindings::pointer<T>(product);
    bindings::run([&] { return mlp_product(args); });
}

template <class T>
void bind_jacobian(const Sizes& widths, const Sizes& activations, const Sizes& biased, int64_t n, const Operand& x,
                   Address parameters, double scale, Address jacobian) {
    const std::vector<MlpLayer> layers = layers_of(widths, activations, biased);
    MlpJacobianArgs<T> args;
    args.network = network_of<T>(layers, n, x, parameters);
    args.scale = static_cast<T>(scale);
    args.jacobian = bindings::pointer<T>(jacobian);
    bindings::run([&] { return mlp_jacobian(args); });
}

template <class T>
void register_mlp_kernels(py::module_& module, const std::string& suffix) {
    module.def(("mlp_gradient_" + suffix).c_str(), bind_gradient<T>, py::arg("widths"), py::arg("activations"),
               py::arg("biased"), py::arg("n"), py::arg("x"), py::arg("y"), py::arg("parameters"), py::arg("loss"),
               py::arg("gradient"));
    module.def(("mlp_product_" + suffix).c_str(), bind_product<T>, py::arg("widths"), py::arg("activations"),
               py::arg("biased"), py::arg("n"), py::arg("x"), py::arg("parameters"), py::arg("v"), py::arg("product"));
    module.def(("mlp_jacobian_" + suffix).c_str(), bind_jacobian<T>, py::arg("widths"), py::arg("activations"),
               py::arg("biased"), py::arg("n"), py::arg("x"), py::arg("parameters"), py::arg("scale"),
               py::arg("jacobian"));
}

}  // namespace

void register_mlp(py::module_& module) {
    register_mlp_kernels<float>(module, "f32");
    register_mlp_kernels<double>(module, "f64");
}

}  // namespace onestep
