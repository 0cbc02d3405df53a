#include "glm/bind.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::glm_data;
using bindings::matrix;
using bindings::Operand;

template <class X, class T>
void bind_point(int family, bool intercept, const Operand& x, const Operand& y, const Operand& labels,
                const Operand& weight, const Operand& w, int64_t n, int64_t d, int64_t k, Address loss,
                Address gradient, Address curvature) {
    GlmPointArgs<X, T> args;
    args.data = glm_data<X, T>(family, intercept, x, y, labels, weight, n, d, k);
    args.w = matrix<T>(w, 2);
    args.loss = bindings::pointer<double>(loss);
    args.gradient = bindings::pointer<T>(gradient);
    args.curvature = bindings::pointer<T>(curvature);
    bindings::run([&] { return glm_point(args); });
}

template <class X, class T>
void bind_product(int family, bool intercept, const Operand& x, const Operand& weight, Address curvature,
                  const Operand& v, int64_t m, int64_t n, int64_t d, int64_t k, Address product) {
    GlmProductArgs<X, T> args;
    args.data = glm_data<X, T>(family, intercept, x, {}, {}, weight, n, d, k);
    args.curvature = bindings::pointer<T>(curvature);
    args.m = m;
    args.v = bindings::batched<const T>(v, 2);
    args.product = bindings::pointer<T>(product);
    bindings::run([&] { return glm_product(args); });
}

template <class X, class T>
void register_glm_kernels(py::module_& module, const std::string& suffix) {
    module.def(("glm_point_" + suffix).c_str(), bind_point<X, T>, py::arg("family"), py::arg("intercept"), py::arg("x"),
               py::arg("y"), py::arg("labels"), py::arg("weight"), py::arg("w"), py::arg("n"), py::arg("d"),
               py::arg("k"), py::arg("loss"), py::arg("gradient"), py::arg("curvature"));
    module.def(("glm_product_" + suffix).c_str(), bind_product<X, T>, py::arg("family"), py::arg("intercept"),
               py::arg("x"), py::arg("weight"), py::arg("curvature"), py::arg("v"), py::arg("m"), py::arg("n"),
               py::arg("d"), py::arg("k"), py::arg("product"));
}

}  // namespace

void register_glm(py::module_& module) {
    register_glm_kernels<float, float>(module, "f32");
    register_glm_kernels<double, double>(module, "f64");
    register_glm_kernels<BFloat16, float>(module, "bf16");
}

}  // namespace onestep
