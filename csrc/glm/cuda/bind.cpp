#include "base/cuda/bind.hpp"

#include "glm/bind.hpp"
#include "glm/cuda/glm.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::glm_data;
using bindings::matrix;
using bindings::Operand;
using bindings::pointer;
using py::literals::operator""_a;

// Bytes that glm_point (m = 1) or glm_product needs, or -1 if one pass does not take so many columns.
template <class X, class T>
int64_t bind_workspace(bool intercept, int64_t n, int64_t d, int64_t k, int64_t m, int device) {
    if (m * k > glm::cuda::glm_most_columns<X, T>(d, intercept)) {
        return -1;
    }
    const glm::cuda::DeviceGuard guard(device);
    return glm::cuda::glm_workspace(glm_data<X, T>(0, intercept, {}, {}, {}, {}, n, d, k), m);
}

template <class X, class T>
void bind_point(int family, bool intercept, const Operand& x, const Operand& y, const Operand& labels,
                const Operand& weight, const Operand& w, int64_t n, int64_t d, int64_t k, Address loss,
                Address gradient, Address curvature, Address info, Address workspace, int device, Address stream) {
    GlmPointArgs<X, T> args;
    args.data = glm_data<X, T>(family, intercept, x, y, labels, weight, n, d, k);
    args.w = matrix<T>(w, 2);
    args.loss = pointer<double>(loss);
    args.gradient = pointer<T>(gradient);
    args.curvature = pointer<T>(curvature);
    bindings::run_on_device(device, [&] {
        return glm::cuda::glm_point(args, pointer<T>(info), pointer<void>(workspace), bindings::stream_of(stream));
    });
}

template <class X, class T>
void bind_product(int family, bool intercept, const Operand& x, const Operand& weight, Address curvature,
                  const Operand& v, int64_t m, int64_t n, int64_t d, int64_t k, Address product, Address workspace,
                  int device, Address stream) {
    GlmProductArgs<X, T> args;
    args.data = glm_data<X, T>(family, intercept, x, {}, {}, weight, n, d, k);
    args.curvature = pointer<T>(curvature);
    args.m = m;
    args.v = bindings::batched<const T>(v, 2);
    args.product = pointer<T>(product);
    bindings::run_on_device(
        device, [&] { return glm::cuda::glm_product(args, pointer<void>(workspace), bindings::stream_of(stream)); });
}

template <class X, class T>
void bind_chunk_point(int family, const Operand& y, const Operand& labels, const Operand& weight, int64_t n, int64_t k,
                      Address outputs, Address curvature, Address losses, Address statuses, int device,
                      Address stream) {
    const auto data = glm_data<X, T>(family, false, {}, y, labels, weight, n, 0, k);
    bindings::run_on_device(device, [&] {
        return glm::cuda::glm_chunk_point(data, pointer<T>(outputs), pointer<T>(curvature), pointer<double>(losses),
                                          pointer<int>(statuses), bindings::stream_of(stream));
    });
}

template <class X, class T>
void bind_chunk_product(int family, const Operand& weight, int64_t n, int64_t k, int64_t m, Address outputs,
                        Address curvature, int device, Address stream) {
    const auto data = glm_data<X, T>(family, false, {}, {}, {}, weight, n, 0, k);
    bindings::run_on_device(device, [&] {
        return glm::cuda::glm_chunk_product(data, m, pointer<T>(outputs), pointer<const T>(curvature),
                                            bindings::stream_of(stream));
    });
}

template <class T>
void bind_sum_losses(int64_t count, Address losses, Address statuses, Address loss, Address info, int device,
                     Address stream) {
    bindings::run_on_device(device, [&] {
        return glm::cuda::glm_sum_losses(count, pointer<const double>(losses), pointer<const int>(statuses),
                                         pointer<double>(loss), pointer<T>(info), bindings::stream_of(stream));
    });
}

// Passes by the type of X; what lies between two GEMMs sees only the type of the results.
template <class X, class T>
void register_passes(py::module_& module, const std::string& suffix) {
    module.def(("glm_workspace_" + suffix).c_str(), bind_workspace<X, T>, "intercept"_a, "n"_a, "d"_a, "k"_a, "m"_a,
               "device"_a);
    module.def(("glm_point_" + suffix).c_str(), bind_point<X, T>, "family"_a, "intercept"_a, "x"_a, "y"_a, "labels"_a,
               "weight"_a, "w"_a, "n"_a, "d"_a, "k"_a, "loss"_a, "gradient"_a, "curvature"_a, "info"_a, "workspace"_a,
               "device"_a, "stream"_a);
    module.def(("glm_product_" + suffix).c_str(), bind_product<X, T>, "family"_a, "intercept"_a, "x"_a, "weight"_a,
               "curvature"_a, "v"_a, "m"_a, "n"_a, "d"_a, "k"_a, "product"_a, "workspace"_a, "device"_a, "stream"_a);
}

template <class T>
void register_chunks(py::module_& module, const std::string& suffix) {
    module.def(("glm_chunk_point_" + suffix).c_str(), bind_chunk_point<T, T>, "family"_a, "y"_a, "labels"_a, "weight"_a,
               "n"_a, "k"_a, "outputs"_a, "curvature"_a, "losses"_a, "statuses"_a, "device"_a, "stream"_a);
    module.def(("glm_chunk_product_" + suffix).c_str(), bind_chunk_product<T, T>, "family"_a, "weight"_a, "n"_a, "k"_a,
               "m"_a, "outputs"_a, "curvature"_a, "device"_a, "stream"_a);
    module.def(("glm_sum_losses_" + suffix).c_str(), bind_sum_losses<T>, "count"_a, "losses"_a, "statuses"_a, "loss"_a,
               "info"_a, "device"_a, "stream"_a);
}

}  // namespace

void register_glm_cuda(py::module_& module) {
    register_passes<float, float>(module, "f32");
    register_passes<double, double>(module, "f64");
    register_passes<glm::cuda::bfloat16, float>(module, "bf16");
    register_passes<glm::cuda::float16, float>(module, "f16");
    register_chunks<float>(module, "f32");
    register_chunks<double>(module, "f64");
    module.def("glm_chunk_losses", glm::cuda::glm_chunk_losses);
}

}  // namespace onestep
