#include <tuple>

#include "bindings/arguments.hpp"
#include "polar/polar.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Operand;
using bindings::Sizes;

void bind_polar(const Operand& m, const Sizes& batch, int64_t rows, int64_t columns,
                const std::vector<std::tuple<double, double, double>>& steps, Address factor, Address info) {
    if (steps.empty() || steps.size() > static_cast<size_t>(kMostPolarSteps)) {
        throw std::invalid_argument("1 to " + std::to_string(kMostPolarSteps) + " steps");
    }
    PolarArgs<float> args;
    args.batch = bindings::batch_shape(batch);
    args.rows = rows;
    args.columns = columns;
    args.m = bindings::batched<const float>(m, 2);
    for (const auto& [a, b, c] : steps) {
        args.step[args.steps++] = {a, b, c};
    }
    args.factor = bindings::pointer<float>(factor);
    args.info = bindings::pointer<int32_t>(info);
    bindings::run([&] { return polar_factor(args); });
}

}  // namespace

void register_polar(py::module_& module) {
    module.def("polar_f32", bind_polar, py::arg("m"), py::arg("batch"), py::arg("rows"), py::arg("columns"),
               py::arg("steps"), py::arg("factor"), py::arg("info"));
}

}  // namespace onestep
