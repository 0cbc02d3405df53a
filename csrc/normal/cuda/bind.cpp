#include "base/cuda/bind.hpp"

#include "base/singular.hpp"
#include "normal/cpu/kernels.hpp"
#include "normal/cuda/normal.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Operand;
using py::operator""_a;

template <class T>
void bind_system(const Operand& x, const Operand& y, const Operand& weight, const Operand& ridge, double uniform_ridge,
                 const Operand& a, const Operand& b, bool normal_equations, const bindings::Sizes& batch, int64_t n,
                 int64_t d, int64_t k, Address gram, Address cross, Address solution, Address factor, Address info,
                 Address norm, int device, Address stream) {
    normal::cuda::SystemArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.n = n;
    args.d = d;
    args.k = k;
    args.x = bindings::batched<const T>(x, 2);
    args.y = bindings::batched<const T>(y, 2);
    args.weight = bindings::batched<const T>(weight, 1);
    args.ridge = bindings::batched<const T>(ridge, 1);
    args.uniform_ridge = uniform_ridge;
    args.a = bindings::batched<const T>(a, 2);
    args.b = bindings::batched<const T>(b, 2);
    args.singular_epsilons = normal_equations ? kSingularEpsilons : 0;
    args.gram = bindings::pointer<T>(gram);
    args.cross = bindings::pointer<T>(cross);
    args.solution = bindings::pointer<T>(solution);
    args.factor = bindings::pointer<T>(factor);
    args.info = bindings::pointer<int32_t>(info);
    args.norm = bindings::pointer<T>(norm);
    bindings::run_on_device(device, [&] { return normal::cuda::system(args, bindings::stream_of(stream)); });
}

template <class T>
void bind_factor_solve(const Operand& factor, const Operand& b, const bindings::Sizes& batch, int64_t d, int64_t k,
                       Address solution, int device, Address stream) {
    normal::cuda::FactorSolveArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.d = d;
    args.k = k;
    args.factor = bindings::batched<const T>(factor, 2);
    args.b = bindings::batched<const T>(b, 2);
    args.solution = bindings::pointer<T>(solution);
    bindings::run_on_device(device, [&] { return normal::cuda::factor_solve(args, bindings::stream_of(stream)); });
}

void bind_blocked_cholesky(const Operand& a, bool normal_equations, const bindings::Sizes& batch, int64_t d,
                           Address factor, Address info, int device, Address stream) {
    normal::cuda::CholeskyArgs args;
    args.batch = bindings::batch_shape(batch);
    args.d = d;
    args.a = bindings::batched<const float>(a, 2);
    args.singular_epsilons = normal_equations ? kSingularEpsilons : 0;
    args.factor = bindings::pointer<float>(factor);
    args.info = bindings::pointer<int32_t>(info);
    bindings::run_on_device(device, [&] { return normal::cuda::blocked_cholesky(args, bindings::stream_of(stream)); });
}

template <class T>
void bind_condition(Address factor, Address norm, Address info, Address rcond, int64_t count, int64_t d, int device,
                    Address stream) {
    normal::cuda::ConditionArgs<T> args;
    args.count = count;
    args.d = d;
    args.factor = bindings::pointer<const T>(factor);
    args.norm = bindings::pointer<const T>(norm);
    args.info = bindings::pointer<const int32_t>(info);
    args.rcond = bindings::pointer<T>(rcond);
    bindings::run_on_device(device, [&] { return normal::cuda::condition(args, bindings::stream_of(stream)); });
}

template <class T>
int64_t bind_most_features(int device) {
    int64_t most = 0;
    bindings::run_on_device(device, [&] {
        most = normal::cuda::most_features<T>(cuda::device_limits().shared_bytes);
        return Status::ok;
    });
    return most;
}

template <class T>
void register_functions(py::module_& module, const std::string& suffix) {
    module.def(("normal_system_" + suffix).c_str(), bind_system<T>, py::kw_only(), "x"_a = py::none(),
               "y"_a = py::none(), "weight"_a = py::none(), "ridge"_a = py::none(), "uniform_ridge"_a = 0.0,
               "a"_a = py::none(), "b"_a = py::none(), "normal_equations"_a, "batch"_a, "n"_a = 0, "d"_a, "k"_a,
               "gram"_a = 0, "cross"_a = 0, "solution"_a = 0, "factor"_a = 0, "info"_a = 0, "norm"_a = 0, "device"_a,
               "stream"_a);
    module.def(("normal_factor_solve_" + suffix).c_str(), bind_factor_solve<T>, py::kw_only(), "factor"_a, "b"_a,
               "batch"_a, "d"_a, "k"_a, "solution"_a, "device"_a, "stream"_a);
    module.def(("normal_condition_" + suffix).c_str(), bind_condition<T>, py::kw_only(), "factor"_a, "norm"_a, "info"_a,
               "rcond"_a, "count"_a, "d"_a, "device"_a, "stream"_a);
    module.def(("normal_most_columns_" + suffix).c_str(), normal::cuda::most_columns<T>, "d"_a);
    module.def(("normal_most_features_" + suffix).c_str(), bind_most_features<T>, "device"_a);
}

}  // namespace

void register_normal_cuda(py::module_& module) {
    register_functions<float>(module, "f32");
    register_functions<double>(module, "f64");
    module.def("normal_blocked_cholesky_f32", bind_blocked_cholesky, py::kw_only(), "a"_a, "normal_equations"_a,
               "batch"_a, "d"_a, "factor"_a, "info"_a, "device"_a, "stream"_a);
    module.attr("normal_small_features") = normal::cuda::kSmallFeatures;
}

}  // namespace onestep
