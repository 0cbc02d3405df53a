#include "bindings/arguments.hpp"
#include "sparse/sparse.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;

template <class T>
void bind_sparse_multiply(int64_t n, int64_t d, int64_t k, int64_t elements, Address offsets, Address indices,
                          bool wide, Address values, Address v, Address out) {
    SparseMultiplyArgs<T> args;
    args.n = n;
    args.d = d;
    args.k = k;
    args.elements = elements;
    args.offsets = bindings::pointer<const void>(offsets);
    args.indices = bindings::pointer<const void>(indices);
    args.wide = wide;
    args.values = bindings::pointer<const T>(values);
    args.v = bindings::pointer<const T>(v);
    args.out = bindings::pointer<T>(out);
    bindings::run([&] { return sparse_multiply(args); });
}

template <class T>
void register_sparse_kernels(py::module_& module, const std::string& suffix) {
    module.def(("sparse_multiply_" + suffix).c_str(), bind_sparse_multiply<T>, py::arg("n"), py::arg("d"), py::arg("k"),
               py::arg("elements"), py::arg("offsets"), py::arg("indices"), py::arg("wide"), py::arg("values"),
               py::arg("v"), py::arg("out"));
}

}  // namespace

void register_sparse(py::module_& module) {
    register_sparse_kernels<float>(module, "f32");
    register_sparse_kernels<double>(module, "f64");
}

}  // namespace onestep
