#include "bindings/arguments.hpp"
#include "compensated/compensated.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Operand;
using bindings::Sizes;

template <class T>
void bind_inverse_cholesky(const Operand& a, const Operand& damping, const Sizes& batch, int64_t n, bool unit,
                           Address factor, Address info) {
    InverseCholeskyArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.n = n;
    args.a = bindings::batched<const T>(a, 2);
    args.damping = bindings::batched<const T>(damping, 0);
    args.unit = unit;
    args.factor = bindings::pointer<T>(factor);
    args.info = bindings::pointer<int32_t>(info);
    bindings::run([&] { return inverse_cholesky(args); });
}

template <class T>
void bind_sweep(Address w, Address swept, Address factor, bool unit, int64_t rows, int64_t columns, int64_t bits,
                bool symmetric, int64_t group_size, Address group, int64_t groups, Address scale, Address zero,
                Address codes, double sparsity, int64_t keep, int64_t of, Address error) {
    SweepArgs<T> args;
    args.rows = rows;
    args.columns = columns;
    args.w = bindings::pointer<const T>(w);
    args.swept = bindings::pointer<T>(swept);
    args.factor = bindings::pointer<const T>(factor);
    args.unit = unit;
    args.bits = bits;
    args.symmetric = symmetric;
    args.group_size = group_size;
    args.group = bindings::pointer<const int64_t>(group);
    args.groups = groups;
    args.scale = bindings::pointer<T>(scale);
    args.zero = bindings::pointer<T>(zero);
    args.codes = bindings::pointer<uint8_t>(codes);
    args.sparsity = sparsity;
    args.keep = keep;
    args.of = of;
    args.error = bindings::pointer<double>(error);
    bindings::run([&] { return compensated_sweep(args); });
}

template <class T>
void register_compensated_kernels(py::module_& module, const std::string& suffix) {
    module.def(("inverse_cholesky_" + suffix).c_str(), bind_inverse_cholesky<T>, py::arg("a"), py::arg("damping"),
               py::arg("batch"), py::arg("n"), py::arg("unit"), py::arg("factor"), py::arg("info"));
    module.def(("compensated_sweep_" + suffix).c_str(), bind_sweep<T>, py::arg("w"), py::arg("swept"),
               py::arg("factor"), py::arg("unit"), py::arg("rows"), py::arg("columns"), py::arg("bits"),
               py::arg("symmetric"), py::arg("group_size"), py::arg("group"), py::arg("groups"), py::arg("scale"),
               py::arg("zero"), py::arg("codes"), py::arg("sparsity"), py::arg("keep"), py::arg("of"),
               py::arg("error"));
}

}  // namespace

void register_compensated(py::module_& module) {
    register_compensated_kernels<float>(module, "f32");
    register_compensated_kernels<double>(module, "f64");
}

}  // namespace onestep
